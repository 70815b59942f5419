"""Nothing is lost between the thread that reads and the one that takes, however long nobody takes."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.metering import HostEnergy, Metering
from llmco2_vllm.meters.window_queue import WindowQueue
from llmco2_vllm.testing import FakeClock, FakeMeter
from tests.meters.virtual import START_SECONDS, Bench, tiled

doubts = st.sampled_from([Doubt.NONE, Doubt.INTEGRATED_POWER, Doubt.SHARED, Doubt.SLEEPING, Doubt.LOST])
windows = st.tuples(
    st.integers(0, 2), st.floats(0.01, 2.0), st.none() | st.floats(0.0, 1e3), doubts, st.sampled_from([0] * 9 + [4])
)


def taken(queue: WindowQueue) -> list[MeterWindow]:
    found = []
    while queue:
        found.append(queue.popleft())
    return found


def joules(windows: list[MeterWindow], *kinds: Doubt) -> float:
    return sum(w.energy_joules or 0.0 for w in windows if not kinds or w.doubt in kinds)


def unknown_seconds(windows: list[MeterWindow]) -> float:
    return sum(w.duration_seconds for w in windows if w.energy_joules is None)


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(windows, min_size=20, max_size=60))
def test_whoever_takes_and_when_energy_and_time_are_those_that_came(
    capacity: int, script: list[tuple[int, float, float | None, Doubt, int]]
) -> None:
    queue, ends = WindowQueue(capacity), [0.0, 0.0, 0.0]
    came: list[MeterWindow] = []
    went: list[MeterWindow] = []
    for device, seconds, energy, doubt, takes in script:
        came.append(MeterWindow(device, ends[device], ends[device] + seconds, energy, 0.1, doubt))
        ends[device] += seconds
        queue.append(came[-1])
        assert len(queue) <= capacity
        went += [queue.popleft() for _ in range(min(takes, len(queue)))]
    went += taken(queue)
    for device, end in enumerate(ends):
        ours, theirs = ([w for w in side if w.device == device] for side in (went, came))
        assert tiled(ours)
        assert [(w[0].begin_seconds, w[-1].end_seconds) for w in (ours, theirs) if w] == [(0.0, end)] * 2 * bool(theirs)
        assert joules(ours) == pytest.approx(joules(theirs))
        assert unknown_seconds(ours) == pytest.approx(unknown_seconds(theirs), abs=1e-9)
        for foreign in (Doubt.SHARED, Doubt.SLEEPING):
            assert joules(ours, foreign) == pytest.approx(joules(theirs, foreign))


def test_windows_that_were_taken_in_time_are_the_very_ones_that_came() -> None:
    queue = WindowQueue(3)
    came = [MeterWindow(0, float(i), i + 1.0, 5.0) for i in range(3)]
    for window in came:
        queue.append(window)
    assert taken(queue) == came and not queue.overflowed


def test_what_idled_for_long_is_one_window_that_is_not_to_be_learnt_from() -> None:
    queue = WindowQueue(2)
    for i in range(100):
        queue.append(MeterWindow(0, float(i), i + 1.0, 75.0))
    first, *rest = taken(queue)
    assert first == MeterWindow(0, 0.0, 98.0, 98 * 75.0, 0.0, Doubt.OVERFLOWED)
    assert [w.doubt for w in rest] == [Doubt.NONE] * 2 and queue.overflowed == {0: 98}


def test_joined_windows_end_where_the_next_one_begins_to_the_last_bit() -> None:
    queue = WindowQueue(2)
    for i in range(100):
        queue.append(MeterWindow(0, i * 0.1, (i + 1) * 0.1, 7.5, 0.0, Doubt.SLEEPING if i % 3 else Doubt.NONE))
    assert tiled(taken(queue))


def test_an_empty_queue_has_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        WindowQueue().popleft()


def test_two_threads_lose_nothing_and_keep_the_order() -> None:
    queue, count = WindowQueue(5), 20_000

    def write() -> None:
        for i in range(count):
            queue.append(MeterWindow(0, float(i), i + 1.0, 1.0))

    writer = threading.Thread(target=write)
    writer.start()
    went: list[MeterWindow] = []
    while writer.is_alive():
        went += [queue.popleft() for _ in range(len(queue))]
    went += taken(queue)
    assert all(a.end_seconds == b.begin_seconds for a, b in pairwise(went))
    assert joules(went) == count and (went[0].begin_seconds, went[-1].end_seconds) == (0.0, count)


def test_the_energy_of_windows_nobody_took_is_idle_energy_of_the_engine_and_is_counted() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock, lambda t: 100.0 * t))
    sampler = bench.sampler
    sampler.windows = WindowQueue(20)
    while bench.clock() < START_SECONDS + 60.0:
        bench.clock.now_seconds = max(bench.clock() + 1e-4, sampler.poll_once())
    state = sampler.state()
    assert state["waiting_windows"] == 20 and state["joined_windows"] > 400
    assert bench.state["faults"] == {"windows nobody took were joined": state["joined_windows"]}
    begin, end = START_SECONDS, sampler.windows[-1].end_seconds
    metering = Metering(Attributor([75.0]), sampler.windows, clock=FakeClock(bench.clock()))
    metering.tend_all()
    metered = metering.state()
    assert metered["metered_joules"] == metered["idle_joules"] == pytest.approx(100.0 * (end - begin), rel=0.01)
    assert metered["residual_joules"] == pytest.approx(0.0, abs=1e-6)


def test_the_hosts_energy_is_all_there_however_late_it_is_asked_for() -> None:
    queue = WindowQueue(4)
    for i in range(50):
        queue.append(MeterWindow(0, float(i), i + 1.0, None if i % 5 == 0 else 10.0, 0.0))
    told = HostEnergy(queue, "rapl").state()
    assert told == {"joules": 400.0, "unmetered_seconds": 10.0, "source": "rapl", "reason": ""}
