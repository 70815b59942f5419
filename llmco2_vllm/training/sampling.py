"""Focused energy sampling: which steps to measure next. Which samples to keep is in core/coverage.py.

After LLMCO2 (arXiv:2410.02950, focused energy data sampling, itself after nn-Meter's adaptive sampling): start
coarse, then sample finer around the points where the predictor errs most and that requests are likely to visit.
Added here is a guard for what requests hardly ever visit. The rules, ours in their detail:

* error at a step that was not measured is a Gaussian-kernel mean of the errors around it;
* steps are drawn in proportion to error x traffic share, the traffic's own and new ones around bad points; each
  measured or drawn step settles most of what lies in its reach, so that draws spread out;
* reach shrinks as measurements grow in number, which makes the sampling finer;
* a fixed share of the measurements goes to steps far from every measured one, in the log of all counts, whatever the
  traffic; rounds too small for one of them add up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from llmco2_vllm.training.traffic import Candidate, FloatArray, Space, Traffic

Measured = Sequence[tuple[Candidate, float]]
# Standard deviation of the kernel in the unit cube of log features, for one measurement; see reach().
_FIRST_REACH = 0.5
_LEAST_REACH = 0.04
# Width within which steps count as alike where a traffic share is told: about an octave of requests or tokens.
_ALIKE = 0.1
# Weight of the prior error against one measurement at the same place.
_PRIOR_WEIGHT = 0.1
# Of the error near a measurement, what another one right there would not settle.
_SETTLED_RATIO = 0.9
# ... within this part of the reach.
_SETTLED_REACH = 0.5
# Of its share that a step keeps however often its neighbours are taken and however small the errors.
_LEAST_MASS = 1e-9
# Values per axis of the grid that coverage begins with.
_COARSE_LEVELS = 3
# Measurements whose neighbourhood is refined, and new steps around each.
_REFINED, _NEIGHBOURS = 16, 12


class Reason(StrEnum):
    """Why a step is to be measured."""

    FOCUS = "error x traffic"
    TRAFFIC = "traffic"
    COVERAGE = "coverage"


class Proposal(NamedTuple):
    """A step to measure.

    expected_error: absolute relative error expected there, a ratio; None before anything is measured.
    traffic_share: of the traffic's steps alike it, within about an octave of each count.
    distance: to the nearest measured or earlier proposed step, in the unit cube of log features; infinite for the
    first of all.
    """

    candidate: Candidate
    reason: Reason
    expected_error: float | None
    traffic_share: float
    distance: float


@dataclass(frozen=True)
class Sampling:
    """How rounds are drawn. coverage_share: of the measurements, least covered steps instead of the worst; 0 to 1.

    first_coverage_share: of the first round, when no error is known and the coarse grid is to be laid.
    """

    seed: int = 0
    coverage_share: float = 0.2
    first_coverage_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("coverage_share", "first_coverage_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; allowed: 0 to 1")

    def coverage_count(self, measured: int, count: int) -> int:
        """Of the next ``count`` measurements after ``measured``; rounds of any size add up to the share."""
        if not measured:
            return round(self.first_coverage_share * count)
        return int((measured + count) * self.coverage_share) - int(measured * self.coverage_share)


def propose(
    space: Space, traffic: Traffic, measured: Measured, count: int, sampling: Sampling | None = None
) -> list[Candidate]:
    """The next ``count`` steps to measure: distinct, valid, none measured before; fewer when no more are known."""
    return [proposal.candidate for proposal in proposals(space, traffic, measured, count, sampling)]


def proposals(
    space: Space, traffic: Traffic, measured: Measured, count: int, sampling: Sampling | None = None
) -> list[Proposal]:
    """As :func:`propose`, with the reason of each; those by error x traffic, or traffic, come first.

    measured: steps with the relative error of the current predictor, a ratio of either sign. It should be that of a
    predictor that did not learn from the step itself, left out or predicted before measuring, else it is flattered.
    """
    if count < 0:
        raise ValueError(f"count={count!r} is not possible; allowed: 0 or more")
    sampling = sampling or Sampling()
    known = _Known.of(space, measured)
    picked = _Picked(space, traffic, known)
    coverage = sampling.coverage_count(len(measured), count)
    picked.focus(count - coverage, sampling.seed)
    picked.cover(count - len(picked.proposals), sampling.seed)
    picked.focus(count - len(picked.proposals), sampling.seed)
    return picked.proposals


def reach(measurements: int) -> float:
    """Standard deviation of the kernel in the unit cube of log features, four axes: ~ the spacing of as many points."""
    return float(max(_LEAST_REACH, _FIRST_REACH * (measurements + 1) ** -0.25))


def expected_errors(space: Space, measured: Measured, candidates: Sequence[Candidate]) -> FloatArray:
    """Absolute relative error expected at each candidate, shape (n,), a ratio.

    Gaussian-kernel mean over the measured steps; where there is none within reach it is their mean. Ones, thus equal,
    while nothing is measured.
    """
    return _Known.of(space, measured).expected(space.coordinates(candidates))


class _Known(NamedTuple):
    """Measured steps: as given, their coordinates (n, 4) and absolute errors (n,)."""

    candidates: tuple[Candidate, ...]
    places: FloatArray
    errors: FloatArray

    @classmethod
    def of(cls, space: Space, measured: Measured) -> _Known:
        errors = np.abs(np.array([error for _, error in measured], dtype=np.float64))
        if not np.all(np.isfinite(errors)):
            raise ValueError("relative errors of measured steps must be finite")
        candidates = tuple(candidate for candidate, _ in measured)
        return cls(candidates, space.coordinates(candidates), errors)

    def expected(self, places: FloatArray) -> FloatArray:
        if not len(self.errors):
            return np.ones(len(places))
        weight = _kernel(places, self.places, reach(len(self.errors)))
        expected: FloatArray = (weight @ self.errors + _PRIOR_WEIGHT * self.errors.mean()) / (
            weight.sum(axis=1) + _PRIOR_WEIGHT
        )
        return expected


class _Picked:
    """The growing choice of one round."""

    def __init__(self, space: Space, traffic: Traffic, known: _Known) -> None:
        self.proposals: list[Proposal] = []
        self._space, self._traffic, self._known = space, traffic, known
        self._nodes = space.coordinates(traffic.candidates)

    def focus(self, count: int, seed: int) -> None:
        """Draw steps in proportion to the error x traffic around them that nothing measured speaks for yet."""
        draw = np.random.default_rng([seed, len(self._known.errors), len(self.proposals)])
        pool, shares = self._focus_pool(draw)
        places, width = self._space.coordinates(pool), reach(len(self._taken()))
        mass = shares * self._known.expected(places)
        mass *= 1 - _SETTLED_RATIO * _settled(places, self._taken(), _SETTLED_REACH * width)
        reason = Reason.FOCUS if len(self._known.errors) else Reason.TRAFFIC
        still = np.ones(len(pool), dtype=bool)
        for _ in range(min(count, len(pool))):
            mass = np.where(still, np.maximum(mass, _LEAST_MASS * shares), 0.0)
            best = int(draw.choice(len(mass), p=mass / mass.sum()))
            self._take(pool[best], reason)
            mass *= 1 - _SETTLED_RATIO * _settled(places, places[best : best + 1], _SETTLED_REACH * width)
            still[best] = False

    def cover(self, count: int, seed: int) -> None:
        """First round: a coarse grid, farthest step first. Then steps from all of the space, whatever the traffic.

        These are drawn in proportion to the volume around them that holds nothing measured, the fourth power of the
        distance, times the error expected there.
        """
        pool = sorted(set(self._space.grid(_COARSE_LEVELS)) - self._taken_candidates())
        first = not len(self._known.errors)
        if not first or len(pool) < count:
            pool = sorted({*pool, *Traffic.uniform(self._space, seed).candidates} - self._taken_candidates())
        places = self._space.coordinates(pool)
        expected = np.maximum(self._known.expected(places), _LEAST_MASS)
        draw = np.random.default_rng([seed, len(self._known.errors), len(self.proposals)])
        # Before anything is taken all are as far; begin with the largest step.
        distance = _nearest(places, self._taken()) if len(self._taken()) else places.sum(axis=1)
        for _ in range(min(count, int((distance > 0).sum()))):
            mass = expected * distance**4
            best = int(distance.argmax()) if first else int(draw.choice(len(mass), p=mass / mass.sum()))
            self._take(pool[best], Reason.COVERAGE)
            distance = np.minimum(distance, _nearest(places, places[best : best + 1]))
            if not distance.any():
                break

    def _focus_pool(self, draw: np.random.Generator) -> tuple[list[Candidate], FloatArray]:
        """The traffic's steps, and new ones around measured steps of large error x traffic; with a share of each."""
        shares = dict(zip(self._traffic.candidates, self._traffic.shares.tolist(), strict=True))
        if len(self._known.errors):
            width = reach(len(self._known.errors))
            dense = _kernel(self._known.places, self._nodes, width) @ self._traffic.shares
            worst = np.argsort(-self._known.errors * dense, kind="stable")[:_REFINED]
            around = [self._known.candidates[index] for index in worst]
            fresh = sorted(set(_neighbours(self._space, around, width, draw)) - shares.keys())
            near = _kernel(self._space.coordinates(fresh), self._nodes, _LEAST_REACH) @ self._traffic.shares
            shares |= dict(zip(fresh, (near / len(self._traffic.candidates)).tolist(), strict=True))
        taken = self._taken_candidates()
        pool = [candidate for candidate, share in shares.items() if share > 0 and candidate not in taken]
        return pool, np.array([shares[candidate] for candidate in pool])

    def _taken_candidates(self) -> set[Candidate]:
        return {*self._known.candidates, *(proposal.candidate for proposal in self.proposals)}

    def _taken(self) -> FloatArray:
        """Places of all measured and proposed steps."""
        proposed = self._space.coordinates([proposal.candidate for proposal in self.proposals])
        return np.concatenate([self._known.places, proposed])

    def _take(self, candidate: Candidate, reason: Reason) -> None:
        place = self._space.coordinates([candidate])
        expected = float(self._known.expected(place)[0]) if len(self._known.errors) else None
        near = _kernel(place, self._nodes, _ALIKE) @ self._traffic.shares
        distance = float(_nearest(place, self._taken())[0])
        self.proposals.append(Proposal(candidate, reason, expected, float(near[0]), distance))


def _neighbours(space: Space, around: Sequence[Candidate], width: float, draw: np.random.Generator) -> list[Candidate]:
    """New valid steps around others, _NEIGHBOURS each; a phase that is absent stays so."""
    counts = np.array(around, dtype=np.float64)
    limits = np.log1p([space.max_num_seqs, space.max_model_len] * 2)
    spread = draw.normal(size=(len(around), _NEIGHBOURS, 4)) * width * limits
    moved = np.maximum(1, np.rint(np.expm1(np.log1p(counts)[:, None] + spread))) * (counts > 0)[:, None]
    return [space.clip(Candidate(*(int(value) for value in row))) for row in moved.reshape(-1, 4)]


def _settled(places: FloatArray, others: FloatArray, width: float) -> FloatArray:
    """How far the others speak for each place: 1 at one of them, 0 far away; shape (n,)."""
    if not len(others):
        return np.zeros(len(places))
    nearest: FloatArray = _kernel(places, others, width).max(axis=1)
    return nearest


def _kernel(a: FloatArray, b: FloatArray, width: float) -> FloatArray:
    """Gaussian kernel between points, shape (len(a), len(b))."""
    kernel: FloatArray = np.exp(_squared(a, b) / (-2 * width * width))
    return kernel


def _squared(a: FloatArray, b: FloatArray) -> FloatArray:
    squared: FloatArray = np.square(a).sum(axis=1)[:, None] - 2 * a @ b.T + np.square(b).sum(axis=1)
    return np.maximum(squared, 0.0)


def _nearest(places: FloatArray, others: FloatArray) -> FloatArray:
    """Distance of each place to the nearest of the others, shape (n,); infinite when there is none."""
    if not len(others):
        return np.full(len(places), np.inf)
    distance: FloatArray = np.sqrt(_squared(places, others).min(axis=1))
    # Equal points must be at zero, which the expanded square misses by rounding.
    distance[distance < 1e-6] = 0.0
    return distance
