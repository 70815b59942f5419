"""Draw every figure of a recording of benchmarks/gpu_record.py again, from its files alone.

    python -m benchmarks.gpu_figures FOLDER [--write FOLDER] [--json]

Titles say the device by NVML's name. What is simulated is titled so in every figure, and is not drawn into a folder
named after a GPU; nor is a recording whose provenance contradicts itself, or whose files are not those it was written
with. Figures of parts that failed are left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_findings as findings
from benchmarks.gpu_findings import MissingError, Recorded
from benchmarks.gpu_provenance import RefusedError, check_folder, title_of
from benchmarks.gpu_record import ABSENT

COLOURS = ("#0b6e4f", "#d1495b", "#30638e", "#edae49", "#8d99ae", "#3d405b", "#7fb69e", "#a23b72", "#5c4d7d")
DOTS_PER_INCH = 130
CALL_TICKS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
RANDOM_WEIGHTS = "random weights"
Drawn = tuple[Any, Any]


def panels(count: int, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A figure that is never shown, and its axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(count, 1, figsize=size, layout="constrained", squeeze=False, **options)
    found = list(axes[:, 0])
    for axis in found:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def plain(axis: Any, ticks: list[float]) -> None:
    """A logarithmic axis with these numbers on it, as one writes them."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def periods(recorded: Recorded) -> Drawn:
    """Histogram of the time from one change to the next."""
    figure, axes = panels(2, (9, 6.5))
    facts = {}
    for axis, column, colour in zip(axes, ("energy", "power"), COLOURS, strict=False):
        name = "counter" if column == "energy" else recorded.power_basis
        found = 1e3 * findings.periods(recorded.edges, column)
        try:
            facts[name] = findings.quantiles(found)
        except MissingError as error:
            axis.set_title(f"{name}: {error}")
            continue
        facts[name] = {"count": facts[name]["count"], **{f"{k}_ms": v for k, v in facts[name].items() if k != "count"}}
        axis.hist(found, bins=np.linspace(0, 1.3 * float(np.quantile(found, 0.99)), 120), color=colour)
        axis.axvline(float(np.median(found)), color="black", lw=0.8, ls=":")
        says = ", ".join(f"{key} {facts[name][f'{key}_ms']:.1f}" for key in ("p5", "p50", "p95"))
        axis.set(yscale="log", ylabel="changes", title=f"{name}: {says} ms, {len(found)} changes")
    axes[-1].set_xlabel("from one change to the next, ms")
    return figure, facts


def power(recorded: Recorded) -> Drawn:
    """Power by the counter's edges and as the driver says it, with the phases; below, their ratio by phase."""
    edges = recorded.edges
    counted, facts = edges.counted, findings.mean_watts(edges)
    begin = edges.time[0]
    figure, axes = panels(2, (14, 8), height_ratios=(2, 1))
    watts = np.diff(counted.energy) / np.diff(counted.time)
    axes[0].stairs(watts, counted.time - begin, baseline=None, color=COLOURS[0], lw=1.2, label="counter, edge to edge")
    axes[0].step(edges.time - begin, edges.power, where="post", color=COLOURS[1], lw=0.7, label=recorded.power_basis)
    top = 1.75 * max(watts.max(), np.nanmax(edges.power, initial=0.0))
    for place, (phase, first, last) in enumerate(edges.spans()):
        axes[0].axvspan(first - begin, last - begin, color="black", alpha=0.04 + 0.05 * (place % 2), lw=0)
        middle = (first + last) / 2 - begin
        axes[0].text(middle, 0.98 * top, phase, rotation=90, ha="center", va="top", fontsize=7)
    axes[0].set(ylim=(0, top), xlim=(0, edges.time[-1] - begin), xlabel="s", ylabel="W")
    axes[0].legend(loc="upper left", frameon=False, fontsize=8, bbox_to_anchor=(0, 1.12), ncols=2)
    axes[1].bar(range(len(facts)), [row["ratio"] for row in facts.values()], color=COLOURS[2], width=0.6)
    for place, row in enumerate(facts.values()):
        axes[1].annotate(f"{row['ratio']:.3f}", (place, row["ratio"]), (0, 2), textcoords="offset points", ha="center")
    axes[1].axhline(1, color="black", lw=0.8)
    axes[1].set_xticks(range(len(facts)), list(facts), rotation=30, ha="right", fontsize=8)
    axes[1].set(ylabel="counter / integrated power", title="Settled mean of each phase")
    return figure, facts


def waves(recorded: Recorded) -> Drawn:
    """Does the counter see all of the time? Then its mean does not depend on the period."""
    rows = findings.waves(recorded)
    figure, (axis,) = panels(1, (8.5, 5))
    shown = [1e3 * row["period_seconds"] for row in rows]
    for key, name, colour in zip(("ratio", "integrated_ratio"), ("counter", "integrated power"), COLOURS, strict=False):
        axis.plot(shown, [row[key] for row in rows], "o-", color=colour, label=name)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xscale("log")
    plain(axis.xaxis, shown)
    axis.set(xlabel="period of the square wave, ms (busy a quarter of it)", ylabel="mean power / what the wave gives")
    axis.legend(frameon=False)
    return figure, rows


def windows(recorded: Recorded) -> Drawn:
    """Error of spans at constant power by length."""
    edges = recorded.edges
    figure, (axis,) = panels(1, (8.5, 5.5))
    facts = {}
    for phase, mark in (("windows, idle", "o"), ("windows, busy", "s")):
        try:
            rows = facts[phase] = findings.spread(edges, phase)
        except MissingError:
            continue
        lengths = [row["length_seconds"] for row in rows]
        for way, colour in (("edge", COLOURS[0]), ("raw", COLOURS[1])):
            name = f"{'edge to edge' if way == 'edge' else 'two plain readings'}, {phase.split(', ')[1]}"
            axis.plot(lengths, [row[f"{way}_percent"] for row in rows], f"{mark}-", color=colour, label=name)
    if not any(facts.values()):
        raise MissingError("no phase at constant power is long enough")
    longest = max(facts.values(), key=len)
    theory = [[row[key] for row in longest] for key in ("length_seconds", "raw_theory_percent")]
    axis.plot(*theory, color="black", lw=0.8, ls=":", label="tick / (length √6)")
    axis.set(xscale="log", yscale="log", xlabel="length of the span, s", ylabel="standard deviation of its power, %")
    plain(axis.xaxis, theory[0])
    axis.legend(frameon=False, fontsize=8)
    return figure, facts


def calls(recorded: Recorded) -> Drawn:
    """How long a reading takes."""
    figure, (axis,) = panels(1, (8.5, 5))
    facts = {}
    for key, name, colour in zip(("call_times", "busy_call_times"), ("idle", "busy"), COLOURS, strict=False):
        if not (times := sorted(recorded.meter.get(key) or [])):
            continue
        facts[name] = findings.quantiles(times)
        label = f"{name}: p50 {facts[name]['p50']:.0f} µs, p99 {facts[name]['p99']:.0f} µs, {len(times)} calls"
        axis.step(times, 100 * np.arange(1, len(times) + 1) / len(times), where="post", color=colour, label=label)
    if not facts:
        raise MissingError("no call was timed")
    axis.set(xscale="log", xlabel="one call for energy and power, µs", ylabel="calls that take less, %", ylim=(0, 101))
    slowest = max(row["p99"] for row in facts.values())
    plain(axis.xaxis, [tick for tick in CALL_TICKS if tick <= 3 * slowest])
    axis.legend(frameon=False, loc="lower right")
    return figure, facts


def rises(recorded: Recorded) -> Drawn:
    """How much later than the load the counter rises."""
    rows, counted = findings.rises(recorded), recorded.edges.counted
    figure, (axis,) = panels(1, (8.5, 5))
    for row, colour in zip(rows, COLOURS, strict=False):
        own = counted.between(row["begin_seconds"] - 0.5, row["begin_seconds"] + 1.2)
        watts = np.diff(own.energy) / np.diff(own.time)
        label = f"counter {1e3 * row['lag_seconds']:.0f} ms late"
        axis.stairs(watts, own.time - row["begin_seconds"], baseline=None, color=colour, lw=1.3, label=label)
    axis.axvline(0, color="black", lw=0.8)
    learnt = recorded.of_meter("state")["devices"][0]["lag_seconds"]
    if learnt is not None:
        axis.axvline(learnt, color="black", lw=0.8, ls=":", label=f"learnt by the sampler: {1e3 * learnt:.0f} ms")
    axis.set(xlabel="after the load began, s", ylabel="W, edge to edge", ylim=(0, None))
    axis.legend(frameon=False, loc="lower right")
    return figure, {"rises": rows, "learnt_lag_seconds": learnt}


def window_parity(recorded: Recorded) -> Drawn:
    """Predicted against measured energy of windows, by the phases of their steps."""
    found = findings.windows(recorded)
    facts = {mix: findings.errors(rows) for mix, rows in found.items()}
    figure, (axis,) = panels(1, (7, 7))
    for (mix, rows), colour in zip(found.items(), COLOURS, strict=False):
        label = f"{mix}: MAPE {facts[mix]['mape_percent']:.1f} %, {len(rows)} windows"
        axis.scatter(rows[:, 0], rows[:, 1], s=10, color=colour, alpha=0.5, lw=0, label=label)
    parity(axis, np.concatenate(list(found.values())))
    axis.set(xlabel="measured energy of the steps of a window, J", ylabel="predicted, J")
    return figure, facts


def request_parity(recorded: Recorded) -> Drawn:
    """Predicted against measured energy of requests, by point."""
    found = findings.requests(recorded)
    facts = {point.name: findings.errors(rows) for point, rows in found.items()}
    figure, (axis,) = panels(1, (7, 7))
    for place, (point, rows) in enumerate(found.items()):
        label = f"{point.name}: MAPE {facts[point.name]['mape_percent']:.1f} %, {len(rows)} requests"
        colour = COLOURS[place % len(COLOURS)]
        axis.scatter(rows[:, 0], rows[:, 1], s=12, color=colour, alpha=0.5, lw=0, label=label)
    parity(axis, np.concatenate(list(found.values())))
    axis.set(xlabel="measured energy of a request when it is final, J", ylabel="predicted before it ran, J")
    return figure, {"requests": facts, "points": findings.points(recorded)}


def parity(axis: Any, rows: Any) -> None:
    """Logarithmic axes of one range, with the line of equality."""
    positive = rows[:, :2][(rows[:, :2] > 0).all(axis=1)]
    limits = np.array([positive.min() / 1.5, positive.max() * 1.5])
    axis.plot(limits, limits, color="black", lw=0.8)
    for factor in (0.7, 1.3):
        axis.plot(limits, factor * limits, color="black", lw=0.8, ls=":", label="±30 %" if factor < 1 else None)
    axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


# By file name: what it shows, and whether an engine with random weights was at work.
FIGURES: dict[str, tuple[Callable[[Recorded], Drawn], str, bool]] = {
    "periods": (periods, "Period of the energy counter", False),
    "power": (power, "Counter against integrated power", False),
    "waves": (waves, "Part-time test of the counter", False),
    "windows": (windows, "Error of windows by length", False),
    "calls": (calls, "What a call of the driver takes", False),
    "rises": (rises, "Lag of the counter", False),
    "window_parity": (window_parity, "Predicted and measured energy of windows", True),
    "request_parity": (request_parity, "Predicted and measured energy of requests", True),
}


def draw(recorded: Recorded, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Write all figures of what was asked for; what each shows, and why others are not there.

    Raises RefusedError before the first.
    """
    title = title_of(recorded.provenance)
    for place in (folder, recorded.folder):
        check_folder(place, recorded.provenance["simulated"], recorded.provenance["device"]["name"])
    folder.mkdir(parents=True, exist_ok=True)
    facts, absent = {}, {}
    for name, (figure_of, what, served) in FIGURES.items():
        if recorded.provenance["parts"].get("serving" if served else "meter") == ABSENT:
            continue
        try:
            figure, facts[name] = figure_of(recorded)
        except MissingError as error:
            absent[name] = str(error)
            continue
        whole = f"{what}\n{title}{f', {RANDOM_WEIGHTS}' if served else ''}"
        figure.suptitle(whole)
        figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, metadata={"Title": whole, "Software": None})
    import matplotlib.pyplot as pyplot

    pyplot.close("all")
    return facts, absent


def main(argv: list[str] | None = None) -> int:
    """Command line: 1 where figures are missing, 2 where the recording is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a recording of benchmarks.gpu_record")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the figures go; by default beside it")
    parser.add_argument("--json", action="store_true", help="print what they show as one JSON object")
    arguments = parser.parse_args(argv)
    try:
        recorded = Recorded.open(arguments.folder)
        facts, absent = draw(recorded, arguments.write or arguments.folder)
    except RefusedError as error:
        print(f"gpu_figures: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        device = title_of(recorded.provenance)
        print(json.dumps({"device": device, "weights": "random", "figures": facts, "absent": absent}))
    else:
        for name in (*facts, *absent):
            print(f"{name}.png" if name in facts else f"{name}: left out, {absent[name]}")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main())
