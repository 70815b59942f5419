"""Windows tile time and conserve what the counter counted; their stated error is that of METERING section 3."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.meters.edges import CALLS_PER_SECOND, POLL_SECONDS
from llmco2_vllm.meters.windows import WindowRules
from llmco2_vllm.testing import FakeMeter
from tests.meters.virtual import START_SECONDS, Bench, Steps, tiled

ticks = st.sampled_from([0.004, 0.02, 0.033, 0.05, 0.1, 0.25])


@settings(deadline=None, max_examples=15)
@given(ticks, st.floats(0, 0.02), st.sampled_from([0.0002, 0.004, 0.02]), st.integers(0, 99))
def test_windows_tile_time_and_sum_to_the_counter(tick: float, phase: float, late: float, seed: int) -> None:
    bench = Bench(late, seed)
    meter = bench.add(FakeMeter(bench.clock, Steps(12.0, seed), tick, phase))
    windows = bench.run(8.0)
    assert len(windows) > 10
    assert tiled(windows)
    assert sums_of_a_counter([window.energy_joules for window in windows], meter, windows[0].begin_seconds)


def sums_of_a_counter(energies: list[float | None], meter: FakeMeter, begin: float) -> bool:
    """Whether every sum of energies from the first on leads from one value that the counter showed to another."""
    shown = np.unique([meter.counter(t) for t in np.arange(begin - 0.5, meter.clock() + 0.5, meter.tick_seconds / 2)])
    first = np.unique([meter.counter(t) for t in np.arange(begin - 0.3, begin + 0.3, meter.tick_seconds / 2)])
    sums = np.cumsum([np.nan if energy is None else energy for energy in energies])
    wanted = first[:, None] + sums
    after = np.searchsorted(shown, wanted - 1e-6).clip(max=len(shown) - 1)
    return bool((np.abs(shown[after] - wanted) < 1e-6).all(axis=1).any())


@pytest.mark.parametrize("tick", [0.02, 0.05, 0.1])
def test_the_error_of_a_window_is_that_of_its_edges(tick: float) -> None:
    """Sigma is P h / sqrt(6), and no less than what the true energy between the stated times differs by."""
    bench = Bench()
    energy = Steps(70.0)
    bench.add(FakeMeter(bench.clock, energy, tick, 0.0137))
    windows = bench.run(60.0)[60:]
    assert len(windows) > 300
    errors, sigmas, powers = [], [], []
    for window in windows:
        assert window.energy_joules is not None
        errors.append(window.energy_joules - (energy(window.end_seconds) - energy(window.begin_seconds)))
        sigmas.append(window.sigma_joules)
        powers.append(window.energy_joules / window.duration_seconds)
    assert np.median(sigmas) == pytest.approx(np.mean(powers) * POLL_SECONDS / 6**0.5, rel=0.05)
    assert np.std(errors) < 1.1 * np.median(sigmas)


def test_a_part_time_sensor_adds_its_own_error() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock))
    bench.use(rules=WindowRules(part_time_variation=0.2))
    window = bench.run(10.0)[-1]
    assert window.energy_joules is not None
    assert window.sigma_joules == pytest.approx(
        window.energy_joules * 0.2 * (0.1 / window.duration_seconds) ** 0.5, rel=0.05
    )


@pytest.mark.parametrize("length", [0.5, 1.0, 2.0])
def test_the_simulated_error_of_edge_aligned_spans_is_the_published_one(length: float) -> None:
    """METERING section 3, T = 100 ms: 0.20, 0.10, 0.05 percent at 0.5, 1 and 2 s; the tick line does better."""
    bench, energy = Bench(), Steps(130.0)
    bench.add(FakeMeter(bench.clock, energy, 0.1, 0.0137))
    windows = bench.run(120.0)[40:]
    count = round(length / 0.1)
    errors = []
    for i in range(0, len(windows) - count, count):
        span = windows[i : i + count]
        true = energy(span[-1].end_seconds) - energy(span[0].begin_seconds)
        errors.append(sum(w.energy_joules or 0.0 for w in span) / true - 1)
    published = POLL_SECONDS / length / 6**0.5
    assert 100 * published == pytest.approx({0.5: 0.20, 1.0: 0.10, 2.0: 0.05}[length], rel=0.25)
    assert 0.1 * published < np.std(errors) < 1.1 * published


def test_windows_are_shifted_by_the_lag_that_was_learnt() -> None:
    bench = Bench()
    lag, spans = 0.06, [(START_SECONDS + 5 + 4 * k, START_SECONDS + 7 + 4 * k) for k in range(8)]

    def energy(t: float) -> float:
        return 1e5 + 75 * t + sum(400 * (min(max(t, a), b) - a) for a, b in spans)

    bench.add(FakeMeter(bench.clock, energy, lag_seconds=lag))
    activity = bench.sampler.activity
    activity.idle(START_SECONDS)
    windows = []
    for begin, end in spans:
        windows += bench.run(begin - bench.clock())
        activity.busy(begin)
        windows += bench.run(end - bench.clock())
        activity.idle(end)
    assert bench.state["lag_seconds"] == pytest.approx(lag, abs=0.003)
    assert tiled(windows)
    assert [w.doubt for w in windows].count(Doubt.LAG_LEARNT) == 1
    for window in windows[-15:]:
        true = energy(window.end_seconds) - energy(window.begin_seconds)
        assert window.energy_joules == pytest.approx(true, abs=2.5)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(0.0, 7.0), min_size=3, max_size=6, unique=True), st.integers(0, 20))
def test_energy_between_is_additive(offsets: list[float], seed: int) -> None:
    bench = Bench(seed=seed)
    bench.add(FakeMeter(bench.clock, Steps(15.0, seed)))
    bench.add(FakeMeter(bench.clock, Steps(15.0, seed + 1), 0.05))
    bench.run(10.0)
    points = [START_SECONDS + 2.0 + offset for offset in sorted(offsets)]
    parts = [bench.sampler.energy_between(a, b) for a, b in pairwise(points)]
    whole = bench.sampler.energy_between(points[0], points[-1])
    assert whole is not None
    assert sum(part[0] for part in parts if part is not None) == pytest.approx(whole[0], abs=1e-6)
    one, other = (bench.sampler.energy_between(points[0], points[-1], device) for device in (0, 1))
    assert one is not None and other is not None
    assert one[0] + other[0] == pytest.approx(whole[0], abs=1e-6)


def test_energy_between_is_as_wrong_as_it_says() -> None:
    bench, energy = Bench(), Steps(70.0)
    bench.add(FakeMeter(bench.clock, energy))
    bench.run(60.0)
    generator = np.random.default_rng(1)
    scores = []
    for begin in generator.uniform(START_SECONDS + 5, START_SECONDS + 55, 300):
        end = begin + generator.uniform(0.05, 3.0)
        answer = bench.sampler.energy_between(begin, end)
        assert answer is not None
        scores.append((answer[0] - (energy(end) - energy(begin))) / answer[1])
    assert 0.3 < np.std(scores) < 1.5


def test_energy_that_was_not_metered_is_not_known() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock))
    bench.run(3.0)
    assert bench.sampler.energy_between(START_SECONDS - 1, START_SECONDS + 1) is None
    assert bench.sampler.energy_between(START_SECONDS + 1, START_SECONDS + 9) is None
    with pytest.raises(ValueError, match="lies before"):
        bench.sampler.energy_between(START_SECONDS + 2, START_SECONDS + 1)


@pytest.mark.parametrize(("devices", "seconds"), [(1, 0.1), (2, 0.1), (4, 0.2), (8, 0.4), (16, 0.5)])
def test_many_devices_make_longer_windows(devices: int, seconds: float) -> None:
    bench = Bench()
    for _ in range(devices):
        bench.add(FakeMeter(bench.clock))
    windows = [w for w in bench.run(20.0) if w.begin_seconds > START_SECONDS + 10]
    assert {w.device for w in windows} == set(range(devices))
    assert np.mean([w.duration_seconds for w in windows]) == pytest.approx(seconds, rel=0.02)


@settings(deadline=None, max_examples=10)
@given(ticks, st.sampled_from([0.0001, 0.003]), st.booleans())
def test_no_device_is_called_more_often_than_allowed(tick: float, late: float, frozen: bool) -> None:
    bench = Bench(late)
    meter = bench.add(FakeMeter(bench.clock, tick_seconds=tick))
    bench.run(4.0)
    meter.frozen = frozen
    bench.run(4.0)
    for i, begin in enumerate(meter.calls):
        assert sum(t < begin + 0.999 for t in meter.calls[i : i + 70]) <= CALLS_PER_SECOND + 2


def test_the_counter_is_checked_against_its_own_power() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock, lambda t: 75 * t, power_gain=1.75))
    bench.run(3.0)
    assert bench.state["cross_check_ratio"] is None
    bench.run(5.0)
    assert bench.state["cross_check_ratio"] == pytest.approx(1 / 1.75, abs=0.02)
