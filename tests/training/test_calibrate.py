"""Calibration on a simulated truth: the loop finds the ratios, says how well, and predicts better than before."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.focused_sampling import SPACE, roofline_predictor
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.predictor.deployment import CalibratedPredictor, Calibration, Identity, Point
from llmco2_vllm.testing import ConstantPredictor
from llmco2_vllm.training.calibrate import Campaign, Measure, calibrate, candidate_of, fit, left_out_errors, scores
from llmco2_vllm.training.traffic import Candidate, Traffic

CAMPAIGN = Campaign(SPACE, Traffic.uniform(SPACE), rounds=3, per_round=8)
HERE = Identity(
    architecture="a", dtype="bf16", weight_bytes=2, device="cpu", tensor_parallel=1, pipeline_parallel=1, expert_ranks=1
)


class Truth:
    """A deployment whose steps take and draw fixed times what is predicted, by phase, and a little more or less."""

    def __init__(
        self, time: tuple[float, float], energy: tuple[float, float] | None = None, noise: float = 0.0
    ) -> None:
        self.time, self.energy, self.noise = time, energy, noise
        self.predictor: Predictor = roofline_predictor()
        self.asked: list[Candidate] = []
        self.draw = np.random.default_rng(0)

    def __call__(self, candidate: Candidate) -> Point:
        self.asked.append(candidate)
        estimate = self.predictor.estimate(candidate.batch)
        joules = np.array([estimate.prefill_joules, estimate.decode_joules])
        seconds = estimate.duration_seconds * joules / joules.sum()
        factor = math.exp(self.noise * self.draw.normal())
        return Point(
            **candidate._asdict(),
            steps=1,
            predicted_prefill_seconds=seconds[0],
            predicted_decode_seconds=seconds[1],
            observed_seconds=factor * float(seconds @ self.time),
            predicted_prefill_joules=joules[0],
            predicted_decode_joules=joules[1],
            observed_joules=None if self.energy is None else factor * float(joules @ self.energy),
        )


def measured(truth: Measure, campaign: Campaign = CAMPAIGN) -> tuple[Point, ...]:
    return list(calibrate(campaign, truth))[-1].points


def ratios(points: tuple[Point, ...], name: str) -> list[float | None]:
    found = [getattr(phase, name) for phase in fit(points) if phase is not None]
    return [None if ratio is None else ratio.value for ratio in found]


true_ratios = st.tuples(st.floats(0.1, 12), st.floats(0.1, 12))


@settings(deadline=None, max_examples=20)
@given(true_ratios, true_ratios)
def test_the_loop_recovers_the_ratios_of_time_and_of_energy(
    time: tuple[float, float], energy: tuple[float, float]
) -> None:
    points = measured(Truth(time, energy))
    assert ratios(points, "time_ratio") == pytest.approx(time, rel=0.03)
    assert ratios(points, "energy_ratio") == pytest.approx(energy, rel=0.03)


@pytest.mark.parametrize("predictor", [ConstantPredictor(), roofline_predictor()], ids=lambda p: p.name)
def test_what_is_calibrated_errs_less_on_steps_it_never_saw(predictor: Predictor) -> None:
    truth = Truth((3.0, 0.4), (2.0, 0.7), noise=0.1)
    truth.predictor = predictor
    prefill, decode = fit(measured(truth))
    calibration = Calibration(
        schema="llmco2-calibration/1",
        created="now",
        predictor=predictor.name,
        deployment=HERE,
        energy="measured",
        prefill=prefill,
        decode=decode,
    )
    better = CalibratedPredictor(predictor, calibration)
    unseen = [item for item in Traffic.uniform(SPACE, seed=9, nodes=200).candidates if item not in truth.asked]
    errors: dict[str, list[float]] = {"before": [], "after": []}
    inside = 0
    for candidate in unseen:
        point, told = truth(candidate), better.estimate(candidate.batch)
        assert point.observed_joules is not None
        plain = predictor.estimate(candidate.batch)
        for name, estimate in (("before", plain), ("after", told)):
            errors[name].append(abs(estimate.duration_seconds / point.observed_seconds - 1))
            errors[name].append(abs(estimate.energy_joules / point.observed_joules - 1))
        low, high = told.lower_ratio * told.energy_joules, told.upper_ratio * told.energy_joules
        inside += low <= point.observed_joules <= high
    assert np.mean(errors["after"]) < 0.15 < np.mean(errors["before"])
    assert inside / len(unseen) > 0.85


def test_without_a_meter_energy_is_left_out_and_not_zero() -> None:
    points = measured(Truth((2.0, 3.0)))
    assert ratios(points, "energy_ratio") == [None, None]
    assert scores(points).keys() == {"time"}
    assert scores(measured(Truth((2.0, 3.0), (1.0, 1.0)))).keys() == {"time", "energy"}


@given(st.floats(0.05, 20), st.integers(1, 12))
def test_few_points_are_drawn_towards_one_and_more_of_them_less(ratio: float, count: int) -> None:
    truth = Truth((ratio, 1.0))
    point = truth(Candidate(1, 100, 0, 0))
    (first, nothing), (more, _) = fit((point,) * count), fit((point,) * (count + 1))
    assert first is not None and more is not None and nothing is None
    low, high = sorted((1.0, ratio))
    assert low * (1 - 1e-9) <= first.time_ratio.value <= high * (1 + 1e-9)
    assert abs(math.log(ratio / more.time_ratio.value)) <= abs(math.log(ratio / first.time_ratio.value)) + 1e-12
    assert first.time_ratio.n == count


def test_nothing_measured_is_nothing_calibrated() -> None:
    assert fit(()) == (None, None)
    assert scores(()) == {}


def test_the_spread_is_that_of_the_points() -> None:
    draws = Truth((2.0, 2.0), noise=0.3)
    _, decode = fit(tuple(draws(Candidate(0, 0, 1 + n % 64, 100)) for n in range(400)))
    assert decode is not None
    assert decode.time_ratio.log_standard_deviation == pytest.approx(0.3, rel=0.1)


def test_no_step_is_measured_twice_and_each_attempt_is_told() -> None:
    truth = Truth((2.0, 3.0))
    states = list(calibrate(CAMPAIGN, truth))
    assert [state.attempts for state in states] == list(range(1, 25))
    assert [len(state.points) for state in states] == list(range(1, 25))
    assert {state.round_number for state in states} == {1, 2, 3}
    assert len(set(truth.asked)) == 24
    assert [candidate_of(point) for point in states[-1].points] == truth.asked


def test_what_cannot_be_measured_is_not_asked_for_again() -> None:
    truth = Truth((2.0, 3.0))

    def half(candidate: Candidate) -> Point | None:
        point = truth(candidate)
        return point if candidate.decode_sequences else None

    points = measured(half)
    assert len(set(truth.asked)) == 24
    assert all(point.decode_sequences for point in points)
    assert list(calibrate(CAMPAIGN, lambda candidate: None))[-1].points == ()


def test_it_stops_at_the_error_that_is_good_enough() -> None:
    def attempts(**changes: Any) -> int:
        campaign = replace(CAMPAIGN, rounds=6, **changes)
        return list(calibrate(campaign, Truth((2.0, 3.0))))[-1].attempts

    assert attempts(target_error=0.1) == 16
    assert attempts(target_error=0.0) == 48


def test_the_error_of_a_point_does_not_know_the_point() -> None:
    truth = Truth((2.0, 3.0))
    points = (truth(Candidate(1, 100, 0, 0)), truth(Candidate(0, 0, 4, 100)))
    # Each is the only one of its phase: left out, its phase is as predicted.
    assert left_out_errors(points) == pytest.approx([1 / 2 - 1, 1 / 3 - 1])
