"""A counter that froze is believed again once it counts as it should, and not before."""

from __future__ import annotations

import pytest

from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.meters.base import UninitializedError
from llmco2_vllm.meters.trial import TRIAL_SECONDS
from llmco2_vllm.testing import FakeMeter
from tests.meters.virtual import START_SECONDS, Bench, tiled


def frozen(powering: bool = True) -> Bench:
    """A device of 100 W on an engine that is busy, whose counter has frozen."""
    bench = Bench()
    meter = bench.add(FakeMeter(bench.clock, lambda t: 100.0 * t, powering=powering))
    bench.sampler.activity.busy(START_SECONDS - 10)
    bench.run(5.0)
    meter.frozen = True
    bench.run(30.0)
    return bench


@pytest.fixture
def bench() -> Bench:
    """The same, its power known."""
    return frozen()


def trusted(windows: list[MeterWindow]) -> list[MeterWindow]:
    return [window for window in windows if window.doubt is Doubt.NONE]


def watts(window: MeterWindow) -> float:
    assert window.energy_joules is not None
    return window.energy_joules / window.duration_seconds


@pytest.mark.parametrize("powering", [True, False])
def test_a_counter_that_counts_again_is_believed_after_its_trial_and_the_fault_stays_counted(
    powering: bool,
) -> None:
    bench = frozen(powering)
    thawed = bench.clock()
    bench.meters[0].frozen = False
    windows = bench.run(TRIAL_SECONDS + 3.0)
    assert tiled(windows) and bench.state["source"] == "counter"
    first = trusted(windows)[0]
    assert TRIAL_SECONDS <= first.begin_seconds - thawed < TRIAL_SECONDS + 2.0
    after = [w for w in windows if w.begin_seconds >= first.begin_seconds]
    assert after == trusted(windows) and len(after) > 5
    # What the counter made up for when it thawed is in no window: that was integrated, or not known.
    assert all(watts(w) == pytest.approx(100.0, rel=0.25) for w in windows if w.energy_joules is not None)
    assert bench.state["faults"]["counter frozen while busy"] == 1


def test_between_the_last_integral_and_the_first_edge_the_counter_is_still_the_one_that_froze(bench: Bench) -> None:
    bench.meters[0].frozen = False
    windows = bench.run(TRIAL_SECONDS + 3.0)
    assert [w.doubt for w in windows if w.energy_joules is None] == [Doubt.FROZEN]


@pytest.mark.parametrize("gain", [0.3, 3.0])
def test_a_counter_that_disagrees_with_power_is_not_believed(bench: Bench, gain: float) -> None:
    bench.meters[0].power_gain, bench.meters[0].frozen = gain, False
    windows = bench.run(60.0)
    assert not trusted(windows) and windows[-1].doubt is Doubt.INTEGRATED_POWER


@pytest.mark.parametrize("power_watts", [10.0, 1000.0])
def test_a_counter_that_counts_what_the_device_never_drew_is_not_believed_where_power_is_not_known(
    power_watts: float,
) -> None:
    bench = frozen(powering=False)
    meter = bench.meters[0]
    meter.energy, meter.frozen = (lambda t: 1e6 + power_watts * t), False
    windows = bench.run(60.0)
    assert not trusted(windows) and {w.energy_joules for w in windows[1:]} == {None}


@pytest.mark.parametrize("powering", [True, False])
def test_a_counter_that_stands_still_in_its_trial_begins_it_anew(powering: bool) -> None:
    bench = frozen(powering)
    meter = bench.meters[0]
    windows = []
    for _ in range(10):
        meter.frozen = False
        windows += bench.run(TRIAL_SECONDS - 1.5)
        meter.frozen = True
        windows += bench.run(1.5 if powering else 3.0)
    assert tiled(windows) and not trusted(windows)
    assert bench.state["faults"]["counter frozen while busy"] == 1


def test_a_counter_that_falls_now_and_then_is_not_believed(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.frozen = False
    windows = []
    for _ in range(10):
        meter.offset_joules -= 20.0
        windows += bench.run(TRIAL_SECONDS - 1.5)
    assert tiled(windows) and not trusted(windows)


def test_a_counter_that_froze_again_has_a_longer_trial(bench: Bench) -> None:
    meter = bench.meters[0]
    for trial in (1, 2, 3):
        thawed, meter.frozen = bench.clock(), False
        windows = bench.run(30.0)
        begin = trusted(windows)[0].begin_seconds - thawed
        assert trial * TRIAL_SECONDS <= begin < trial * TRIAL_SECONDS + 1.0
        assert bench.state["faults"]["counter frozen while busy"] == trial
        meter.frozen = True
        bench.run(3.0)


def test_a_counter_that_came_back_from_zero_is_believed(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.offset_joules, meter.frozen = -90_000.0, False
    windows = bench.run(TRIAL_SECONDS + 3.0)
    assert trusted(windows) and bench.state["source"] == "counter"


def test_a_device_that_was_opened_anew_has_no_trial(bench: Bench) -> None:
    meter = bench.meters[0]
    meter.failures, meter.frozen = [UninitializedError("fork")], False
    assert len(trusted(bench.run(3.0))) > 15
