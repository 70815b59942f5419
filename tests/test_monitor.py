"""StepMonitor: tickets in order, time tiled, totals that agree with the ledgers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate, Predictor
from llmco2_vllm.core.hardware import DeviceSpec, Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.monitor import PACE_SECONDS, StepMonitor, empty_batch_costs_nothing
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.gnn import GnnPredictor
from llmco2_vllm.predictor.predict import RooflinePredictor
from llmco2_vllm.testing import ConstantPredictor, FakeClock

LLAMA_8B = ModelSpec(32, 4096, 32, 8, 128, 14336, 128256)


def roofline() -> RooflinePredictor:
    return RooflinePredictor(LLAMA_8B, device_by_name("h100-sxm"), Topology(), RooflineCalibration.load())


CPU = DeviceSpec("cpu", "cpu", {"fp32": 3e11, "bf16": 3e11, "fp16": 3e11}, 2e10, 16e9, 20.0, 10.0, cores=2)
EXPERTS = ModelSpec(
    48, 2048, 32, 4, 128, 6144, 151936, experts=128, experts_per_token=8, moe_intermediate=768, moe_layers=48
)
CALIBRATION = RooflineCalibration.load()
PREDICTORS = {
    "dense on a GPU": roofline(),
    "sliding window": RooflinePredictor(
        replace(LLAMA_8B, sliding_window=1024, sliding_layers=26), device_by_name("h100-sxm"), Topology(), CALIBRATION
    ),
    "experts": RooflinePredictor(EXPERTS, device_by_name("b200"), Topology(4), CALIBRATION),
    "on a CPU": RooflinePredictor(LLAMA_8B, CPU, Topology(), CALIBRATION),
}
LEARNED = GnnPredictor(LLAMA_8B, device_by_name("h100-sxm"), Topology(), Bundle.load())


def start(monitor: StepMonitor, contexts: list[int]) -> None:
    """Requests of the given contexts, all in steady decode."""
    for i, context in enumerate(contexts):
        monitor.book.join(f"r{i}", context, 0, 0)
        monitor.book.enter(f"r{i}")


def spent(monitor: StepMonitor) -> float:
    for charge in monitor.book.open.values():
        monitor.book.settle(charge)
    return sum(charge.decode_joules for charge in monitor.book.open.values())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 3))
def test_windows_tile_time_whatever_the_depth(pauses: list[int], depth: int) -> None:
    clock = FakeClock()
    monitor = StepMonitor(ConstantPredictor(), clock)
    start(monitor, [10])
    keys: list[object] = []
    windows = []
    for pause in pauses:
        keys.append(object())
        monitor.begin_steady(keys[-1])
        clock.advance(pause)
        if len(keys) >= depth:
            windows.append(monitor.end(keys.pop(0)))
    windows += [monitor.end(key) for key in keys]
    assert all(window is not None for window in windows)
    for earlier, later in pairwise(windows):
        assert earlier is not None and later is not None
        assert earlier.end_seconds <= later.begin_seconds
    assert monitor.totals.step_seconds == pytest.approx(sum(pauses))
    assert monitor.totals.lost_tickets == monitor.open_tickets == 0


def test_an_output_without_a_ticket_is_counted_and_harms_nothing() -> None:
    monitor = StepMonitor(ConstantPredictor(), FakeClock())
    start(monitor, [10])
    known = object()
    monitor.begin_steady(known)
    assert monitor.end(object()) is None
    assert monitor.end(known) is not None
    assert monitor.totals.lost_tickets == 1


def test_tickets_passed_over_are_lost_and_the_order_holds_again() -> None:
    monitor = StepMonitor(ConstantPredictor(), FakeClock())
    start(monitor, [10])
    keys = [object() for _ in range(3)]
    for key in keys:
        monitor.begin_steady(key)
    assert monitor.end(keys[1]) is not None
    assert monitor.totals.lost_tickets == 1
    assert monitor.end(keys[2]) is not None
    assert monitor.open_tickets == 0


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=20), st.integers(1, 300))
def test_what_steady_steps_cost_is_what_their_requests_pay(contexts: list[int], count: int) -> None:
    monitor = StepMonitor(roofline())
    start(monitor, contexts)
    for _ in range(count):
        monitor.begin_steady(object())
    assert monitor.totals.steps == count
    assert monitor.totals.decode_tokens == count * len(contexts)
    assert spent(monitor) == pytest.approx(monitor.totals.decode_joules, rel=1e-9)


@pytest.mark.parametrize("name", ["dense on a GPU", "sliding window", "experts", "on a CPU"])
@given(st.lists(st.integers(1, 20000), min_size=1, max_size=20), st.integers(1, 400))
def test_rates_that_hold_for_a_while_err_by_less_than_a_thousandth(name: str, contexts: list[int], count: int) -> None:
    held, exact = held_and_exact_joules(PREDICTORS[name], contexts, count)
    assert held == pytest.approx(exact, rel=1e-3)


@given(st.lists(st.integers(64, 20000), min_size=1, max_size=20), st.integers(1, 200))
def test_the_networks_rates_that_hold_for_a_while_err_by_less_than_a_half_percent(
    contexts: list[int], count: int
) -> None:
    held, exact = held_and_exact_joules(LEARNED, contexts, count)
    assert held == pytest.approx(exact, rel=5e-3)


def held_and_exact_joules(predictor: Predictor, contexts: list[int], count: int) -> tuple[float, float]:
    """Energy of ``count`` steady steps as the monitor books them, and with every step priced."""
    monitor = StepMonitor(predictor)
    start(monitor, contexts)
    exact = 0.0
    for step in range(count):
        exact += predictor.estimate(shape_of([context + step for context in contexts])).energy_joules
        monitor.begin_steady(object())
    return monitor.totals.decode_joules, exact


def shape_of(contexts: list[int]) -> BatchShape:
    monitor = StepMonitor(ConstantPredictor())
    start(monitor, contexts)
    return monitor.book.shape([])


def test_the_predictor_is_asked_seldom_in_steady_decode() -> None:
    class Counting(ConstantPredictor):
        asked = 0

        def estimate(self, batch: BatchShape) -> Estimate:
            type(self).asked += 1
            return super().estimate(batch)

    monitor = StepMonitor(Counting())
    start(monitor, [10_000] * 4)
    for _ in range(1000):
        monitor.begin_steady(object())
    assert 9 <= Counting.asked <= 10


def test_an_aborted_request_is_booked_apart() -> None:
    monitor = StepMonitor(ConstantPredictor())
    start(monitor, [10, 20])
    monitor.begin_steady(object())
    gone = monitor.finish("r0")
    assert gone is not None
    monitor.conclude(gone, 0.0)
    assert gone.decode_joules > 0
    assert monitor.totals.aborted_joules == pytest.approx(gone.decode_joules)
    assert (monitor.totals.aborted_requests, monitor.totals.finished_requests) == (1, 0)


def test_totals_survive_a_reset_and_ledgers_do_not() -> None:
    monitor = StepMonitor(ConstantPredictor())
    start(monitor, [10])
    monitor.begin_steady(object())
    joules = monitor.totals.decode_joules
    monitor.reset()
    assert monitor.totals.decode_joules == joules > 0
    assert not monitor.book.open and monitor.open_tickets == 0


def test_the_self_check_refuses_a_predictor_that_prices_nothing_above_zero() -> None:
    class Broken(ConstantPredictor):
        def estimate(self, batch: BatchShape) -> Estimate:
            return super().estimate(batch)._replace(decode_joules=1.0)

    assert empty_batch_costs_nothing(ConstantPredictor())
    assert empty_batch_costs_nothing(roofline())
    assert not empty_batch_costs_nothing(Broken())


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=80), st.integers(1, 3))
def test_the_pace_is_recent_busy_time_over_the_joules_of_closed_steps(pauses: list[float], depth: int) -> None:
    clock = FakeClock()
    monitor = StepMonitor(ConstantPredictor(), clock)
    start(monitor, [10, 20])
    keys: list[object] = []
    past = [(0.0, 0.0)]
    assert monitor.seconds_per_joule == 0.0, "not known"
    for pause in pauses:
        keys.append(object())
        monitor.begin_steady(keys[-1])
        clock.advance(pause)
        if len(keys) < depth:
            continue
        monitor.end(keys.pop(0))
        totals = monitor.totals
        still_open = sum(ticket.estimate.energy_joules for ticket in monitor._tickets)
        now = totals.step_seconds, totals.decode_joules - still_open
        since = [then for then in past if now[0] - then[0] >= PACE_SECONDS] or past[:1]
        paces = [(now[0] - seconds) / (now[1] - joules) for seconds, joules in since]
        found = monitor.seconds_per_joule
        assert any(found == pytest.approx(pace) for pace in paces), "of the whole time, or of 30 s and more"
        past.append(now)


def test_the_pace_forgets_what_is_long_ago() -> None:
    clock = FakeClock()
    monitor = StepMonitor(ConstantPredictor(), clock)
    start(monitor, [10])
    past = []
    for seconds in [0.1] * 1000 + [0.4] * 400:
        key = object()
        monitor.begin_steady(key)
        clock.advance(seconds)
        monitor.end(key)
        past.append(monitor.totals.decode_joules)
        pace = monitor.seconds_per_joule
    # The last 75 to 150 steps, 0.4 s each.
    assert 0.4 * 150 / (past[-1] - past[-151]) <= pace * 1.01
    assert pace <= 1.01 * 0.4 * 75 / (past[-1] - past[-76]) * 1.1
