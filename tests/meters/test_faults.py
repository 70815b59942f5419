"""Every event of METERING section 6 has its outcome, is counted, and leaves no hole in time."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.meters.base import (
    DeviceIdentity,
    DeviceLostError,
    MeterUnavailableError,
    NotSupportedError,
    SkippedReadingError,
    UninitializedError,
)
from llmco2_vllm.meters.sampler import EdgeSampler, Timing
from llmco2_vllm.testing import FakeClock, FakeMeter
from tests.meters.virtual import START_SECONDS, Bench, tiled


@pytest.fixture
def bench() -> Bench:
    """A device of 100 W that has been learnt, on an engine that is busy."""
    bench = Bench()
    bench.add(FakeMeter(bench.clock, lambda t: 100.0 * t))
    bench.sampler.activity.busy(START_SECONDS - 10)
    bench.run(5.0)
    return bench


def doubts(windows: list[MeterWindow]) -> set[Doubt]:
    return {window.doubt for window in windows}


def watts(window: MeterWindow) -> float:
    assert window.energy_joules is not None
    return window.energy_joules / window.duration_seconds


def test_a_device_without_a_counter_is_integrated_over_power(bench: Bench) -> None:
    bench.meters[0].counting = False
    windows = bench.run(3.0)
    assert tiled(windows)
    assert windows[0].doubt is Doubt.NOT_SUPPORTED and windows[0].energy_joules is None
    assert doubts(windows[1:]) == {Doubt.INTEGRATED_POWER}
    assert all(watts(w) == pytest.approx(100, rel=1e-6) and w.duration_seconds >= 0.1 for w in windows[1:])
    assert bench.state["basis"] == "instant power"
    assert bench.state["faults"] == {"not supported": 1}


def test_a_device_without_counter_and_power_is_not_known_rather_than_zero(bench: Bench) -> None:
    bench.meters[0].counting = bench.meters[0].powering = False
    windows = bench.run(5.0)
    assert tiled(windows)
    assert doubts(windows) == {Doubt.NOT_SUPPORTED}
    assert {w.energy_joules for w in windows} == {None}
    assert bench.state["basis"] == "none" and bench.state["power_watts"] is None


def test_a_counter_that_comes_back_is_used_again(bench: Bench) -> None:
    bench.meters[0].counting = False
    before = bench.run(2.0)
    bench.meters[0].counting = True
    windows = before + bench.run(4.0)
    assert tiled(windows)
    assert windows[-1].doubt is Doubt.NONE and watts(windows[-1]) == pytest.approx(100, rel=0.05)
    assert bench.state["basis"] == "counter"
    # No reading of power is believed for longer than until the next one.
    assert all(watts(w) == pytest.approx(100, rel=1e-6) for w in windows if w.doubt is Doubt.INTEGRATED_POWER)


@pytest.mark.parametrize("error", [DeviceLostError("lost"), NotSupportedError("vgpu")])
def test_a_lost_device_closes_the_window_without_energy_and_is_opened_again(bench: Bench, error: Exception) -> None:
    meter = bench.meters[0]
    meter.failures = [error]
    meter.reopen_failures = [DeviceLostError("still lost")] * 2 if isinstance(error, DeviceLostError) else []
    windows = bench.run(12.0)
    assert tiled(windows)
    unknown = [w for w in windows if w.energy_joules is None]
    expected = Doubt.LOST if isinstance(error, DeviceLostError) else Doubt.NOT_SUPPORTED
    assert doubts(unknown) == {expected}
    assert windows[-1].doubt is Doubt.NONE
    assert meter.reopened == (1 if isinstance(error, DeviceLostError) else 0)
    assert bench.state["faults"] == {expected.value: 1}


def test_a_device_that_stays_lost_is_tried_ever_less_often(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.failures = [DeviceLostError("lost")]
    meter.reopen_failures = [DeviceLostError("lost")] * 1000
    begin = bench.clock()
    bench.run(300.0)
    tries = [t for t in meter.calls if t > begin + 1]
    assert 10 < len(tries) < 20


def test_other_devices_go_on_when_one_is_lost() -> None:
    bench = Bench()
    broken, sound = (bench.add(FakeMeter(bench.clock)) for _ in range(2))
    bench.run(3.0)
    broken.failures, broken.reopen_failures = [DeviceLostError("lost")], [DeviceLostError("lost")] * 99
    windows = [w for w in bench.run(5.0) if w.device == 1]
    assert doubts(windows) == {Doubt.NONE} and len(windows) > 40
    assert sound.reopened == 0


def test_a_counter_that_decreased_drops_the_window_and_is_rebased(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.offset_joules = -90_000.0
    windows = bench.run(5.0)
    assert tiled(windows)
    dropped = [w for w in windows if w.energy_joules is None]
    assert [w.doubt for w in dropped] == [Doubt.COUNTER_DECREASED]
    assert all(w.energy_joules is None or 0 < watts(w) < 300 for w in windows)
    assert bench.state["faults"] == {"counter decreased": 1}


def test_a_counter_that_starts_anew_with_the_driver_is_told_apart(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.failures, meter.offset_joules = [UninitializedError("not in this process")], -90_000.0
    windows = bench.run(4.0)
    assert tiled(windows)
    assert [w.doubt for w in windows if w.energy_joules is None] == [Doubt.DRIVER_RELOADED]


def test_an_uninitialised_library_is_initialised_and_no_energy_is_missed(bench: Bench) -> None:
    bench.meters[0].failures = [UninitializedError("not in this process")]
    windows = bench.run(3.0)
    assert bench.meters[0].reopened == 1
    assert tiled(windows) and doubts(windows) == {Doubt.NONE}


def test_a_timeout_skips_the_sample(bench: Bench) -> None:
    bench.meters[0].failures = [SkippedReadingError("timeout")] * 3
    windows = bench.run(3.0)
    assert bench.state["skipped"] == 3
    assert tiled(windows) and doubts(windows) == {Doubt.NONE}


def test_a_device_whose_every_reading_fails_is_lost_and_not_asked_at_full_speed(bench: Bench) -> None:
    bench.meters[0].failures = [SkippedReadingError("permission taken away")] * 10_000
    before = len(bench.meters[0].calls)
    bench.run(120.0)
    assert bench.state["source"] == "none" and bench.state["faults"]["device lost"] >= 1
    assert len(bench.meters[0].calls) - before < 100


def test_a_counter_frozen_while_busy_is_not_believed(bench: Bench) -> None:
    bench.meters[0].frozen = True
    windows = bench.run(3.0)
    assert tiled(windows)
    assert windows[0].doubt is Doubt.FROZEN and windows[0].energy_joules is None
    assert windows[0].duration_seconds < 1.0
    assert windows[-1].doubt is Doubt.INTEGRATED_POWER and watts(windows[-1]) == pytest.approx(100, rel=1e-6)
    assert bench.state["faults"]["counter frozen while busy"] == 1


def test_a_counter_that_stands_still_while_idle_is_believed(bench: Bench) -> None:
    bench.sampler.activity.idle(bench.clock())
    bench.run(0.5)
    bench.meters[0].frozen = True
    bench.run(0.9)
    bench.meters[0].frozen = False
    windows = bench.run(2.0)
    assert None not in {w.energy_joules for w in windows}


def test_a_late_reader_gets_one_long_window_for_the_totals(bench: Bench) -> None:
    before = bench.run(1.0)
    bench.clock.advance(3.0)
    windows = before + bench.run(2.0)
    assert tiled(windows)
    long = max(windows, key=lambda w: w.duration_seconds)
    assert long.doubt is Doubt.GAP and watts(long) == pytest.approx(100, rel=0.05)
    assert doubts(windows) == {Doubt.NONE, Doubt.GAP}


def test_a_late_reader_of_power_does_not_guess() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock, counting=False))
    bench.run(2.0)
    bench.clock.advance(3.0)
    windows = bench.run(2.0)
    assert [w.energy_joules for w in windows if w.doubt is Doubt.GAP] == [None]


def test_a_suspended_host_makes_the_window_doubtful(bench: Bench) -> None:
    bench.suspended.advance(3600.0)
    windows = bench.run(2.0)
    assert [w.doubt for w in windows].count(Doubt.CLOCK_SUSPENDED) == 1
    assert tiled(windows)


def test_a_change_of_scope_splits_the_window(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.identity = DeviceIdentity("GPU-fake", "Fake GPU", scope="module")
    meter.failures, meter.offset_joules = [UninitializedError("driver")], 55_000.0
    windows = bench.run(3.0)
    assert tiled(windows)
    assert [w.doubt for w in windows if w.energy_joules is None] == [Doubt.SCOPE_CHANGED]
    assert all(w.energy_joules is None or w.energy_joules < 100 for w in windows)


def test_a_device_that_turns_out_another_in_a_reading_is_that_from_then_on(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.identity = DeviceIdentity("GPU-fake", "Fake GPU", scope="module", power_basis="average power")
    windows = bench.run(3.0)
    assert [w.doubt for w in windows if w.energy_joules is None] == [Doubt.SCOPE_CHANGED]
    meter.counting = False
    assert tiled(windows + bench.run(1.0))
    assert (bench.state["scope"], bench.state["basis"]) == ("module", "average power")


def test_a_sleeping_engine_is_told_in_its_windows(bench: Bench) -> None:
    bench.sampler.activity.sleep(bench.clock() + 1.0)
    windows = bench.run(3.0)
    assert windows[0].doubt is Doubt.NONE and windows[-1].doubt is Doubt.SLEEPING
    assert watts(windows[-1]) == pytest.approx(100, rel=0.05)


def test_a_mig_device_is_shared_in_every_window() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock, identity=DeviceIdentity("GPU-fake", "Fake GPU", shared=True)))
    assert doubts(bench.run(5.0)) == {Doubt.SHARED}


def test_another_tenant_is_seen_while_our_engine_is_idle() -> None:
    bench = Bench()
    other = START_SECONDS + 14.0
    bench.add(FakeMeter(bench.clock, lambda t: 75 * t + 425 * (min(t, START_SECONDS + 4) + max(0.0, t - other))))
    activity = bench.sampler.activity
    activity.busy(START_SECONDS - 1)
    windows = bench.run(4.0)
    activity.idle(START_SECONDS + 4.0)
    windows += bench.run(16.0)
    shared = [w for w in windows if w.doubt is Doubt.SHARED]
    assert shared and min(w.begin_seconds for w in shared) == pytest.approx(other, abs=0.25)
    assert len(shared) > 50


def test_any_exception_is_counted_and_reading_goes_on(bench: Bench) -> None:
    bench.meters[0].failures = [ZeroDivisionError("ours")]
    windows = bench.run(6.0)
    assert bench.sampler.state()["exceptions"] == 1
    assert tiled(windows) and windows[-1].doubt is Doubt.NONE


def test_each_kind_of_event_is_logged_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm.llmco2"):
        for _ in range(4):
            bench.meters[0].failures = [DeviceLostError("gone")]
            bench.run(5.0)
    assert len([r for r in caplog.records if "gone" in r.getMessage()]) == 1


def test_a_thread_whose_meters_cannot_open_says_why_and_ends() -> None:
    def refuse() -> list[Any]:
        raise MeterUnavailableError("no library")

    sampler = EdgeSampler(refuse)
    sampler.start()
    assert sampler.answered.wait(10.0)
    assert sampler.stop(10.0)
    assert sampler.reason == "no library" and sampler.name == "none"


def test_a_thread_opens_reads_and_closes_and_is_started_again_after_a_crash() -> None:
    clock = FakeClock(START_SECONDS)
    meter = FakeMeter(clock, lambda t: 100.0 * t)
    threads: list[str] = []
    enough = threading.Event()

    def open_meters() -> list[Any]:
        threads.append(threading.current_thread().name)
        if len(threads) < 3:
            raise OSError("the driver is not up yet")
        return [meter]

    def sleep(seconds: float) -> None:
        clock.advance(max(seconds, 1e-3))
        if len(sampler.windows) > 20:
            enough.set()

    sampler = EdgeSampler(open_meters, Timing(clock, sleep, lambda: 0.0))
    sampler.start()
    assert enough.wait(60.0) and sampler.stop(10.0)
    assert threads == ["llmco2-sampler"] * 3
    assert sampler.state()["restarts"] == 2 and meter.closed
    assert {w.doubt for w in sampler.windows} == {Doubt.NONE}


def test_a_loop_that_fails_with_its_meters_open_says_with_what_until_it_goes_on_and_then_backs_off_anew() -> None:
    clock, failing, end = FakeClock(START_SECONDS), {50, 51, 52, 53, 100, 101}, threading.Event()
    called_at: list[float] = []
    said: dict[int, str | None] = {}

    def suspended() -> float:
        called_at.append(clock())
        if len(called_at) in failing:
            raise OSError("no such clock")
        return 0.0

    def sleep(seconds: float) -> None:
        said[len(called_at)] = sampler.state()["fault"]
        clock.advance(max(seconds, 1e-3))
        if len(called_at) > 150:
            end.set()

    sampler = EdgeSampler(lambda: [FakeMeter(clock)], Timing(clock, sleep, suspended))
    sampler.start()
    assert end.wait(60.0) and sampler.stop(10.0)
    assert {call: fault for call, fault in said.items() if fault} == dict.fromkeys(
        failing, "fails with OSError: no such clock"
    )
    assert [called_at[n] - called_at[n - 1] for n in (50, 51, 52, 100)] == pytest.approx([1.0, 2.0, 4.0, 1.0])


Event = Callable[[FakeMeter], None]
EVENTS: dict[str, Event] = {
    "lost": lambda m: m.failures.append(DeviceLostError("lost")),
    "uninitialised": lambda m: m.failures.append(UninitializedError("fork")),
    "skipped": lambda m: m.failures.append(SkippedReadingError("timeout")),
    "unsupported": lambda m: m.failures.append(NotSupportedError("no")),
    "crash": lambda m: m.failures.append(RuntimeError("ours")),
    "reset": lambda m: setattr(m, "offset_joules", m.offset_joules - 1e4),
    "no counter": lambda m: setattr(m, "counting", False),
    "counter": lambda m: setattr(m, "counting", True),
    "no power": lambda m: setattr(m, "powering", False),
    "power": lambda m: setattr(m, "powering", True),
    "frozen": lambda m: setattr(m, "frozen", True),
    "thawed": lambda m: setattr(m, "frozen", False),
}


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.floats(0.01, 3.0)), max_size=12),
    st.sampled_from([0.02, 0.1]),
    st.booleans(),
)
def test_whatever_happens_windows_tile_and_known_energy_is_near_the_truth(
    events: list[tuple[str, float]], tick: float, busy: bool
) -> None:
    bench = Bench()
    meter = bench.add(FakeMeter(bench.clock, lambda t: 100.0 * t, tick))
    if busy:
        bench.sampler.activity.busy(START_SECONDS)
    windows = bench.run(3.0)
    for name, seconds in events:
        EVENTS[name](meter)
        windows += bench.run(seconds)
    windows += bench.run(5.0)
    assert tiled(windows)
    json.dumps(bench.sampler.state(), allow_nan=False)
    for window in windows:
        if window.energy_joules is not None and window.doubt is Doubt.NONE and "frozen" not in dict(events):
            assert watts(window) * window.duration_seconds == pytest.approx(
                100 * window.duration_seconds, abs=3 * 100 * 0.02 + 6 * window.sigma_joules
            )
