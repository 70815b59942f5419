"""Pareto plot of an advice: carbon of 1 000 output tokens against speed, a panel for each zone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmco2_vllm.advice.front import front
from llmco2_vllm.advice.sweep import Row

# Okabe and Ito's colours, which those who see few colours tell apart; yellow and black are left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = {1: "o", 2: "s", 4: "^", 8: "D"}
_OTHER_MARKER = "X"
_PANELS_PER_LINE = 3
_DOTS_PER_INCH = 130
# Of the width and height of a panel: nearer labels would run into each other.
_LABEL_DISTANCE_RATIO = 0.06

AXES: Mapping[str, tuple[str, Callable[[Row], float | None], float]] = {
    "tpot": (
        "time per output token, ms",
        lambda row: None if row.steady.tpot_seconds is None else 1e3 * row.steady.tpot_seconds,
        1.0,
    ),
    "throughput": (
        "output tokens per second of an engine",
        lambda row: row.steady.output_tokens_per_second,
        -1.0,
    ),
}
"""What carbon is drawn against: label, value, and 1 where less is better, -1 where more is."""


class PlotError(ValueError):
    """Nothing to draw, or no library to draw with; the message says which."""


def grams(row: Row) -> float:
    """What is drawn: total grams, or operational ones where the hardware has no embodied figure."""
    return row.operational_grams if row.total_grams is None else row.total_grams


def check_plot(path: Path) -> None:
    """Raises PlotError when no image of that name could be drawn, before there is anything to draw."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise PlotError("matplotlib is not installed; pip install matplotlib") from None
    known = FigureCanvasBase.get_supported_filetypes()
    suffix = path.suffix.lower().removeprefix(".")
    if suffix and suffix not in known:
        raise PlotError(f".{suffix} is no image; allowed: {', '.join(sorted(known))}")


def draw(rows: Sequence[Row], path: Path, against: str = "tpot") -> None:
    """Write an image of ``rows``. Raises PlotError, and OSError or ValueError of the file or its format.

    Rows without an embodied figure are left out as soon as others have one: they are not comparable.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    label, value, sign = AXES[against]
    whole = any(row.total_grams is not None for row in rows)
    shown = [row for row in rows if value(row) is not None and (row.total_grams is not None or not whole)]
    if not shown:
        raise PlotError(f"no configuration has a {label}")
    zones = list(dict.fromkeys(row.zone for row in shown))
    columns = 2 if len(zones) == 4 else min(len(zones), _PANELS_PER_LINE)
    lines = -(-len(zones) // columns)
    figure = Figure(figsize=(1.6 + 4.4 * columns, 0.9 + 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
    devices = list(dict.fromkeys(row.configuration.device for row in shown))
    for zone, axis in zip(zones, axes.flat, strict=False):
        own = [row for row in shown if row.zone == zone]
        axis.set(xscale="log", yscale="log", title=f"{zone}, {own[0].grams_per_kwh:.0f} g/kWh")
        _panel(axis, own, devices, lambda row: (sign * float(value(row) or 0.0), grams(row)))
        _ticks(axis)
    for axis in list(axes.flat)[len(zones) :]:
        axis.remove()
    kind = "operational + embodied" if whole else "operational"
    figure.supxlabel(label, fontsize="medium")
    figure.supylabel(f"g CO2e per 1000 output tokens, {kind}", fontsize="medium")
    figure.suptitle("Carbon against speed, predicted", fontsize="large")
    figure.legend(handles=_legend(devices, shown), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _panel(
    axis: Any, rows: Sequence[Row], devices: Sequence[str], coordinates: Callable[[Row], tuple[float, float]]
) -> None:
    """Points of one zone and the front through those that nothing beats, with their batch limits."""
    best = front(rows, coordinates)
    places = [tuple(map(abs, coordinates(row))) for row in best]
    axis.plot(*zip(*places, strict=True), color="0.6", lw=1.2, zorder=1)
    for row in rows:
        colour = COLOURS[devices.index(row.configuration.device) % len(COLOURS)]
        x, y = map(abs, coordinates(row))
        face = colour if row.steady.in_distribution else "white"
        size = row.configuration.tensor_parallel
        axis.scatter(
            x, y, s=26, marker=MARKERS.get(size, _OTHER_MARKER), facecolor=face, edgecolor=colour, lw=1,
            alpha=1.0 if row in best else 0.4, zorder=3 if row in best else 2,
        )  # fmt: skip
    _label(axis, best, places, right=coordinates(rows[0])[0] < 0)


def _label(axis: Any, rows: Sequence[Row], places: Sequence[tuple[float, ...]], right: bool) -> None:
    """Batch limits on the empty side of a front, except where a label stands already."""
    axis.autoscale_view()
    written: list[Any] = []
    for row, place in zip(rows, places, strict=True):
        at = axis.transAxes.inverted().transform(axis.transData.transform(place))
        if all(abs(at - other).max() > _LABEL_DISTANCE_RATIO for other in written):
            written.append(at)
            text = str(row.configuration.batch_limit)
            offset, side = ((5, -4), "left") if right else ((-4, -4), "right")
            axis.annotate(
                text, place, offset, textcoords="offset points", ha=side, va="top", fontsize="x-small", color="0.3"
            )


def _ticks(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, on either axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        side.set_minor_locator(NullLocator())
    axis.tick_params(labelbottom=True)
    axis.grid(color="0.92", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(devices: Iterable[str], rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str, colour: str, face: str | None = None) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, markerfacecolor=face or colour, ms=5, label=label)

    found = [mark(device, "o", COLOURS[n % len(COLOURS)]) for n, device in enumerate(devices)]
    sizes = sorted({row.configuration.tensor_parallel for row in rows})
    found += [mark(f"TP {size}", MARKERS.get(size, _OTHER_MARKER), "0.4") for size in sizes]
    if not all(row.steady.in_distribution for row in rows):
        found.append(mark("out of distribution", "o", "0.4", "white"))
    return [*found, Line2D([], [], color="0.6", lw=1.2, label="Pareto front,\nwith batch limits")]
