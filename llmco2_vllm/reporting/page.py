"""A report as one HTML page that asks nothing of the network."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from llmco2_vllm.core.units import joules_to_kwh
from llmco2_vllm.reporting.charts import charts
from llmco2_vllm.reporting.figures import ALL, Figure
from llmco2_vllm.reporting.report import Report, shown, tables

_HEADLINES = (
    ("energy_joules", "energy, metered"),
    ("operational_location_grams", "operational, location-based"),
    ("operational_market_grams", "operational, market-based"),
    ("carbon_grams", "location-based + embodied"),
    ("sci_per_1000_tokens_grams", "SCI"),
)
_PREDICTED = (
    ("predicted_joules", "energy, predicted, not measured"),
    ("predicted_operational_grams", "operational, of predicted energy"),
)


def html(report: Report) -> str:
    """The page. All text is escaped."""
    found = report.find()
    heads = [(label, found[ALL, ALL, name]) for name, label in _HEADLINES]
    if heads[0][1].value is None:
        heads += [(label, found[ALL, ALL, name]) for name, label in _PREDICTED]
    return _template().render(
        report=report,
        headlines=[
            (label, shown(figure.value, figure.unit), _unit(figure))
            for label, figure in heads
            if figure.value is not None or figure.name != "operational_market_grams"
        ],
        charts=[chart._replace(svg=Markup(chart.svg)) for chart in charts(report)],
        tables=tables(report),
    )


def _unit(figure: Figure) -> str:
    if figure.value is None:
        return ""
    return f"J = {joules_to_kwh(figure.value):.4g} kWh" if figure.unit == "J" else figure.unit


@cache
def _template() -> Template:
    text = files("llmco2_vllm").joinpath("data", "reporting", "page.html").read_text("utf-8")
    # What is left out of the data must not leave a hole in the page.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
