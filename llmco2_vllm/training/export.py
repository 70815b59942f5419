"""From observations to a bundle that serves: fit, intervals from left-out architectures, provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from llmco2_vllm.core.scores import score
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.predictor.gnn import regime_key
from llmco2_vllm.training.evaluate import PHASES, phase
from llmco2_vllm.training.fit import Recipe, Table, devices_of, trainable
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.origin import campaign
from llmco2_vllm.training.predict import Trained, train_on

FloatArray = NDArray[np.float64]
LEVEL = 0.9
ATTRIBUTION = {
    "mlenergy-v3": (
        "Contains results of the ML.ENERGY Benchmark v3 (Chung et al., The ML.ENERGY Benchmark: Toward Automated "
        "Inference Energy Measurement and Optimization, NeurIPS Datasets and Benchmarks 2025), Apache License 2.0; "
        "selected rows, columns renamed, derived columns added."
    ),
    "mlenergy-v2": (
        "Contains results of the ML.ENERGY Leaderboard v2, the ML.ENERGY Initiative, Apache License 2.0; selected "
        "rows, JSON flattened to a table, derived columns added."
    ),
    "splitwise": (
        "Profiling data from SplitwiseSim (Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase "
        "Splitting, ISCA 2024), MIT, Copyright (c) 2024 Pratyush Patel; medians over repeats."
    ),
}
# Outside of what was trained on nothing was measured: the interval of the known, this much wider on both sides.
UNKNOWN_FACTOR = 1.5


def build(
    observations: Sequence[Observation], version: str, recipe: Recipe, tick: Callable[[], None] = lambda: None
) -> Bundle:
    """Train on all usable ``observations``; intervals come from architectures left out in turn.

    ``tick`` is called ``fits(observations) * recipe.steps`` times. Raises ValueError when there is too little to learn.
    """
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    rows = trainable(observations)
    if len({o.architecture for o in rows}) < 3:
        raise ValueError("training needs usable rows of at least three architectures")
    table = Table(rows, devices_of(rows))
    ratios = left_out_ratios(table, recipe, tick)
    trained = train_on(table, [True] * len(rows), recipe, tick)
    known = ~np.isnan(ratios)
    phases = np.array([phase(o) for o in rows])
    regimes = {name: ratios[known & (phases == name)] for name in PHASES}
    # A regime no row shows gets what all rows say.
    intervals = {name: interval(found if len(found) else ratios[known]) for name, found in regimes.items()}
    low, high = (f(v[i] for v in intervals.values()) for i, f in ((0, min), (1, max)))
    intervals["unknown"] = Interval(low / UNKNOWN_FACTOR, high * UNKNOWN_FACTOR)
    sources = sorted({o.source for o in rows})
    provenance = {
        "rows": {source: sum(o.source == source for o in rows) for source in sources},
        "attribution": [ATTRIBUTION[source] for source in sources],
        "architectures": len({o.architecture for o in rows}),
        "recipe": asdict(recipe),
        "campaigns": _campaigns(trained, rows),
        "left_out_architecture": score(np.ones(known.sum()), ratios[known]).to_dict(),
    }
    return bundle_of(trained, version, intervals, provenance)


def fits(observations: Sequence[Observation]) -> int:
    """Fits a :func:`build` does."""
    return len({o.architecture for o in trainable(observations) if o.step_energy_joules is not None}) + 1


def left_out_ratios(table: Table, recipe: Recipe, tick: Callable[[], None] = lambda: None) -> FloatArray:
    """Measured / predicted step energy of each row by a fit without its architecture; nan without measured energy."""
    rows = table.observations
    found = np.full(len(rows), math.nan)
    for group in sorted({o.architecture for o in rows if o.step_energy_joules is not None}):
        held = [i for i, o in enumerate(rows) if o.architecture == group and o.step_energy_joules is not None]
        trained = train_on(table, [o.architecture != group for o in rows], recipe, tick)
        chosen = [rows[i] for i in held]
        measured = np.array([o.step_energy_joules for o in chosen], dtype=np.float64)
        found[held] = measured / trained.predict(chosen).energy_joules(chosen)
    return found


def interval(ratios: FloatArray, level: float = LEVEL) -> Interval:
    """Central interval of measured / predicted with the finite-sample correction of split-conformal prediction.

    The ceil((n + 1) (1 + level) / 2)-th smallest ratio and its mirror (Angelopoulos and Bates, A Gentle Introduction to
    Conformal Prediction, arXiv:2107.07511, section 2.1). Raises ValueError without ratios.
    """
    if not len(ratios):
        raise ValueError("an interval needs at least one left-out ratio")
    ordered = np.sort(ratios)
    rank = min(len(ordered), math.ceil((len(ordered) + 1) * (1 + level) / 2))
    return Interval(min(1.0, float(ordered[-rank])), max(1.0, float(ordered[rank - 1])))


def bundle_of(trained: Trained, version: str, intervals: dict[str, Interval], provenance: dict[str, object]) -> Bundle:
    """The bundle of a trained model."""
    network = trained.model.network
    seen = sorted({regime_key(o.model) for o in trained.observations})
    return Bundle(
        version=version,
        devices=network.devices,
        arrays=network.parameters_for_serving(),
        intervals=intervals,
        seen=tuple(seen),
        offsets=trained.residuals,
        provenance=provenance,
    )


def _campaigns(trained: Trained, rows: Sequence[Observation]) -> dict[str, float]:
    with torch.no_grad():
        seconds = float(torch.exp(trained.model.log_campaign))
    names = {campaign(o) for o in rows} - {None}
    return {str(name): seconds for name in sorted(names, key=str)}
