"""A report: figures, what they are, what is not known; and the tables that show them, the same in every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

from llmco2_vllm.reporting.figures import ALL, Figure, FunctionalUnit, Grouping, figures
from llmco2_vllm.reporting.hours import PARTS, Period, Record, Use, Window
from llmco2_vllm.reporting.pricing import Pricing

UNKNOWN: Final = "unknown"
_EMBODIED = ("embodied_busy_grams", "embodied_idle_grams")
_LABELS: Final = {
    "energy_joules": "energy, metered",
    "energy_half_width_joules": "+- of it, 90 %",
    "site_energy_joules": "energy with node and PUE",
    "operational_location_grams": "operational, location-based",
    "operational_market_grams": "operational, market-based",
    "embodied_busy_grams": "embodied, busy",
    "embodied_idle_grams": "embodied, idle",
    "carbon_grams": "operational (location) + embodied",
    "location_intensity_grams_per_kwh": "intensity, mean over the energy",
    "prefill_tokens": "prefill tokens computed",
    "decode_tokens": "decode tokens computed",
    "recomputed_tokens": "of them: computed again after preemption",
    "rejected_draft_tokens": "of them: rejected drafts",
    "useful_tokens": "tokens of use",
    "energy_per_1000_tokens_joules": "energy per 1000 tokens of use",
    "operational_per_1000_tokens_grams": "operational per 1000 tokens of use (not SCI)",
    "predicted_joules": "energy, predicted for all steps",
    "predicted_operational_grams": "operational, location-based, of the predicted energy",
    "prediction_bias_ratio": "predicted over metered, less 1, where both are known",
    "aborted_joules": "of requests: aborted or failed",
    "recomputed_joules": "of requests: computed again after preemption",
    "rejected_draft_joules": "of requests: rejected drafts",
    "estimated_joules": "apart: steps no window covered, estimated",
    "doubtful_joules": "of all: windows in doubt",
    "hours": "hours of the period",
    "hours_without_data": "hours without data",
    "hours_without_measurement": "hours with predictions but no meter",
    "hours_without_intensity": "hours whose intensity is unknown: no grams",
    "hours_with_estimated_intensity": "hours whose intensity is an estimate",
    "recorded_time_ratio": "device time inside stored windows, of the hours with data",
    "measured_energy_ratio": "energy of requests that windows covered",
}
_PARTS: Final = {
    "prefill": "prefill",
    "decode": "decode",
    "mixed": "steps with prefill and decode",
    "idle": "idle",
    "sleeping": "sleeping",
    "unattributed": "unattributed",
    "unsplit": "not split by the meter",
}
_TOTALS = (
    "energy_joules",
    "energy_half_width_joules",
    "site_energy_joules",
    "operational_location_grams",
    "operational_market_grams",
    *_EMBODIED,
    "carbon_grams",
    "location_intensity_grams_per_kwh",
    "requests",
    "prefill_tokens",
    "decode_tokens",
    "recomputed_tokens",
    "rejected_draft_tokens",
    "useful_tokens",
    "energy_per_1000_tokens_joules",
    "operational_per_1000_tokens_grams",
)
# Shown even when unknown: leaving them out would hide that.
_ALWAYS = ("energy_joules", "operational_location_grams", *_EMBODIED, "carbon_grams")
_COLUMNS: Final = {
    "energy_joules": "energy, J",
    "energy_half_width_joules": "+- 90 %, J",
    "operational_location_grams": "location, g",
    "operational_market_grams": "market, g",
    "embodied_busy_grams": "embodied busy, g",
    "embodied_idle_grams": "embodied idle, g",
    "carbon_grams": "location + embodied, g",
    "location_intensity_grams_per_kwh": "g CO2e/kWh",
    "predicted_joules": "predicted, J",
    "predicted_operational_grams": "of predicted, g",
    "sci_per_request_grams": "SCI, g/request",
    "sci_per_1000_tokens_grams": "SCI, g/1000 tokens",
    "hours_without_data": "hours without data",
    "hours_without_intensity": "hours without intensity",
}
_OF_REQUESTS = ("aborted_joules", "recomputed_joules", "rejected_draft_joules", "doubtful_joules", "estimated_joules")
_SCI = (
    "with the idle energy and the idle embodied carbon of the time reported; the sci of a single response has neither, "
    "so those add up to less"
)
_TOKENS = (
    "computed in prefill and decode, less those computed again after a preemption and rejected drafts as far as they "
    "are counted; prompt tokens from the prefix cache are not computed and not among them"
)
_PREDICTED = ("predicted_joules", "predicted_operational_grams", "prediction_bias_ratio")


@dataclass(frozen=True)
class Report:
    """All that a report shows. hourly: energy of all models and intensity by hour, None where unknown.

    cautions: what stands above all figures.
    """

    source: str
    period: Period
    models: Sequence[str]
    units: Sequence[FunctionalUnit]
    figures: Sequence[Figure]
    hourly: Sequence[tuple[int, float | None, float | None]]
    windows: Sequence[Window] | None
    methods: Sequence[tuple[str, str]]
    notes: Sequence[str]
    unknown: Sequence[str]
    cautions: Sequence[str] = ()

    def find(self) -> dict[tuple[str, str, str], Figure]:
        """The figures by day, model and name."""
        return {(figure.day, figure.model, figure.name): figure for figure in self.figures}


class Table(NamedTuple):
    """A table in words. head: of every column; the first one names the row, the others hold figures."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def make_report(record: Record, pricing: Pricing, units: Sequence[FunctionalUnit] = ()) -> Report:
    """Price a record and take its figures."""
    uses = pricing.priced(record.uses)
    found = figures(uses, Grouping(record.period, pricing, units))
    total = {figure.name: figure for figure in found if figure.day == figure.model == ALL}
    return Report(
        record.source,
        record.period,
        sorted({use.model for use in uses}),
        units,
        found,
        _hourly(uses, record.period, pricing),
        record.windows,
        _methods(pricing),
        [*pricing.notes, *record.notes],
        [*_gaps(total), *record.unknown],
        [pricing.location.caution] if pricing.location.caution else [],
    )


def shown(value: float | None, unit: str) -> str:
    """A figure as every table shows it: four digits, whole numbers from 1000 on, ratios in percent."""
    if value is None:
        return UNKNOWN
    if unit == "ratio":
        return f"{value * 100:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def tables(report: Report) -> list[Table]:
    """The tables of a report, in order."""
    found = report.find()
    total = [_row(label, found[ALL, ALL, name]) for name, label in _wanted(found, _TOTALS, _ALWAYS)]
    units = [figure for figure in report.figures if _is_sci(figure) and figure.day == figure.model == ALL]
    head = ("figure", "value", "unit", "hours missing")
    result = [
        Table(
            "Totals",
            f"Sums over {report.period}. Hours missing: of each model, those of which a figure is not known.",
            head,
            total,
        ),
        Table(
            "Software Carbon Intensity",
            "SCI by ISO/IEC 21031, ((E x I) + M) / R: location-based, idle energy and idle embodied carbon included; "
            "R counts tokens of use; the market never enters.",
            head,
            [_row(f"per {figure.unit.partition('/')[2]}", figure) for figure in units],
        ),
        _parts(found),
        _grouped(found, "By day", [(day, ALL) for day in report.period.days()], 0),
        _grouped(found, "By model", [(ALL, model) for model in report.models], 1),
        Table(
            "Predicted, not measured",
            "What the predictor said before the steps ran; never a part of the energy above.",
            head,
            [_row(label, found[ALL, ALL, name]) for name, label in _wanted(found, _PREDICTED)],
        ),
        _windows(report.windows),
        Table(
            "Coverage",
            "How much of the period the figures know of.",
            head[:3],
            [_row(label, found[ALL, ALL, name])[:3] for name, label in _wanted(found, list(_LABELS)[-7:])],
        ),
    ]
    return [table for table in result if table.rows]


def _is_sci(figure: Figure) -> bool:
    return figure.name.startswith("sci_per_")


def _wanted(
    found: dict[tuple[str, str, str], Figure], names: Iterable[str], always: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Names and labels of the figures to show: those that are known, and those that are always there."""
    return [(n, _LABELS.get(n, n)) for n in names if n in always or found[ALL, ALL, n].value is not None]


def _row(label: str, figure: Figure) -> tuple[str, str, str, str]:
    unit = "" if figure.unit == "ratio" else figure.unit
    return label, shown(figure.value, figure.unit), unit, shown(float(figure.missing_hours), "hours")


def _parts(found: dict[tuple[str, str, str], Figure]) -> Table:
    """Where the energy went."""
    whole, rows = found[ALL, ALL, "energy_joules"].value, []
    for part in PARTS:
        joules, grams = (found[ALL, ALL, f"{part}_{name}"] for name in ("joules", "operational_grams"))
        if joules.value is not None:
            share = joules.value / whole if whole else None
            rows.append((_PARTS[part], shown(joules.value, "J"), shown(share, "ratio"), shown(grams.value, grams.unit)))
    for name in _OF_REQUESTS if rows else ():
        figure = found[ALL, ALL, name]
        if figure.value is not None:
            rows.append((_LABELS[name], shown(figure.value, "J"), "", ""))
    caption = "Parts of the metered energy; those above the lines 'of' and 'apart' add up to it."
    return Table("Where the energy went", caption, ("part", "J", "share", "location, g CO2e"), rows)


def _grouped(
    found: dict[tuple[str, str, str], Figure], title: str, groups: Sequence[tuple[str, str]], place: int
) -> Table:
    """One row a group. place: which of day and model names it."""
    # Predictions beside measurements would be taken for them; they stand in where there are none.
    hidden = () if found[ALL, ALL, "hours_without_measurement"].value else _PREDICTED
    columns = [
        name
        for name in _COLUMNS
        if name not in hidden
        if name in _ALWAYS or any(found[*group, name].value not in (None, 0.0) for group in groups)
    ]
    rows = [(group[place], *(_cell(found[*group, name]) for name in columns)) for group in groups]
    caption = f"*: not known of every hour, a sum of the others.{' Days are UTC.' if place == 0 else ''}"
    return Table(title, caption, (("day", "model")[place], *(_COLUMNS[name] for name in columns)), rows)


def _cell(figure: Figure) -> str:
    part = "*" if figure.missing_hours and figure.value is not None else ""
    return shown(figure.value, figure.unit) + part


def _windows(windows: Sequence[Window] | None) -> Table:
    rows = [
        (
            f"{datetime.fromtimestamp(window.began_epoch_seconds, UTC):%Y-%m-%d %H:%M:%S}",
            window.model,
            shown(window.duration_seconds, "s"),
            shown(window.metered_joules, "J"),
            shown(window.predicted_joules, "J"),
            shown(window.error_joules, "J"),
            f"{window.error_ratio:+.1%}",
        )
        for window in windows or ()
    ]
    head = ("began (UTC)", "model", "seconds", "metered, J", "predicted, J", "off by, J", "error")
    caption = (
        "Trusted windows whose steps were predicted worst, by joules; energy of steps on one device, without idle."
    )
    return Table("Worst predicted windows", caption, head, rows)


def _hourly(uses: Sequence[Use], period: Period, pricing: Pricing) -> list[tuple[int, float | None, float | None]]:
    energy: dict[int, float] = {}
    for use in uses:
        joules = use.amounts.get("energy_joules")
        if joules is not None:
            energy[use.hour] = energy.get(use.hour, 0.0) + joules
    found = []
    for hour in range(*period):
        intensity = pricing.location.at(hour)
        found.append((hour, energy.get(hour), None if intensity is None else intensity.grams_per_kwh))
    return found


def _methods(pricing: Pricing) -> list[tuple[str, str]]:
    location, market = pricing.location, pricing.market
    pue = "not given: 1, the IT load alone" if pricing.node.pue is None else f"{pricing.node.pue:g}, once"
    node, auxiliary = (
        "not counted" if ratio is None else f"{ratio:g} of {whole}, once"
        for ratio, whole in (
            (pricing.node.host_ratio, "the devices' energy"),
            (pricing.node.auxiliary_ratio, "the energy of devices and host"),
        )
    )
    return [
        ("Operational", "energy of each hour x intensity of the hour in which it was used; no hour takes another's"),
        ("Intensity, location-based", f"{location.words}; {location.method}"),
        (
            "Intensity, market-based",
            "not given" if market is None else f"{market.words}; beside the other, never in SCI",
        ),
        ("SCI", _SCI),
        ("Tokens of use", _TOKENS),
        ("PUE", pue),
        ("Host (CPUs, memory)", node),
        ("Fans, network, losses", auxiliary),
    ]


def _gaps(total: dict[str, Figure]) -> list[str]:
    """What the figures themselves show to be unknown."""
    found = []
    value = {name: figure.value or 0.0 for name, figure in total.items()}
    for name, words in (
        ("hours_without_data", "hours of the period have no data: nothing is said of them, and they are not 0"),
        ("hours_without_measurement", "hours have predictions but no measurement: not in the metered figures"),
        (
            "hours_without_intensity",
            "hours have no known intensity, or not for all of the hour: their energy counts, their grams do not",
        ),
        ("hours_with_estimated_intensity", "hours have an intensity that is an estimate or the average of a year"),
    ):
        if value[name]:
            found.append(f"{value[name]:g} of {value['hours']:g} {words}")
    if total["carbon_grams"].value is None or total["sci_per_1000_tokens_grams"].value is None:
        lacking = (
            "the embodied carbon of some device" if total["embodied_busy_grams"].missing_hours else "tokens or grams"
        )
        found.append(f"SCI or a total needs what is not known here: {lacking}")
    if total["operational_market_grams"].value is None:
        found.append("market-based grams: no market intensity was given")
    return found
