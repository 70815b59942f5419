"""Charts of a report as inline SVG. Colours are the page's variables, so that they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final, NamedTuple

from llmco2_vllm.reporting.figures import ALL
from llmco2_vllm.reporting.hours import HOURS_PER_DAY, PARTS, day_of
from llmco2_vllm.reporting.report import Report, shown

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760.0, 250.0, 74.0, 8.0, 12.0, 30.0
_MOST_LABELS: Final = 8
# Tips on bars, and a chart by the hour, where they are few enough to be looked at.
_MOST_WITH_TIPS: Final = 200
_MOST_HOURS: Final = 31 * HOURS_PER_DAY
_WIDEST_BAR = 64.0
_LONGEST_NAME: Final = 20
# Sizes of axes: what a unit is called from so many of it on.
_PREFIXES: Final = {"J": ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")), "g": ((1e6, "t"), (1e3, "kg")), "": ()}
_CARBON: Final = {
    "operational_location_grams": "operational, location-based",
    "embodied_busy_grams": "embodied, busy",
    "embodied_idle_grams": "embodied, idle",
}


class Layer(NamedTuple):
    """One colour of a stacked chart. values: of each bar, None when unknown. colour: its number in the page."""

    label: str
    values: Sequence[float | None]
    colour: int


class Chart(NamedTuple):
    """A chart. svg: markup. legend: colour and label of each layer."""

    title: str
    caption: str
    svg: str
    legend: Sequence[tuple[int, str]]


def charts(report: Report) -> list[Chart]:
    """All charts that the figures allow for."""
    found, days = report.find(), list(report.period.days())

    def layers(names: Iterable[tuple[str, str]], groups: Sequence[tuple[str, str]]) -> list[Layer]:
        rows = [(label, [found[*group, name].value for group in groups]) for name, label in names]
        return [Layer(label, values, number) for number, (label, values) in enumerate(rows, 1) if any(values)]

    of_days = [(day, ALL) for day in days]
    market = [found[*group, "operational_market_grams"].value for group in of_days]
    parts = [(f"{part}_joules", part) for part in PARTS]
    starred = [f"{day}{'*' if found[day, ALL, 'operational_location_grams'].missing_hours else ''}" for day in days]
    drawn = [
        _stacked("Carbon by day", starred, layers(_CARBON.items(), of_days), market),
        _stacked("Metered energy by day", days, layers(parts, of_days)),
    ]
    if found[ALL, ALL, "energy_joules"].value is None:
        predicted = [found[*group, "predicted_joules"].value for group in of_days]
        drawn.append(_stacked("Predicted energy by day, not measured", days, [Layer("predicted energy", predicted, 6)]))
    if len(report.models) > 1:
        of_models = [(ALL, model) for model in report.models]
        drawn.append(_stacked("Carbon by model", report.models, layers(_CARBON.items(), of_models)))
    if report.period.hours <= _MOST_HOURS:
        hours = [f"{day_of(hour)} {hour % HOURS_PER_DAY:02d}:00" for hour, _, _ in report.hourly]
        energy = [joules for _, joules, _ in report.hourly]
        drawn.append(_stacked("Metered energy by hour", hours, [Layer("metered energy", energy, 1)]))
        drawn.append(_steps("Carbon intensity by hour, g CO2e/kWh", hours, [grams for _, _, grams in report.hourly]))
    return [chart for chart in drawn if chart is not None]


def _stacked(
    title: str, names: Sequence[str], layers: Sequence[Layer], marks: Sequence[float | None] = ()
) -> Chart | None:
    """Bars of layers on each other; marks: diamonds beside them. None when nothing is known."""
    if all(value is None for layer in layers for value in layer.values):
        return None
    sums = [sum(max(layer.values[bar] or 0.0, 0.0) for layer in layers) for bar in range(len(names))]
    unit = "g" if title.startswith("Carbon") else "J"
    scale = _Scale(max([*sums, *(mark or 0.0 for mark in marks)]), len(names), unit)
    body = scale.axes(names)
    for bar, name in enumerate(names):
        base = 0.0
        for layer in layers:
            value = layer.values[bar]
            if value is not None and value > 0:
                tip = f"{name}: {layer.label} {shown(value, '')}"
                body.append(scale.bar(bar, base, base + value, (layer.colour, tip)))
                base += value
        if all(layer.values[bar] is None for layer in layers):
            body.append(scale.gap(bar, f"{name}: unknown"))
    body += [scale.mark(bar, mark) for bar, mark in enumerate(marks) if mark is not None]
    legend = [(layer.colour, layer.label) for layer in layers]
    legend += [(0, "operational, market-based")] if any(mark is not None for mark in marks) else []
    peak = max(range(len(names)), key=sums.__getitem__)
    caption = f"Highest: {names[peak]}, {shown(sums[peak], '')} {unit}{' CO2e' if unit == 'g' else ''}."
    if any(name.endswith("*") for name in names):
        caption += " *: grams are not known of every hour."
    return Chart(title, caption, _svg(title, caption, body), legend)


def _steps(title: str, names: Sequence[str], values: Sequence[float | None]) -> Chart | None:
    """A line in steps, broken where nothing is known. None when nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    scale = _Scale(max(known), len(names), "")
    path, drawing = [], False
    for bar, value in enumerate(values):
        if value is not None:
            left, right, height = scale.x(bar), scale.x(bar + 1), scale.y(value)
            path.append(f"{'L' if drawing else 'M'}{left:.1f} {height:.1f}H{right:.1f}")
        drawing = value is not None
    body = scale.axes(names)
    body += [scale.gap(bar, f"{names[bar]}: unknown") for bar, value in enumerate(values) if value is None]
    body.append(f'<path class="line" d="{"".join(path)}"/>')
    lacking = len(values) - len(known)
    words = f"; unknown for {lacking} of {len(values)} hours" if lacking else ""
    caption = f"From {shown(min(known), '')} to {shown(max(known), '')}{words}."
    return Chart(title, caption, _svg(title, caption, body), ())


class _Scale:
    """Where bars and values lie. Bars are numbered from 0; values begin at 0."""

    def __init__(self, highest: float, bars: int, unit: str) -> None:
        self.unit = unit
        self.step = _round_step(highest or 1.0)
        self.top = self.step * math.ceil((highest or 1.0) / self.step - 1e-9)
        self.bars = bars

    def x(self, bar: float) -> float:
        """Left edge of a bar's place."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * bar / self.bars

    def y(self, value: float) -> float:
        """Height of a value."""
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.top

    def axes(self, names: Sequence[str]) -> list[str]:
        """Lines across with their values, and some of the names."""
        found = []
        for number in range(round(self.top / self.step) + 1):
            height, text = self.y(number * self.step), _short(number * self.step, self.unit)
            found.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}"/>')
            found.append(f'<text class="end" x="{_LEFT - 8}" y="{height + 4:.1f}">{text}</text>')
        every = math.ceil(len(names) / _MOST_LABELS)
        begin = 0
        if len(names) > HOURS_PER_DAY and names[0].endswith(":00"):
            # Of hours the begins of days, by the day alone.
            every = HOURS_PER_DAY * math.ceil(every / HOURS_PER_DAY)
            begin = next(bar for bar, name in enumerate(names) if name.endswith(" 00:00"))
            found += [self._tick(bar) for bar in range(begin, len(names), every)]
        for bar in range(begin, len(names), every):
            name = names[bar].removesuffix(" 00:00")
            name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
            place, anchor = (self.x(bar + 0.5), "middle") if every == 1 else (self.x(bar), "start")
            if anchor == "middle" or place < _WIDTH - 70:
                found.append(f'<text class="{anchor}" x="{place:.1f}" y="{_HEIGHT - 10}">{escape(name)}</text>')
        return found

    def _tick(self, bar: int) -> str:
        return f'<path class="grid" d="M{self.x(bar):.1f} {_TOP}V{_HEIGHT - _BOTTOM + 5}"/>'

    def bar(self, bar: int, low: float, high: float, look: tuple[int, str]) -> str:
        """A rectangle. look: number of its colour, and its tip."""
        left, width = self._place(bar)
        colour, tip = look
        title = f"<title>{escape(tip)}</title>" if self.bars <= _MOST_WITH_TIPS else ""
        size = f'x="{left:.1f}" y="{self.y(high):.1f}" width="{width:.1f}" height="{self.y(low) - self.y(high):.1f}"'
        return f'<rect class="c{colour}" {size}>{title}</rect>'

    def gap(self, bar: int, tip: str) -> str:
        """Where nothing is known."""
        left, width = self.x(bar), self.x(bar + 1) - self.x(bar)
        title = f"<title>{escape(tip)}</title>" if self.bars <= _MOST_WITH_TIPS else ""
        size = f'x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"'
        return f'<rect class="gap" {size}>{title}</rect>'

    def mark(self, bar: int, value: float) -> str:
        """A diamond."""
        return f'<path class="c0" d="M{self.x(bar + 0.5):.1f} {self.y(value) - 6:.1f}l6 6l-6 6l-6-6z"/>'

    def _place(self, bar: int) -> tuple[float, float]:
        """Left edge and width of a bar, with some room to the next."""
        room = self.x(1) - self.x(0)
        width = min(_WIDEST_BAR, room * (0.72 if self.bars <= 62 else 0.9 if self.bars <= _MOST_WITH_TIPS else 1.0))
        return self.x(bar) + (room - width) / 2, width


def _short(value: float, unit: str) -> str:
    """A value beside an axis: 20 MJ, 1.5 kg."""
    for size, name in _PREFIXES[unit]:
        if value >= size:
            return f"{value / size:g} {name}"
    return f"{value:g} {unit}".strip()


def _round_step(highest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that makes three to six lines."""
    least = highest / 5
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _svg(title: str, caption: str, body: Sequence[str]) -> str:
    label = escape(f"{title}. {caption}")
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}">{"".join(body)}</svg>'
