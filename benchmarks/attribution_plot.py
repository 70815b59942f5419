"""The picture of benchmarks/attribution.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attribution_methods import METHODS, OURS

COLOURS = ("#0b6e4f", "#7fb69e", "#d1495b", "#edae49", "#30638e", "#8d99ae", "#3d405b")
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
DOTS_PER_INCH = 130


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Left: how many requests err by less than so much, first scene. Middle: bias by class. Right: all scenes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    base = next(iter(result["scenes"].values()))["methods"]
    figure, axes = pyplot.subplots(1, 3, figsize=(15.5, 5.8), layout="constrained", width_ratios=(1.2, 1, 1.2))
    _distribution(axes[0], base)
    _classes(axes[1], base)
    _scenes(axes[2], result["scenes"])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    trace = "a synthetic trace" if result["trace"] == "synthetic" else "the Azure conversation trace"
    cards = f"{result['seeds']} simulated cards" if result["seeds"] > 1 else "one simulated card"
    figure.suptitle(f"Energy attributed to single requests against a simulated truth: {trace} on {cards}")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def _percent(axis: Any, low: float, high: float) -> None:
    axis.set_xscale("log")
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks], fontsize=8, rotation=45)
    axis.set_xticks([], minor=True)
    axis.set_xlim(low, high)


def _distribution(axis: Any, methods: dict[str, Any]) -> None:
    for method, colour in zip(METHODS, COLOURS, strict=True):
        row = methods[method]
        thick = 2.6 if method == OURS else 1.6
        axis.plot(np.maximum(row["error_percentiles"], 1e-4), range(101), color=colour, lw=thick, label=method)
    axis.axhline(50, color="black", lw=0.8, ls=":")
    for method, side in ((OURS, "right"), ("token share", "left")):
        middle = methods[method]["median_error"]
        place = (-6, 4) if side == "right" else (6, -12)
        colour = COLOURS[METHODS.index(method)]
        axis.annotate(
            f"{middle:.1%}", (middle, 50), place, textcoords="offset points", ha=side, color=colour, weight="bold"
        )
    axis.set(title="Requests that err by less (base)", xlabel="|attributed / true - 1|", ylim=(0, 100))
    axis.yaxis.set_major_formatter("{x:.0f} %")
    _percent(axis, 0.001, 30)


def _classes(axis: Any, methods: dict[str, Any]) -> None:
    """Bias of the sums of a class; the whole GPU is off any scale."""
    shown = [method for method in METHODS if method != METHODS[-1]]
    names = list(methods[OURS]["classes"])
    rows = [*names, "all prefill", "all decode"]
    height = 0.84 / len(shown)
    for place, method in enumerate(shown):
        row = methods[method]
        bias = [row["classes"][name]["bias"] for name in names] + [row["prefill_bias"], row["decode_bias"]]
        at = np.arange(len(rows)) + (place - (len(shown) - 1) / 2) * height
        axis.barh(at, 100 * np.array(bias), height, color=COLOURS[METHODS.index(method)], zorder=3)
    axis.axvline(0, color="black", lw=0.8, zorder=4)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("symlog", linthresh=10)
    ticks = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200)
    axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks], fontsize=8, rotation=45)
    axis.set_xticks([], minor=True)
    axis.set(title="Bias of sums by class and phase (base)", xlabel="attributed / true - 1, %")


def _scenes(axis: Any, scenes: dict[str, Any]) -> None:
    places = np.arange(len(scenes))
    for method, colour in zip(METHODS, COLOURS, strict=True):
        rows = [scene["methods"][method] for scene in scenes.values()]
        own = method == OURS
        axis.hlines(places, *zip(*(row["median_error_range"] for row in rows), strict=True), color=colour, lw=1.2)
        axis.plot(
            [row["median_error"] for row in rows],
            places,
            "o",
            ms=8 if own else 5,
            color=colour,
            zorder=4 if own else 3,
        )
    axis.set_yticks(places, list(scenes), fontsize=9)
    axis.set_ylim(len(scenes) - 0.5, -0.5)
    axis.set(title="Median error by scene (line: range of cards)", xlabel="median |attributed / true - 1|")
    _percent(axis, 0.002, 120)
