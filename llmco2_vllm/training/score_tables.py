"""Scores of a table of measurements: of a bundle on measured rows, and of our curves on the released LLMCO2 labels.

Numpy alone: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.scores import Scores, score
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.predictor.forward import Network
from llmco2_vllm.predictor.gnn import regime_key
from llmco2_vllm.training.dataset import Dataset
from llmco2_vllm.training.evaluate import Predictions, conformal_error, phase
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.origin import campaign, features_of
from llmco2_vllm.training.released import ReleasedPredictor, ReleasedRows, grouped_folds
from llmco2_vllm.training.residuals import rows_of
from llmco2_vllm.training.sources import LLMCO2

FloatArray = NDArray[np.float64]
ENERGY = "step energy, joules"
TIME = "time, seconds"
LABELS = "LLMCO2 released labels, unit unknown"
LEAST_REQUESTS = 20


class Target(NamedTuple):
    """What was scored, and how well."""

    name: str
    scores: Scores


class Mean(NamedTuple):
    """The mean step of an observation, s and W of one device; seconds of a pure decode step and of the prefill."""

    step_seconds: float
    decode_seconds: float
    prefill_seconds: float
    power_watts: float


def score_table(dataset: Dataset, bundle: Bundle | None) -> Target:
    """Scores of one table. Rows without the measurement that the table is scored on do not count.

    Tables with step energy: step energy. Latency tables: decode step times and prefill times pooled, two values per
    row; intervals are those of the energy. Released labels: prefill + decode label, see :func:`score_released`; no
    bundle is needed. ValueError when nothing is left to score.
    """
    if dataset.source == LLMCO2:
        return Target(LABELS, score_released(released_rows(dataset.observations)))
    if bundle is None:
        raise ValueError("a bundle is needed to predict energy or time")
    energetic = [o for o in dataset.observations if o.step_energy_joules is not None]
    if energetic:
        return Target(ENERGY, score_observations(bundle, energetic))
    timed = [o for o in dataset.observations if o.decode_step_seconds or o.prefill_seconds]
    if not timed:
        raise ValueError("no row has a step energy or a time to score")
    return Target(TIME, score_times(bundle, timed))


def score_observations(bundle: Bundle, observations: Sequence[Observation]) -> Scores:
    """Scores of the step energy of observations that have one."""
    return predict(bundle, observations).scores()


def score_times(bundle: Bundle, observations: Sequence[Observation]) -> Scores:
    """Scores of decode step times and prefill times, pooled."""
    predicted, measured, ratios = [], [], []
    for o, mean, interval in zip(
        observations, means(bundle, observations), _intervals(bundle, observations), strict=True
    ):
        pairs = ((mean.decode_seconds, o.decode_step_seconds), (mean.prefill_seconds, o.prefill_seconds))
        for seconds, truth in pairs:
            if truth is not None and seconds > 0:
                predicted.append(seconds)
                measured.append(truth)
                ratios.append(interval)
    bounds = np.array(ratios) * np.array(predicted)[:, None]
    return score(predicted, measured, (bounds[:, 0], bounds[:, 1]))


def predict(bundle: Bundle, observations: Sequence[Observation]) -> Predictions:
    """Mean steps of observations as the bundle's network and its offsets see them."""
    found = np.array([(m.step_seconds, m.power_watts) for m in means(bundle, observations)])
    scale = np.array([o.devices / o.topology.pipeline_parallel for o in observations])
    ratios = np.array(_intervals(bundle, observations))
    energy = found[:, 0] * found[:, 1] * scale
    names = (bundle.version,) * len(observations)
    return Predictions(tuple(observations), names, found[:, 0], found[:, 1], energy, ratios[:, 0], ratios[:, 1])


def means(bundle: Bundle, observations: Sequence[Observation]) -> list[Mean]:
    """The mean step of each observation."""
    offsets = np.zeros((len(observations), 2)) if bundle.offsets is None else bundle.offsets.at(rows_of(observations))
    campaigns = bundle.provenance.get("campaigns", {})
    found = []
    for o, (time, power) in zip(observations, np.exp(offsets).tolist(), strict=True):
        extra = float(campaigns.get(campaign(o), 0.0))
        network = Network(bundle.arrays, bundle.devices, features_of(o))
        mean = _mean(network, o, extra)
        seconds = (mean.step_seconds * time, mean.decode_seconds * time, mean.prefill_seconds * time)
        found.append(Mean(*seconds, mean.power_watts * power))
    return found


def _mean(network: Network, observation: Observation, extra: float) -> Mean:
    """As ``training/fit.py`` has it: the median step is a pure decode step while most steps are."""
    idle = observation.device.idle_power_watts
    span = observation.device.power_limit_watts - idle
    total = energy = decode = prefill = decode_share = 0.0
    for share, batch in observation.step_mix:
        step = network.step(batch, extra)
        total += share * step.total
        energy += share * step.total * (idle + span * step.power)
        if batch.prefill.tokens:
            prefill += share * step.total
        else:
            decode += share * step.total
            decode_share += share
    most = 1 / (1 + np.exp(-12 * (decode_share - 0.5)))
    median = most * decode / decode_share + (1 - most) * total if decode_share else total
    return Mean(total, float(median), prefill / (1 - decode_share) if decode_share < 1 else 0.0, energy / total)


def _intervals(bundle: Bundle, observations: Sequence[Observation]) -> list[Interval]:
    return [bundle.intervals[_regime(bundle, o)] for o in observations]


def _regime(bundle: Bundle, observation: Observation) -> str:
    features = features_of(observation)
    model = features.model
    known = features.host in bundle.devices and not model.generic and regime_key(model) in bundle.seen
    return phase(observation) if known and not observation.multimodal else "unknown"


def released_rows(observations: Sequence[Observation]) -> ReleasedRows:
    """Requests with their labels from observations of that table. ValueError for a request without decode steps."""
    rows = []
    for o in observations:
        if o.output_tokens < 2:
            raise ValueError(f"line {o.line}, column output_tokens: one token leaves nothing to decode")
        labels = (o.raw_prefill or 0.0, o.raw_decode or 0.0)
        rows.append((o.fold, o.model_name, o.batch_limit, int(o.prompt_tokens), int(o.output_tokens), *labels))
    if not rows:
        raise ValueError("no row has labels to score")
    return ReleasedRows(*(np.array(column) for column in zip(*rows, strict=True)))


def score_released(rows: ReleasedRows) -> Scores:
    """Scores of prefill + decode label: learned from the train rows and scored on the others, or over five folds.

    Folds, where there are no train rows or no others, keep equal requests together. Intervals come from the errors of
    rows that were held out while learning: of a fifth of the train rows, or of the other folds.
    """
    fewest = min(np.unique(rows.model, return_counts=True)[1])
    if fewest < LEAST_REQUESTS:
        raise ValueError(f"a model has {fewest} requests with labels; at least {LEAST_REQUESTS} are needed to learn")
    learn, others = rows.where(rows.split == "train"), rows.where(rows.split != "train")
    if not len(learn) or not len(others) or set(others.models) - set(learn.models):
        return _score_crossed(rows)
    inner, held = (learn.where(positions) for positions in next(grouped_folds(learn)))
    if set(inner.models) != set(learn.models):
        return _score_crossed(rows)
    errors = np.log(held.labels.sum(axis=1) / _totals(inner, held))
    predicted, width = _totals(learn, others), np.exp(conformal_error(errors))
    return score(predicted, others.labels.sum(axis=1), (predicted / width, predicted * width))


def _score_crossed(rows: ReleasedRows) -> Scores:
    predicted, fold = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
    for number, (learn, held) in enumerate(grouped_folds(rows)):
        predicted[held] = _totals(rows.where(learn), rows.where(held))
        fold[held] = number
    truth = rows.labels.sum(axis=1)
    errors = np.log(truth / predicted)
    width = np.exp([conformal_error(errors[fold != number]) for number in fold])
    return score(predicted, truth, (predicted / width, predicted * width))


def _totals(learn: ReleasedRows, held: ReleasedRows) -> FloatArray:
    """Prefill + decode label of ``held`` as learned from ``learn``, shape (n,). ValueError for an unknown model."""
    if unknown := sorted(set(held.models) - set(learn.models)):
        raise ValueError(f"{unknown[0]}: its requests are too alike to learn from some and score the others")
    totals: FloatArray = ReleasedPredictor().fit(learn).predict(held).sum(axis=1)
    return totals
