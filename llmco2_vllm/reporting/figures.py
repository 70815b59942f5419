"""The figures of a report: the same list behind every format. What is not known is None, never 0."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from llmco2_vllm.core.attribution import GAIN_DEVIATION
from llmco2_vllm.core.carbon import sci_grams
from llmco2_vllm.core.scores import NORMAL_90
from llmco2_vllm.core.units import joules_to_kwh
from llmco2_vllm.reporting.hours import PARTS, Period, Use, day_of
from llmco2_vllm.reporting.pricing import Pricing

ALL: Final = "all"
_UNIT = re.compile(r"\s*([\w][\w .-]{0,39}?)\s*=\s*(\d{1,12}(?:\.\d{1,6})?)\s*(token|request)s?\s*")
_OWN_NAMES = ("request", "1000 tokens")


class FunctionalUnit(NamedTuple):
    """R of an SCI: so many tokens or requests. of: ``tokens`` or ``requests``."""

    name: str
    size: float
    of: str

    @property
    def figure(self) -> str:
        """Name of its figure."""
        return f"sci_per_{self.name.replace(' ', '_').replace('-', '_')}_grams"


REQUEST: Final = FunctionalUnit("request", 1.0, "requests")
THOUSAND_TOKENS: Final = FunctionalUnit("1000 tokens", 1000.0, "tokens")


def functional_unit(text: str) -> FunctionalUnit:
    """``page=500 tokens``, ``conversation=4 requests``. Raises ValueError that says what is allowed."""
    found = _UNIT.fullmatch(text)
    if found is None or not float(found[2]) or found[1] in _OWN_NAMES:
        raise ValueError(f"unit={text[:60]!r} is not possible; allowed: page=500 tokens, conversation=4 requests")
    return FunctionalUnit(found[1], float(found[2]), f"{found[3]}s")


class Figure(NamedTuple):
    """One figure. day, model: ``all`` for the sum. value: None when unknown.

    missing_hours: hours of a model that are in the group but not in the figure, as it is not known of them.
    """

    day: str
    model: str
    name: str
    unit: str
    value: float | None
    missing_hours: int


class _Sums:
    """Amounts of a group of hours added up, with how many of its hours each is known of."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        self._values: dict[str, float] = {}
        self._known: Counter[str] = Counter()
        for use in uses:
            for name, amount in use.amounts.items():
                self._values[name] = self._values.get(name, 0.0) + amount
                self._known[name] += 1

    def value(self, name: str) -> float | None:
        """The sum over the hours it is known of; None when that is none."""
        return self._values.get(name)

    def missing(self, name: str) -> int:
        """Hours it is not known of."""
        return len(self.uses) - self._known[name]

    def sum(self, *names: str) -> float | None:
        """Of several amounts; None when one of them is."""
        found = [self._values.get(name) for name in names]
        known = [value for value in found if value is not None]
        return sum(known) if len(known) == len(found) else None

    def ratio(self, above: str, below: str) -> float | None:
        """A quotient; None when a part of it is unknown or below is 0."""
        value, divisor = self.value(above), self.value(below)
        return value / divisor if value is not None and divisor else None


class _Row(NamedTuple):
    """How a figure follows from the sums. of: the amount whose missing hours are those of the figure."""

    name: str
    unit: str
    value: Callable[[_Sums], float | None]
    of: str


def _amount(figure: str, unit: str, amount: str = "") -> _Row:
    name = amount or figure
    return _Row(figure, unit, lambda sums: sums.value(name), name)


_GRAMS = "g CO2e"
_ROWS: Final = (
    _amount("energy_joules", "J"),
    _Row("energy_half_width_joules", "J", lambda s: _half_width(s), "variance_square_joules"),
    _amount("site_energy_joules", "J", "site_joules"),
    *(_amount(f"{part}_joules", "J") for part in PARTS),
    *(_amount(f"{name}_joules", "J") for name in ("aborted", "recomputed", "rejected_draft", "estimated", "doubtful")),
    _amount("operational_location_grams", _GRAMS, "location_grams"),
    _amount("operational_market_grams", _GRAMS, "market_grams"),
    _amount("embodied_busy_grams", _GRAMS),
    _amount("embodied_idle_grams", _GRAMS),
    _Row(
        "carbon_grams",
        _GRAMS,
        lambda s: s.sum("location_grams", "embodied_busy_grams", "embodied_idle_grams"),
        "location_grams",
    ),
    *(_amount(f"{part}_operational_grams", _GRAMS, f"{part}_grams") for part in PARTS),
    _Row("location_intensity_grams_per_kwh", "g CO2e/kWh", lambda s: _intensity(s), "location_grams"),
    _amount("predicted_joules", "J"),
    _amount("predicted_operational_grams", _GRAMS, "predicted_location_grams"),
    _Row("prediction_bias_ratio", "ratio", lambda s: _bias(s), "compared_metered_joules"),
    _amount("prefill_tokens", "tokens"),
    _amount("decode_tokens", "tokens"),
    _amount("recomputed_tokens", "tokens"),
    _amount("rejected_draft_tokens", "tokens"),
    _amount("useful_tokens", "tokens"),
    _amount("requests", "requests"),
    _Row(
        "energy_per_1000_tokens_joules",
        "J/1000 tokens",
        lambda s: _per_thousand(s, "energy_joules", "measured_tokens"),
        "measured_tokens",
    ),
    _Row(
        "operational_per_1000_tokens_grams",
        "g CO2e/1000 tokens",
        lambda s: _per_thousand(s, "served_location_grams", "served_tokens"),
        "served_tokens",
    ),
)


@dataclass(frozen=True)
class Grouping:
    """What the figures are taken over and with."""

    period: Period
    pricing: Pricing
    units: Sequence[FunctionalUnit] = ()


def figures(uses: Sequence[Use], grouping: Grouping) -> list[Figure]:
    """Figures of all, of each model, of each day, and of each model in each day; ``uses`` are priced."""
    models = sorted({use.model for use in uses})
    days = grouping.period.days()
    by_day: dict[str, list[Use]] = {day: [] for day in days}
    for use in uses:
        by_day[day_of(use.hour)].append(use)
    found = []
    for day, period in {ALL: grouping.period, **days}.items():
        of_day = uses if day == ALL else by_day[day]
        there = replace(grouping, period=period)
        found += _group(of_day, day, ALL, there)
        for model in models:
            found += _group([use for use in of_day if use.model == model], day, model, there)
    return found


def _group(uses: Sequence[Use], day: str, model: str, grouping: Grouping) -> list[Figure]:
    sums = _Sums(uses)
    found = [Figure(day, model, row.name, row.unit, row.value(sums), sums.missing(row.of)) for row in _ROWS]
    for unit in (REQUEST, THOUSAND_TOKENS, *grouping.units):
        missing = sums.missing(f"served_{unit.of}")
        found.append(Figure(day, model, unit.figure, f"{_GRAMS}/{unit.name}", _sci(sums, unit), missing))
    return [*found, *(Figure(day, model, *figure, 0) for figure in _coverage(sums, grouping))]


def _coverage(sums: _Sums, grouping: Grouping) -> Iterator[tuple[str, str, float | None]]:
    """How much of the time and of the energy the figures know of."""
    hours, asked = {use.hour for use in sums.uses}, grouping.period.hours
    unmeasured = {use.hour for use in sums.uses if "energy_joules" not in use.amounts}
    grid = [grouping.pricing.location.at(hour) for hour in hours]
    yield "hours", "hours", float(asked)
    yield "hours_without_data", "hours", float(asked - len(hours))
    yield "hours_without_measurement", "hours", float(len(unmeasured))
    yield "hours_without_intensity", "hours", float(sum(found is None for found in grid))
    yield "hours_with_estimated_intensity", "hours", float(sum(found is not None and found.estimated for found in grid))
    yield "recorded_time_ratio", "ratio", sums.ratio("recorded_device_seconds", "present_device_seconds")
    yield "measured_energy_ratio", "ratio", _measured_ratio(sums)


def _measured_ratio(sums: _Sums) -> float | None:
    """Of the energy of requests, what windows covered; the rest was predicted, at the recent ratio."""
    estimated, measured = sums.value("estimated_joules"), sums.sum("prefill_joules", "decode_joules")
    if estimated is None or not measured:
        return None
    return measured / (measured + estimated)


def _half_width(sums: _Sums) -> float | None:
    """Of the 90 % interval: windows are independent of each other, the gain of a card is one and the same."""
    variance, energy = sums.value("variance_square_joules"), sums.value("energy_joules")
    if variance is None or energy is None:
        return None
    return NORMAL_90 * math.sqrt(variance + (GAIN_DEVIATION * energy) ** 2)


def _intensity(sums: _Sums) -> float | None:
    """Mean over the energy of the hours whose intensity is known."""
    grams, joules = sums.value("location_grams"), sums.value("priced_site_joules")
    return grams / joules_to_kwh(joules) if grams is not None and joules else None


def _bias(sums: _Sums) -> float | None:
    ratio = sums.ratio("compared_predicted_joules", "compared_metered_joules")
    return None if ratio is None else ratio - 1.0


def _per_thousand(sums: _Sums, name: str, of: str) -> float | None:
    ratio, served = sums.ratio(name, of), sums.value(of)
    return None if ratio is None or served is None or served < 0 else THOUSAND_TOKENS.size * ratio


def _sci(sums: _Sums, unit: FunctionalUnit) -> float | None:
    """Of the hours whose intensity is known; None without all their embodied grams or their functional units."""
    location, embodied = sums.value("served_location_grams"), sums.value("served_embodied_grams")
    served = sums.value(f"served_{unit.of}")
    hours = sums.missing("served_location_grams")
    complete = sums.missing("served_embodied_grams") == sums.missing(f"served_{unit.of}") == hours
    # Below 0 where more of an earlier hour's tokens turned out to be wasted than this time computed.
    if location is None or embodied is None or served is None or served <= 0 or not complete:
        return None
    return sci_grams(location, embodied, served / unit.size)
