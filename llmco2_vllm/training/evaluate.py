"""Evaluation: predictions of observations that were held out, with 90 % intervals, and their scores.

Intervals are split-conformal (Vovk et al., 2005; Lei et al., JASA 2018) on log(measured / predicted): for rows that
are exchangeable with the calibration rows they hold the truth with at least the nominal probability. Inside each
training fold whole groups are held out once more, of the same kind as those of the outer split, so an interval is
learned from errors of the kind it is for: an unseen architecture from architectures that were not seen. A training
fold with one kind of device tells nothing about another, so there the spread that the network's own priors give the
device is added.

Importing this module does not import torch; :func:`cross_validate` and what it calls do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.scores import NORMAL_90, Scores, score
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.splits import Fold, Group

if TYPE_CHECKING:
    from llmco2_vllm.training.fit import Recipe, Table
    from llmco2_vllm.training.kernel_times import KernelTimes
    from llmco2_vllm.training.predict import Trained

FloatArray = NDArray[np.float64]
Tick = Callable[[], None]

COVERAGE = 0.9
INNER_FOLDS = 3
# Fewer errors than this of one regime say too little about their tenth largest; those of all regimes are pooled.
LEAST_ERRORS = 40
PHASES = ("decode", "mixed")
# Of steps that prefill, for a row to be of the mixed phase.
MIXED_SHARE = 0.25


class Split(NamedTuple):
    """Folds, and the groups by which the training rows of each are split again.

    new_device: whether the rows to predict are of devices that were not seen.
    """

    name: str
    folds: tuple[Fold, ...]
    group: Group
    new_device: bool = False

    @property
    def fits(self) -> int:
        """Networks that are fitted to evaluate the split."""
        return len(self.folds) * (1 + INNER_FOLDS)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted mean steps of observations, arrays of shape (n,).

    step_seconds, power_watts (of one device), energy_joules (of all devices). lower_ratio, upper_ratio: 90 % interval
    of the energy, as factors on it. folds: the fold each observation was held out in.
    """

    observations: tuple[Observation, ...]
    folds: tuple[str, ...]
    step_seconds: FloatArray
    power_watts: FloatArray
    energy_joules: FloatArray
    lower_ratio: FloatArray
    upper_ratio: FloatArray

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def measured_joules(self) -> FloatArray:
        """Measured step energy, shape (n,); nan where there is none."""
        return _measured(self.observations)

    def scores(self, chosen: NDArray[np.bool_] | None = None) -> Scores:
        """Scores of step energy over all observations, or those ``chosen``."""
        mask = np.ones(len(self), dtype=np.bool_) if chosen is None else chosen
        joules = self.energy_joules[mask]
        interval = (joules * self.lower_ratio[mask], joules * self.upper_ratio[mask])
        return score(joules, self.measured_joules[mask], interval)

    def by(self, key: Callable[[Observation], str]) -> dict[str, Scores]:
        """Scores of each group of observations that share a key, keys sorted."""
        names = np.array([key(o) for o in self.observations])
        return {str(name): self.scores(names == name) for name in np.unique(names)}


def phase(observation: Observation) -> str:
    """``mixed`` when at least a quarter of the steps prefill too, else ``decode``."""
    share = sum(share for share, batch in observation.step_mix if batch.prefill.tokens)
    return PHASES[share >= MIXED_SHARE]


def conformal_error(errors: FloatArray) -> float:
    """The error that at least nine of ten new ones do not exceed: the ceil(0.9 (n + 1))-th smallest of ``errors``.

    errors: absolute, shape (n,). With fewer than nine the largest, which then promises less. ValueError for none.
    """
    if not len(errors):
        raise ValueError("no errors to learn an interval from")
    rank = min(math.ceil(COVERAGE * (len(errors) + 1)), len(errors))
    return float(np.sort(np.abs(errors))[rank - 1])


def intervals(observations: Sequence[Observation], log_errors: FloatArray) -> dict[str, Interval]:
    """Intervals by phase from log(measured / predicted) of held-out rows; phases with few rows share one."""
    phases = np.array([phase(o) for o in observations])
    found = {}
    for name in PHASES:
        own = log_errors[phases == name]
        found[name] = as_interval(conformal_error(own if len(own) >= LEAST_ERRORS else log_errors))
    return found


def as_interval(log_error: float) -> Interval:
    """Factors of an interval that reaches ``log_error`` to both sides."""
    return Interval(math.exp(-log_error), math.exp(log_error))


def widened(interval: Interval, deviation: float) -> Interval:
    """An interval with an independent, normal log error of standard deviation ``deviation`` added."""
    return as_interval(math.hypot(math.log(interval.upper_ratio), NORMAL_90 * deviation))


def inner_folds(
    observations: Sequence[Observation], rows: Sequence[int], group: Group, folds: int = INNER_FOLDS
) -> list[tuple[int, ...]]:
    """``rows`` in parts of about equal size, whole groups in one part; the largest groups are placed first."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row in rows:
        groups[group(observations[row])].append(row)
    if len(groups) < 2:
        raise ValueError("one group of observations cannot be split again")
    parts: list[list[int]] = [[] for _ in range(min(folds, len(groups)))]
    for members in sorted(groups.values(), key=lambda members: (-len(members), members)):
        min(parts, key=len).extend(members)
    return [tuple(sorted(part)) for part in parts]


def cross_validate(
    observations: Sequence[Observation],
    split: Split,
    recipe: Recipe,
    tick: Tick = lambda: None,
    kernel_times: Sequence[KernelTimes] = (),
) -> Predictions:
    """Predict the held-out rows of every fold by a network that never saw them.

    Stalled and multimodal rows are predicted but not learned from, nor are kernel times of layers or devices that
    only held-out rows have. ``tick`` is called after each training step, ``split.fits`` x ``recipe.steps`` times.
    """
    from llmco2_vllm.training.fit import Table, devices_of

    table = Table(observations, devices_of(observations), kernel_times)
    return joined([_held_out(table, fold, split, (recipe, tick)) for fold in split.folds])


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several folds one after the other."""
    columns = ("step_seconds", "power_watts", "energy_joules", "lower_ratio", "upper_ratio")
    return Predictions(
        tuple(o for part in parts for o in part.observations),
        tuple(name for part in parts for name in part.folds),
        *(np.concatenate([getattr(part, column) for part in parts]) for column in columns),
    )


Fitting = tuple["Recipe", Tick]


def out_of_fold(table: Table, rows: Sequence[int], scored: Sequence[int], group: Group, fitting: Fitting) -> FloatArray:
    """log(measured / predicted) energy of the ``scored`` ones of ``rows``, each predicted without its group."""
    found: dict[int, float] = {}
    for part in inner_folds(table.observations, scored, group):
        groups = {group(table.observations[row]) for row in part}
        trained = _trained(table, [row for row in rows if group(table.observations[row]) not in groups], fitting)
        held = [table.observations[row] for row in part]
        joules = trained.predict(held).energy_joules(held)
        found |= zip(part, np.log(_measured(held) / joules).tolist(), strict=True)
    return np.array([found[row] for row in scored])


def _alike(table: Table, rows: Sequence[int], held: Sequence[Observation]) -> list[int]:
    """Rows of the held-out ones' sources with a step energy: whose errors are of the kind that is to be expected."""
    sources = {o.source for o in held}
    found = ((row, table.observations[row]) for row in rows)
    return [row for row, o in found if o.source in sources and o.step_energy_joules is not None]


def _held_out(table: Table, fold: Fold, split: Split, fitting: Fitting) -> Predictions:
    rows = _useful(table, fold.train)
    held = tuple(table.observations[row] for row in fold.test)
    scored = _alike(table, rows, held)
    errors = out_of_fold(table, rows, scored, split.group, fitting)
    by_phase = intervals([table.observations[row] for row in scored], errors)
    trained = _trained(table, rows, fitting)
    mean = trained.predict(held)
    deviation = device_deviation(trained, held) if split.new_device else np.zeros(len(held))
    ratios = np.array([widened(by_phase[phase(o)], float(d)) for o, d in zip(held, deviation, strict=True)])
    seconds, watts = (np.asarray(values.detach().numpy()) for values in (mean.step_seconds, mean.power_watts))
    names = (fold.name,) * len(held)
    return Predictions(held, names, seconds, watts, mean.energy_joules(held), ratios[:, 0], ratios[:, 1])


def device_deviation(trained: Trained, observations: Sequence[Observation], draws: int = 16) -> FloatArray:
    """Standard deviation of the log energy over what the priors allow a device's own parameters, shape (n,)."""
    import torch

    network = trained.model.network
    names = [name for name in network.priors if name.endswith("_offset")]
    kept = {name: network.fitted[name].detach().clone() for name in names}
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        with torch.no_grad():
            for name in names:
                noise = torch.randn(kept[name].shape, generator=generator, dtype=torch.float64)
                network.fitted[name].copy_(kept[name] + network.priors[name].deviation * noise)
        found.append(np.log(trained.predict(observations, calibrated=False).energy_joules(observations)))
    with torch.no_grad():
        for name in names:
            network.fitted[name].copy_(kept[name])
    deviation: FloatArray = np.std(found, axis=0)
    return deviation


def _trained(table: Table, rows: Sequence[int], fitting: Fitting) -> Trained:
    from llmco2_vllm.training.predict import train_on

    chosen = np.zeros(len(table.observations), dtype=np.bool_)
    chosen[list(rows)] = True
    return train_on(table, chosen.tolist(), *fitting)


def _useful(table: Table, rows: Sequence[int]) -> list[int]:
    """Rows that a network may learn from."""
    from llmco2_vllm.training.fit import trainable

    return [row for row in rows if trainable([table.observations[row]])]


def _measured(observations: Sequence[Observation]) -> FloatArray:
    found = [o.step_energy_joules for o in observations]
    return np.array([math.nan if joules is None else joules for joules in found])
