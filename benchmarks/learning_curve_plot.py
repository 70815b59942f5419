"""The picture of benchmarks/learning_curve.py."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmco2_vllm.training.figures import COLOURS, DOTS_PER_INCH

_NOISE = "#b8860b"


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Left: the curve. Middle: ours by architecture, smallest to largest size. Right: by regime at the largest."""
    # By name: only the extra ``train`` installs it.
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 3, figsize=(16.5, 7), layout="constrained", width_ratios=(1.1, 1, 1.1))
    _plot_curve(axes[0], result)
    _plot_architectures(axes[1], result)
    _plot_regimes(axes[2], result)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Energy of a step of architectures that were not learned from")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def _plot_curve(axis: Any, result: dict[str, Any]) -> None:
    for place, (method, points) in enumerate(result["curve"].items()):
        sizes = np.array([point["architectures"] for point in points], dtype=np.float64) + 0.12 * (place - 1)
        middle = np.array([point["mape"]["mean"] for point in points])
        spread = np.array([point["mape"]["deviation"] or 0.0 for point in points])
        colour = COLOURS[place]
        axis.errorbar(sizes, middle, yerr=spread, fmt="o-", color=colour, lw=2, ms=6, capsize=3, label=method)
        for size, point in zip(sizes, points, strict=True):
            draws = point["mape"]["draws"]
            axis.scatter([size] * len(draws), draws, s=9, color=colour, alpha=0.45, lw=0)
        if not place:
            for size, value in zip(sizes, middle, strict=True):
                axis.annotate(f"{value:.0f}", (size, value), (-5, -13), textcoords="offset points", ha="right")
    noise = result["noise_floor_percent"]
    axis.axhline(noise, color=_NOISE, lw=1.2, ls="--", label=f"label noise, {noise} %")
    axis.set_xticks(result["plan"]["sizes"])
    axis.set(ylim=(0, 100), xlabel="architectures learned from", ylabel="MAPE, % (cut at 100)")
    axis.set_title(
        "Error by architectures learned from\n(mean and standard deviation over draws; dots: draws)", fontsize=11
    )
    axis.legend(frameon=False)


def _plot_architectures(axis: Any, result: dict[str, Any]) -> None:
    groups, ours = result["regimes"]["architecture"], next(iter(result["curve"]))
    names = sorted(groups, key=lambda name: groups[name]["mape"][ours][-1] or 0.0)
    ends = [[groups[name]["mape"][ours][place] for name in names] for place in (0, -1)]
    for row, (first, last) in enumerate(zip(*ends, strict=True)):
        if first is not None and last is not None:
            axis.plot([first, last], [row, row], color="#8d99ae", lw=1.2, zorder=2)
    sizes = result["plan"]["sizes"]
    for values, size, face in zip(ends, (sizes[0], sizes[-1]), ("white", COLOURS[0]), strict=True):
        shown = [np.nan if value is None else value for value in values]
        axis.scatter(shown, range(len(names)), s=38, fc=face, ec=COLOURS[0], zorder=3, label=f"{size} learned")
    labels = [f"{name.split('/')[-1]} ({groups[name]['rows']})" for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=8)
    axis.axvline(result["noise_floor_percent"], color=_NOISE, lw=1.2, ls="--")
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="MAPE of ours, %")
    axis.set_title("Ours by architecture, never seen (rows)", fontsize=11)
    axis.legend(frameon=False, loc="upper right")


def _plot_regimes(axis: Any, result: dict[str, Any]) -> None:
    shown = [(r, g, f) for r, groups in result["regimes"].items() if r != "architecture" for g, f in groups.items()]
    shown = [entry for entry in shown if entry[2]["rows"]]
    for place, method in enumerate(result["curve"]):
        values = [np.nan if f["mape"][method][-1] is None else f["mape"][method][-1] for _, _, f in shown]
        size = 46 if not place else 24
        axis.scatter(values, range(len(shown)), s=size, color=COLOURS[place], label=method, zorder=4 - place)
    for row, (before, after) in enumerate(pairwise(shown)):
        if before[0] != after[0]:
            axis.axhline(row + 0.5, color="black", lw=0.6)
    axis.set_yticks(range(len(shown)), [f"{r}: {g} ({f['rows']})" for r, g, f in shown], fontsize=8)
    axis.axvline(result["noise_floor_percent"], color=_NOISE, lw=1.2, ls="--")
    axis.set(xlim=(0, 100), ylim=(len(shown) - 0.5, -0.5), xlabel="MAPE, %")
    axis.set_title(f"By regime, {result['plan']['sizes'][-1]} architectures learned (rows)", fontsize=11)
