"""Our predictor of the LLMCO2 released labels: two curves over tokens per model, and their transfer to a new model.

The labels (arXiv:2410.02950, data released with it) have no stated unit and look like seconds of a simulator, so
nothing here is a statement about energy, and nothing of it ships in a bundle. It exists to compare methods on the
authors' own rows.

What the labels are made of: a prefill label is one value at the prompt, a decode label the sum of one value per
output token after the first, at the context of that token. Both values are Roofline and polynomial terms fitted by
non-negative least squares, times a residual that is free in each block of tokens, since the simulator rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, Phase, PhaseShape
from llmco2_vllm.core.hardware import DeviceSpec, Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.configs import ModelSizes
from llmco2_vllm.training.physics import step_work
from llmco2_vllm.training.table import read_table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LABELS = "LLMCO2 released labels"
NOT_ENERGY = (
    f"{LABELS}: their unit is not stated and they look like seconds of a simulator. They are not energy, and no score"
    " here says how well energy is predicted."
)
PHASES = (Phase.PREFILL, Phase.DECODE)
DEVICE = "a100-80"
# Tokens that the simulator rounds together, seen in rows of the training split: labels of equal blocks are equal.
BLOCK_TOKENS = {Phase.PREFILL: 8, Phase.DECODE: 64}
# Where the residual ends: kernels were profiled to here, and labels of 7b stay the same beyond.
PROFILED_TOKENS = 4096
MAX_TOKENS = 8192
ROUGHNESS = (1e-4, 1e-2, 1.0, 100.0)
FOLDS = 5
_ITERATIONS = 25
_LEAST_ERROR = 1e-6


@dataclass(frozen=True)
class ReleasedRows:
    """Requests with their labels, arrays of shape (n,).

    split: the authors'. batch: requests of a batch, one number per model. prompt, output: tokens.
    prefill, decode: the labels, unit not known.
    """

    split: NDArray[np.str_]
    model: NDArray[np.str_]
    batch: IntArray
    prompt: IntArray
    output: IntArray
    prefill: FloatArray
    decode: FloatArray

    def __len__(self) -> int:
        return len(self.model)

    def where(self, chosen: NDArray[np.bool_] | IntArray) -> ReleasedRows:
        """The rows of a mask, or at positions."""
        return ReleasedRows(**{item.name: getattr(self, item.name)[chosen] for item in fields(self)})

    @property
    def labels(self) -> FloatArray:
        """Prefill and decode label, shape (n, 2)."""
        return np.stack([self.prefill, self.decode], axis=1)

    @property
    def models(self) -> list[str]:
        """Names of the models, sorted."""
        return sorted(str(name) for name in np.unique(self.model))


def read_released(path: Path) -> ReleasedRows:
    """Read a table with the columns of llmco2_a100.csv; ValueError that names line and column."""
    table = read_table(path)
    if table.bad_rows:
        raise ValueError(f"{path}: {table.bad_rows[0]}")
    rows = []
    for row in table.rows:
        counts = (row.count("batch_size"), row.count("prompt_tokens"), row.count("output_tokens"))
        if counts[2] < 2:
            raise ValueError(f"{path}: line {row.line}, column output_tokens: one token leaves nothing to decode")
        labels = (row.number("prefill_energy_raw"), row.number("decode_energy_raw"))
        rows.append((row.text("split"), row.text("model"), *counts, *labels))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return ReleasedRows(*(np.array(column) for column in zip(*rows, strict=True)))


def grouped_folds(rows: ReleasedRows, folds: int = FOLDS, seed: int = 0) -> Iterator[tuple[IntArray, IntArray]]:
    """(positions to learn from, positions to test); equal requests of a model stay together."""
    keys = np.stack([np.unique(rows.model, return_inverse=True)[1], rows.prompt, rows.output], axis=1)
    group = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    part = np.random.default_rng(seed).permutation(group.max() + 1)[group] % folds
    for fold in range(folds):
        yield np.flatnonzero(part != fold), np.flatnonzero(part == fold)


def layout(model: ModelSpec, device: DeviceSpec) -> Topology:
    """The fewest devices, a power of two, whose memory holds the weights; the rows do not tell how many there were."""
    ranks = 1
    while model.parameters * model.weight_bytes > ranks * device.memory_bytes:
        ranks *= 2
    return Topology(tensor_parallel=ranks)


def batch_of(phase: Phase, tokens: int, requests: int) -> BatchShape:
    """One prefill of prompts of ``tokens``, or one decode step at a context of ``tokens``, of ``requests`` alike."""
    if phase is Phase.PREFILL:
        pairs = requests * tokens * (tokens + 1) // 2
        return BatchShape(prefill=PhaseShape(requests, requests * tokens, pairs, requests * tokens, requests))
    seen = requests * (tokens + 1)
    return BatchShape(decode=PhaseShape(requests, requests, seen, seen, requests))


def block_tokens(phase: Phase) -> IntArray:
    """The tokens that stand for each block, its last ones, shape (blocks,)."""
    width = BLOCK_TOKENS[phase]
    return np.arange(1, MAX_TOKENS // width + 1) * width


@cache
def rooflines(name: str, requests: int, phase: Phase) -> FloatArray:
    """Roofline seconds of a model's prefill or decode step at each block, shape (blocks,)."""
    model, device = ModelSizes().spec(name, "float16"), device_by_name(DEVICE)
    topology = layout(model, device)
    batches = [batch_of(phase, int(tokens), requests) for tokens in block_tokens(phase)]
    return np.array([step_work(model, device, topology, batch).roofline.sum() for batch in batches])


def block_counts(phase: Phase, rows: ReleasedRows) -> FloatArray:
    """How often each block's value enters the label of each row, shape (n, blocks); the last block is open.

    Prefill: once, at the prompt. Decode: output - 1 steps, at contexts prompt, prompt + 1, ...
    """
    prompt, output = rows.prompt[:, None], rows.output[:, None]
    low, high = (prompt - 1, prompt) if phase is Phase.PREFILL else (prompt, prompt + output - 1)
    ends = block_tokens(phase)
    starts = ends - BLOCK_TOKENS[phase]
    open_ends = np.append(ends[:-1], np.iinfo(np.int64).max)
    counts: FloatArray = np.maximum(0.0, np.minimum(high, open_ends) - np.maximum(low, starts))
    return counts


def physics_terms(phase: Phase, roofline: FloatArray) -> FloatArray:
    """Terms that grow with tokens, shape (blocks, 5): one, tokens, tokens squared, tokens beyond, Roofline time."""
    tokens = block_tokens(phase).astype(np.float64)
    profiled = np.minimum(tokens, PROFILED_TOKENS)
    terms = np.stack([np.ones_like(tokens), profiled, profiled**2, tokens - profiled, roofline], axis=1)
    scaled: FloatArray = terms / terms.max(axis=0)
    return scaled


class Curve(NamedTuple):
    """Value by block of tokens: ``physics`` times one plus ``residual``, each of shape (blocks,)."""

    physics: FloatArray
    residual: FloatArray

    @property
    def values(self) -> FloatArray:
        """Positive values, shape (blocks,)."""
        positive: FloatArray = self.physics * np.maximum(1.0 + self.residual, 1e-3)
        return positive


def fit_physics(phase: Phase, rows: ReleasedRows, roofline: FloatArray) -> FloatArray:
    """Physics part of a curve, non-negative and never falling with tokens, least squares of relative errors."""
    from scipy.optimize import nnls

    terms = physics_terms(phase, roofline)
    design = block_counts(phase, rows) @ terms / rows.labels[:, PHASES.index(phase), None]
    fitted: FloatArray = terms @ nnls(design, np.ones(len(rows)), maxiter=1000)[0]
    return fitted


def fit_curve(phase: Phase, rows: ReleasedRows, roofline: FloatArray, roughness: float) -> Curve:
    """Curve with the least mean absolute relative error plus ``roughness`` x squared differences of the residual.

    Absolute errors, by reweighted least squares, because labels of 70b have a one-sided tail. Blocks without rows
    get the straight line between their neighbours.
    """
    from scipy.sparse import csr_array, diags_array, eye_array
    from scipy.sparse.linalg import spsolve

    physics = fit_physics(phase, rows, roofline)
    counts = block_counts(phase, rows) * physics / rows.labels[:, PHASES.index(phase), None]
    last = PROFILED_TOKENS // BLOCK_TOKENS[phase] - 1
    design = csr_array(np.hstack([counts[:, :last], counts[:, last:].sum(axis=1, keepdims=True)]))
    steps = diags_array([-np.ones(last), np.ones(last)], offsets=[0, 1], shape=(last, last + 1))
    penalty = roughness * steps.T @ steps + 1e-9 * eye_array(last + 1)
    residual, wanted = np.zeros(last + 1), 1.0 - counts.sum(axis=1)
    for _ in range(_ITERATIONS):
        weights = 1.0 / np.maximum(np.abs(design @ residual - wanted), _LEAST_ERROR) / len(rows)
        weighted = design.T @ diags_array(weights)
        residual = spsolve((weighted @ design + penalty).tocsc(), weighted @ wanted)
    return Curve(physics, residual[np.minimum(np.arange(len(physics)), last)])


def predict_phase(phase: Phase, values: FloatArray, rows: ReleasedRows) -> FloatArray:
    """Labels from values by block, shape (n,)."""
    predicted: FloatArray = block_counts(phase, rows) @ values
    return predicted


class ReleasedPredictor:
    """A prefill and a decode curve for each model; the roughness of each is chosen by folds of the training rows."""

    def __init__(self, roughness: Sequence[float] = ROUGHNESS) -> None:
        self.curves: dict[tuple[str, Phase], Curve] = {}
        self.roughness: dict[tuple[str, Phase], float] = {}
        self._candidates = tuple(roughness)

    def fit(self, rows: ReleasedRows) -> Self:
        """Learn the curves of all models of the rows."""
        for name in rows.models:
            own = rows.where(rows.model == name)
            for phase in PHASES:
                roofline = rooflines(name, int(own.batch[0]), phase)
                chosen = self._choose(phase, own, roofline)
                self.roughness[name, phase] = chosen
                self.curves[name, phase] = fit_curve(phase, own, roofline, chosen)
        return self

    def predict(self, rows: ReleasedRows) -> FloatArray:
        """Prefill and decode label, shape (n, 2); KeyError for a model that was not learned."""
        found = np.empty((len(rows), 2))
        for name in rows.models:
            own = rows.model == name
            for column, phase in enumerate(PHASES):
                found[own, column] = predict_phase(phase, self.curves[name, phase].values, rows.where(own))
        return found

    def without(self, name: str) -> ReleasedPredictor:
        """The same curves but those of one model; a model's curves are fitted on its own rows alone."""
        rest = ReleasedPredictor(self._candidates)
        rest.curves = {key: curve for key, curve in self.curves.items() if key[0] != name}
        rest.roughness = {key: value for key, value in self.roughness.items() if key[0] != name}
        return rest

    def _choose(self, phase: Phase, rows: ReleasedRows, roofline: FloatArray) -> float:
        if len(self._candidates) == 1 or len(rows) < 2 * FOLDS:
            return self._candidates[0]
        errors = dict.fromkeys(self._candidates, 0.0)
        for learn, test in grouped_folds(rows):
            held = rows.where(test)
            for candidate in self._candidates:
                curve = fit_curve(phase, rows.where(learn), roofline, candidate)
                ratio = predict_phase(phase, curve.values, held) / held.labels[:, PHASES.index(phase)]
                errors[candidate] += float(np.abs(ratio - 1).sum())
        return min(errors, key=lambda candidate: errors[candidate])


class Transfer:
    """Curves for a model without rows: the shapes of known models, and one scale per phase from a few requests.

    A known curve is divided by a power of its model's Roofline curve, the mean of the logarithms is taken, and the
    same power of the new model's Roofline curve is multiplied. The power (0: the shape in tokens alone, 1: the ratio
    to the Roofline) is chosen per phase by predicting the known models from each other.
    """

    POWERS = (0.0, 0.5, 1.0)

    def __init__(self, known: ReleasedPredictor, rows: ReleasedRows) -> None:
        """known: fitted on ``rows``."""
        self._known = known
        self._requests: Mapping[str, int] = {name: int(rows.batch[rows.model == name][0]) for name in rows.models}
        self.powers = {phase: self._choose(phase, rows) for phase in PHASES}

    def zero_shot(self, rows: ReleasedRows) -> FloatArray:
        """Labels from the ratio to the Roofline alone, shape (n, 2). Rows of one model."""
        return self._labels(rows, dict.fromkeys(PHASES, 1.0))

    def scaled(self, rows: ReleasedRows, few: ReleasedRows) -> FloatArray:
        """Labels with one scale per phase, the median ratio over ``few`` requests of the same model, shape (n, 2)."""
        scale = np.median(few.labels / self._labels(few, self.powers), axis=0)
        scaled: FloatArray = self._labels(rows, self.powers) * scale
        return scaled

    def _labels(self, rows: ReleasedRows, powers: Mapping[Phase, float]) -> FloatArray:
        name, requests = rows.models[0], int(rows.batch[0])
        shapes = [self._shape(phase, (name, requests), list(self._requests), powers[phase]) for phase in PHASES]
        return np.stack(
            [predict_phase(phase, shape, rows) for phase, shape in zip(PHASES, shapes, strict=True)], axis=1
        )

    def _shape(self, phase: Phase, target: tuple[str, int], sources: Sequence[str], power: float) -> FloatArray:
        ratios = [
            np.log(self._known.curves[name, phase].values)
            - power * np.log(rooflines(name, self._requests[name], phase))
            for name in sources
        ]
        mean: FloatArray = np.mean(ratios, axis=0) + power * np.log(rooflines(*target, phase))
        return np.exp(mean)

    def _choose(self, phase: Phase, rows: ReleasedRows) -> float:
        """Power with the least error when each known model is predicted from the others; 0 when there is just one."""
        if len(self._requests) < 2:
            return self.POWERS[0]
        errors = dict.fromkeys(self.POWERS, 0.0)
        for name, requests in self._requests.items():
            others = [other for other in self._requests if other != name]
            own = rows.where(rows.model == name)
            for power in self.POWERS:
                shape = self._shape(phase, (name, requests), others, power)
                ratio = predict_phase(phase, shape, own) / own.labels[:, PHASES.index(phase)]
                errors[power] += float(np.abs(ratio / np.median(ratio) - 1).mean())
        return min(errors, key=lambda power: errors[power])
