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
from llmco2_vllm.training.evaluate import intervals
from llmco2_vllm.training.fit import Recipe, Table, devices_of, trainable
from llmco2_vllm.training.kernel_times import KernelTimes
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.origin import ERA, campaign
from llmco2_vllm.training.predict import Trained, train_on

FloatArray = NDArray[np.float64]
VIDUR = "vidur"
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
    VIDUR: (
        "Kernel and collective profiles of Vidur (Agrawal et al., Vidur: A Large-Scale Simulation Framework For LLM "
        "Inference, MLSys 2024), MIT, Copyright (c) Microsoft Corporation; medians at a few points."
    ),
}
# Outside of what was trained on nothing was measured: the interval of the known, this much wider on both sides.
UNKNOWN_FACTOR = 1.5


def build(
    observations: Sequence[Observation],
    version: str,
    recipe: Recipe,
    tick: Callable[[], None] = lambda: None,
    kernel_times: Sequence[KernelTimes] = (),
) -> Bundle:
    """Train on all usable ``observations``; intervals come from architectures left out in turn.

    kernel_times: labels of single kernels. ``tick`` is called ``fits(observations) * recipe.steps`` times. Raises
    ValueError when there is too little to learn.
    """
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    rows = trainable(observations)
    if len({o.architecture for o in rows}) < 3:
        raise ValueError("training needs usable rows of at least three architectures")
    table = Table(rows, devices_of(rows), kernel_times)
    ratios = left_out_ratios(table, recipe, tick)
    trained = train_on(table, [True] * len(rows), recipe, tick)
    # Of engines of today alone: those of older ones say nothing on how far off this one is.
    known = ~np.isnan(ratios) & np.array([o.era == ERA for o in rows])
    found = intervals([o for o, yes in zip(rows, known, strict=True) if yes], np.log(ratios[known]))
    widest = max(item.upper_ratio for item in found.values())
    found["unknown"] = Interval(1 / (widest * UNKNOWN_FACTOR), widest * UNKNOWN_FACTOR)
    sources = sorted({o.source for o in rows})
    provenance = {
        "rows": {source: sum(o.source == source for o in rows) for source in sources},
        "kernel_times": len(kernel_times),
        "attribution": [ATTRIBUTION[source] for source in (*sources, *([VIDUR] if kernel_times else []))],
        "architectures": len({o.architecture for o in rows}),
        "recipe": asdict(recipe),
        "campaigns": _campaigns(trained, rows),
        "left_out_architecture": score(np.ones(known.sum()), ratios[known]).to_dict(),
    }
    return bundle_of(trained, version, found, provenance)


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
