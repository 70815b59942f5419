"""Calibration of a predictor on one deployment: measure where error x traffic is largest, fit a ratio per phase.

The loop asks :mod:`sampling` what to measure next, has it measured, and gives back the error the prediction would have
had without that measurement. The fit has two unknowns, the log ratios of prefill and of decode, so that a few points
settle it: what it cannot explain stays as a spread, and becomes the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.scores import Scores, score
from llmco2_vllm.predictor.deployment import PhaseCalibration, Point, Ratio
from llmco2_vllm.training.sampling import Sampling, proposals
from llmco2_vllm.training.traffic import Candidate, Space, Traffic

FloatArray = NDArray[np.float64]
# Measures a step mix; None when it could not be.
Measure = Callable[[Candidate], Point | None]
# Prior of a phase's log ratio: 1, with a geometric standard deviation of 3. Steps on CPUs took 3 to 12 times as long as
# predicted (README), those on the GPUs a network was fitted on some percent.
PRIOR_LOG_STANDARD_DEVIATION = math.log(3.0)
# Log standard deviation of one point before any is known; counts as one more point in the spread.
POINT_LOG_STANDARD_DEVIATION = math.log(1.2)
_ITERATIONS, _CONVERGED = 50, 1e-12


@dataclass(frozen=True)
class Campaign:
    """What to measure. target_error: stop once the mean absolute relative error is at most this, a ratio; 0: never.

    The target counts once two rounds are measured: the first lays a coarse grid.
    """

    space: Space
    traffic: Traffic
    rounds: int = 4
    per_round: int = 6
    target_error: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)


class Progress(NamedTuple):
    """The state after one more attempt. round_number: from 1. attempts: measured or not. points: all so far."""

    round_number: int
    attempts: int
    points: tuple[Point, ...]


def calibrate(campaign: Campaign, measure: Measure) -> Iterator[Progress]:
    """Measure round after round, and say so after each attempt; leaving off in between loses nothing.

    A mix that cannot be measured is not asked for again.
    """
    points: list[Point] = []
    missed: list[Candidate] = []
    attempts = 0
    for number in range(1, campaign.rounds + 1):
        errors = left_out_errors(points).tolist()
        if number > 2 and errors and 0 < float(np.abs(errors).mean()) <= campaign.target_error:
            return
        measured = [*zip(map(candidate_of, points), errors, strict=True)]
        # No error to learn from: nothing draws the next ones near it.
        measured += [(candidate, 0.0) for candidate in missed]
        found = proposals(campaign.space, campaign.traffic, measured, campaign.per_round, campaign.sampling)
        for proposal in found:
            point = measure(proposal.candidate)
            attempts += 1
            if point is None:
                missed.append(proposal.candidate)
            else:
                points.append(point)
            yield Progress(number, attempts, tuple(points))
        if not found:
            return


def candidate_of(point: Point) -> Candidate:
    """The step a point was to be."""
    return Candidate(point.prefill_sequences, point.prefill_tokens, point.decode_sequences, point.context_tokens)


def fit_log_ratios(predicted: FloatArray, observed: FloatArray) -> FloatArray:
    """Log ratios of prefill and decode, shape (2,), that bring ``predicted``, shape (n, 2), to ``observed``, (n,).

    Least squares of log observed - log(sum of ratio x predicted), with a normal prior around 0 (a ratio of 1), by
    Gauss-Newton; the maximum a posteriori of Bishop 2006, eq. 3.55. A phase in which no point has at least half of its
    prediction keeps its 0.
    """
    logs = np.zeros(2)
    if not len(observed):
        return logs
    active = _dominant(predicted).any(axis=0)
    shrinkage = (POINT_LOG_STANDARD_DEVIATION / PRIOR_LOG_STANDARD_DEVIATION) ** 2
    for _ in range(_ITERATIONS):
        parts = predicted * np.exp(logs)
        residual = np.log(observed / parts.sum(axis=1))
        shares = (parts / parts.sum(axis=1, keepdims=True))[:, active]
        curvature = shares.T @ shares + shrinkage * np.eye(shares.shape[1])
        step = np.linalg.solve(curvature, shares.T @ residual - shrinkage * logs[active])
        logs[active] += step
        if np.abs(step).max() < _CONVERGED:
            break
    return logs


def _dominant(predicted: FloatArray) -> NDArray[np.bool_]:
    """Which phase has at least half of each point's prediction, shape (n, 2)."""
    dominant: NDArray[np.bool_] = predicted >= 0.5 * predicted.sum(axis=1, keepdims=True)
    return dominant


def fit_ratios(predicted: FloatArray, observed: FloatArray) -> tuple[Ratio | None, Ratio | None]:
    """Ratios of prefill and decode with the spread of their own points; None for a phase without any."""
    logs = fit_log_ratios(predicted, observed)
    residual = np.log(observed / (predicted * np.exp(logs)).sum(axis=1))
    found: list[Ratio | None] = []
    for phase, own in enumerate(_dominant(predicted).T):
        count = int(own.sum())
        prior = POINT_LOG_STANDARD_DEVIATION**2
        spread = math.sqrt((float(np.square(residual[own]).sum()) + prior) / (count + 1))
        ratio = Ratio(value=math.exp(logs[phase]), log_standard_deviation=spread, n=count) if count else None
        found.append(ratio)
    return found[0], found[1]


def time_table(points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
    """Seconds: predicted by phase, shape (n, 2), and observed, shape (n,)."""
    rows = [(p.predicted_prefill_seconds, p.predicted_decode_seconds, p.observed_seconds) for p in points]
    return _columns(rows)


def energy_table(points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
    """Joules of the points that were metered: predicted by phase, shape (m, 2), and observed, shape (m,)."""
    rows = [
        (p.predicted_prefill_joules, p.predicted_decode_joules, p.observed_joules)
        for p in points
        if p.observed_joules is not None and p.predicted_prefill_joules + p.predicted_decode_joules > 0
    ]
    return _columns(rows)


def _columns(rows: Sequence[Sequence[float]]) -> tuple[FloatArray, FloatArray]:
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 3)
    return table[:, :2], table[:, 2]


def fit(points: Sequence[Point]) -> tuple[PhaseCalibration | None, PhaseCalibration | None]:
    """The calibration of prefill and of decode; energy is left out where it was not metered."""
    times, energies = fit_ratios(*time_table(points)), fit_ratios(*energy_table(points))
    prefill, decode = (
        None if time is None else PhaseCalibration(time_ratio=time, energy_ratio=energy)
        for time, energy in zip(times, energies, strict=True)
    )
    return prefill, decode


def left_out_predictions(predicted: FloatArray, observed: FloatArray) -> FloatArray:
    """What a calibration on all other points predicts for each, shape (n,), in the unit of the table."""
    found = np.zeros(len(observed))
    for index in range(len(observed)):
        others = np.arange(len(observed)) != index
        found[index] = predicted[index] @ np.exp(fit_log_ratios(predicted[others], observed[others]))
    return found


def left_out_errors(points: Sequence[Point]) -> FloatArray:
    """Relative error of the step time of each point by a calibration on all others, shape (n,), a ratio."""
    predicted, observed = time_table(points)
    errors: FloatArray = left_out_predictions(predicted, observed) / observed - 1
    return errors


def scores(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Scores before and, each point left out, after the calibration: of ``time``, and of ``energy`` when metered."""
    found: dict[str, dict[str, Any]] = {}
    for name, (predicted, observed) in (("time", time_table(points)), ("energy", energy_table(points))):
        if len(observed):
            before = score(predicted.sum(axis=1), observed)
            after: Scores = score(left_out_predictions(predicted, observed), observed)
            found[name] = {"before": before.to_dict(), "after": after.to_dict()}
    return found
