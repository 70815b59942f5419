"""Plots of an evaluation: parity, residuals by batch, error by model, and how often intervals hold."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.training.evaluate import COVERAGE, Predictions, phase

COLOURS = ("#0b6e4f", "#d1495b", "#8d99ae")
MARKERS = ("o", "s", "^")
DOTS_PER_INCH = 130
_NOISE = "#f2c14e"


def parity(held: Mapping[str, Predictions], noise_percent: float, path: Path) -> None:
    """Predicted against measured step energy of each split, on logarithmic axes, with the label noise as a band."""
    figure, axes = _panels(len(held))
    low, high = _limits(held)
    line = np.array([low, high])
    for axis, (name, predictions) in zip(axes, held.items(), strict=True):
        axis.fill_between(
            line,
            line * (1 - noise_percent / 100),
            line * (1 + noise_percent / 100),
            color=_NOISE,
            alpha=0.7,
            lw=0,
            label=f"label noise, ±{noise_percent} %",
        )
        axis.plot(line, line, color="black", lw=0.8)
        for factor in (0.7, 1.3):
            axis.plot(line, line * factor, color="black", lw=0.8, ls=":", label="±30 %" if factor < 1 else None)
        for index, device in enumerate(_devices(held)):
            own = _device_mask(predictions, device)
            axis.scatter(
                predictions.measured_joules[own],
                predictions.energy_joules[own],
                s=14,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                alpha=0.6,
                lw=0,
                label=device,
                zorder=3,
            )
        steady = np.array([not o.stalled for o in predictions.observations])
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axis.set_box_aspect(1)
        axis.set(title=f"{name}\nMAPE {predictions.scores(steady).mape:.1f} %", xlabel="measured, J per step")
    axes[0].set_ylabel("predicted, J per step")
    _finish(figure, axes[0], "Energy of a step, rows held out", path)


def residuals_by_batch(held: Mapping[str, Predictions], noise_percent: float, path: Path) -> None:
    """Signed error against the batch limit, with the median and the middle half of each octave."""
    figure, axes = _panels(len(held), sharey=True)
    for axis, (_, predictions) in zip(axes, held.items(), strict=True):
        batch = np.array([o.batch_limit for o in predictions.observations], dtype=np.float64)
        error = 100 * (predictions.energy_joules / predictions.measured_joules - 1)
        axis.axhspan(
            -noise_percent, noise_percent, color=_NOISE, alpha=0.7, lw=0, label=f"label noise, ±{noise_percent} %"
        )
        axis.axhline(0, color="black", lw=0.8)
        for index, device in enumerate(_devices(held)):
            own = _device_mask(predictions, device)
            axis.scatter(
                batch[own] * (0.97 if index else 1.03),
                np.clip(error[own], -100, 100),
                s=14,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                alpha=0.5,
                lw=0,
                label=device,
                zorder=3,
            )
        _octaves(axis, batch, error)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="requests allowed at a time")
        axis.set_ylim(-105, 105)
    for axis, name in zip(axes, held, strict=True):
        axis.set_title(name)
    axes[0].set_ylabel("predicted / measured - 1, % (cut at ±100)")
    _finish(figure, axes[0], "Error of step energy by batch, rows held out", path)


def by_model(errors: Mapping[str, Mapping[str, float]], noise_percent: float, path: Path) -> None:
    """MAPE of each model by each method; models in the order of the first method."""
    plt = _pyplot()
    first = next(iter(errors.values()))
    models = sorted(first, key=lambda model: first[model])
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(models) + 1.8), layout="constrained")
    height = 0.8 / len(errors)
    for index, (method, found) in enumerate(errors.items()):
        places = np.arange(len(models)) + (index - (len(errors) - 1) / 2) * height
        bars = axis.barh(places, [found[m] for m in models], height, color=COLOURS[index % len(COLOURS)], label=method)
        if not index:
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axis.axvline(noise_percent, color="#b8860b", lw=1.2, ls="--", label=f"label noise, {noise_percent} %")
    axis.set_yticks(range(len(models)), [model.split("/")[-1] for model in models], fontsize=8)
    axis.set_ylim(len(models) - 0.4, -0.6)
    axis.set(
        xlabel="MAPE of step energy, %", xlim=(0, min(100.0, 1.08 * max(max(e.values()) for e in errors.values())))
    )
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    axis.set_title("Models whose architecture was never seen")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def coverage(held: Mapping[str, Predictions], path: Path) -> None:
    """How often the 90 % interval holds the measurement: overall and by phase, device and workload of each split."""
    figure, axes = _panels(len(held), sharey=True)
    for axis, (name, predictions) in zip(axes, held.items(), strict=True):
        groups = _coverage_groups(predictions)
        places = np.arange(len(groups))
        shares = np.array([inside.mean() * 100 for _, inside in groups])
        rows = np.array([len(inside) for _, inside in groups])
        deviation = 164.49 * np.sqrt(COVERAGE * (1 - COVERAGE) / rows)
        axis.axvspan(87, 93, color=_NOISE, alpha=0.5, lw=0, label="87 to 93 %")
        axis.axvline(100 * COVERAGE, color="black", lw=0.8)
        axis.errorbar(shares, places, xerr=deviation, fmt="o", color=COLOURS[0], ms=5, lw=1, label="rows inside")
        for place, share, count in zip(places, shares, rows, strict=True):
            axis.annotate(
                f"{share:.0f} % of {count}", (share, place), (0, 6), textcoords="offset points", ha="center", fontsize=7
            )
        axis.set_yticks(places, [label for label, _ in groups])
        axis.set(xlim=(30, 108), xlabel="measurements inside their 90 % interval, %")
        axis.set_title(
            f"{name}\nmedian interval: factor {np.median(predictions.upper_ratio):.2f} either way", fontsize=11
        )
    axes[0].invert_yaxis()
    _finish(
        figure,
        axes[0],
        "Coverage of 90 % intervals, rows held out (bars: spread of 90 % by chance, were rows independent)",
        path,
    )


def _coverage_groups(predictions: Predictions) -> list[tuple[str, NDArray[np.bool_]]]:
    ratio = predictions.measured_joules / predictions.energy_joules
    inside = (predictions.lower_ratio <= ratio) & (ratio <= predictions.upper_ratio)
    found = [("all rows", inside)]
    for key in (phase, lambda o: o.device.name, lambda o: o.workload):
        names = np.array([key(o) for o in predictions.observations])
        found += [(str(name), inside[names == name]) for name in np.unique(names)]
    return found


def _octaves(axis: Any, batch: NDArray[np.float64], error: NDArray[np.float64]) -> None:
    octave = np.round(np.log2(batch))
    places, quartiles = [], []
    for value in np.unique(octave):
        own = error[octave == value]
        if len(own) >= 5:
            places.append(2.0**value)
            quartiles.append(np.quantile(own, (0.25, 0.5, 0.75)))
    if not places:
        return
    low, middle, high = np.array(quartiles).T
    axis.fill_between(places, low, high, color="black", alpha=0.13, lw=0, label="middle half", zorder=2)
    axis.plot(places, middle, color="black", lw=1.8, label="median", zorder=4)


def _pyplot() -> Any:
    # By name: only the extra ``train`` installs it.
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _panels(count: int, sharey: bool = False) -> tuple[Any, Sequence[Any]]:
    figure, axes = _pyplot().subplots(1, count, figsize=(4.6 * count, 5.8), layout="constrained", sharey=sharey)
    found = list(np.atleast_1d(axes))
    for axis in found:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def _finish(figure: Any, axis: Any, title: str, path: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    _pyplot().close(figure)


def _limits(held: Mapping[str, Predictions]) -> tuple[float, float]:
    values = np.concatenate([np.r_[p.measured_joules, p.energy_joules] for p in held.values()])
    return float(values.min() / 1.3), float(values.max() * 1.3)


def _devices(held: Mapping[str, Predictions]) -> list[str]:
    return sorted({o.device.name for predictions in held.values() for o in predictions.observations})


def _device_mask(predictions: Predictions, device: str) -> NDArray[np.bool_]:
    return np.array([o.device.name == device for o in predictions.observations])
