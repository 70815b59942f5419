"""``llmco2 report``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import click
from rich.console import Console

from llmco2_vllm.cli.options import FiniteRange
from llmco2_vllm.cli.progress import watched
from llmco2_vllm.core.embodied import LIFETIME_YEARS, EmbodiedModel
from llmco2_vllm.core.intensity import Method
from llmco2_vllm.reporting import prometheus, stored
from llmco2_vllm.reporting.figures import functional_unit
from llmco2_vllm.reporting.held import EmbodiedChoice
from llmco2_vllm.reporting.hours import Record, Selection
from llmco2_vllm.reporting.pricing import SiteChoice, open_pricing
from llmco2_vllm.reporting.report import Report, make_report
from llmco2_vllm.reporting.writing import markdown, tidy_csv
from llmco2_vllm.store import reading
from llmco2_vllm.store.database import count

_SUFFIXES: Final = {".html": "html", ".htm": "html", ".csv": "csv", ".md": "markdown"}
_FORMATS = ("markdown", "csv", "html")
_DAY = click.DateTime(["%Y-%m-%d"])
_YEARS = FiniteRange(*LIFETIME_YEARS)
_RATIO = FiniteRange(0, 5)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Question:
    """What was asked for. samples, prometheus: where it is read from, one of the two. match: of Prometheus's labels."""

    samples: Path | None
    prometheus: str | None
    selection: Selection
    site: SiteChoice
    embodied: str | None
    lifetimes: tuple[float, float]
    units: tuple[str, ...]
    match: str = ""

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.prometheus is None):
            raise ValueError("--samples or --prometheus is needed, one of the two")
        if self.prometheus is not None and self.embodied not in (None, "none"):
            raise ValueError("--embodied is for --samples; Prometheus has what the servers counted, or none")
        if self.match:
            if self.prometheus is None:
                raise ValueError("--match is for --prometheus; samples have no labels")
            prometheus.check_match(self.match)


@click.command()
@click.option("--samples", type=click.Path(path_type=Path), help="Folder of samples, or the file in it.")
@click.option("--prometheus", metavar="URL", help="Prometheus that scrapes the servers: http://HOST:9090.")
@click.option("--match", default="", metavar="MATCHERS", help='Only these series: \'instance="a",job=~"x.*"\'.')
@click.option(
    "--from",
    "first",
    type=_DAY,
    metavar="YYYY-MM-DD",
    help="First day, UTC. [samples: all; Prometheus: the last seven days]",
)
@click.option("--to", "last", type=_DAY, metavar="YYYY-MM-DD", help="Last day, UTC, included.")
@click.option("--model", help="Only this model: its name, of samples the begin of its fingerprint.")
@click.option("--zone", help="Grid zone, as Electricity Maps names it: FR, US-CAL-CISO.")
@click.option("--region", help="Cloud region instead of a zone: aws:eu-west-3. Its PUE is taken, where one is known.")
@click.option("--intensity", type=FiniteRange(0, 3000), help="g CO2e/kWh, the same for every hour.")
@click.option("--intensity-file", type=_FILE, help="g CO2e/kWh by the hour: .csv, .csv.gz, .parquet.")
@click.option("--market-intensity", metavar="NUMBER|FILE", help="The same with contracts, shown beside the other.")
@click.option(
    "--method", type=click.Choice(get_args(Method)), default="average", show_default=True, help="Of intensity."
)
@click.option("--pue", type=FiniteRange(1, 5), help="Power usage effectiveness of the site.")
@click.option("--node-overhead", type=_RATIO, help="CPUs and memory as a fraction of the devices' energy.")
@click.option("--auxiliary", type=_RATIO, help="Fans, network, losses as a fraction of devices and host.")
@click.option("--embodied", type=click.Choice([*get_args(EmbodiedModel), "none"]), help="[samples: product]")
@click.option("--lifetime-years", type=_YEARS, default=4.0, show_default=True, help="Of devices.")
@click.option("--host-lifetime-years", type=_YEARS, default=4.0, show_default=True, help="Of their hosts.")
@click.option("--unit", "units", multiple=True, help="Unit for SCI: 'page=500 tokens', 'conversation=4 requests'.")
@click.option("--format", "form", type=click.Choice(_FORMATS), help="[by the name of the file, else markdown]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
def command(form: str | None, output: Path | None, **options: Any) -> None:
    """Report energy and carbon by day and model, from samples or Prometheus.

    Every hour's energy is multiplied by the intensity of that hour. What is not known is said, never 0; what is
    predicted is never among the metered figures.
    """
    try:
        write = _writer(form or _format_of(output))
        text = write(make(_question(options)))
        if output is None:
            click.echo(text, nl=False)
            return
        output.write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    Console(stderr=True).print(f"{output}: {len(text.encode()) / 1000:.0f} kB", highlight=False, markup=False)


def make(question: Question) -> Report:
    """Read, price, take figures. Raises ValueError, FileNotFoundError with one line."""
    units = [functional_unit(text) for text in question.units]
    record = _from_samples(question) if question.samples is not None else _from_prometheus(question)
    return make_report(record, open_pricing(question.site, record), units)


def _question(options: Mapping[str, Any]) -> Question:
    first, last = (None if day is None else day.date() for day in (options["first"], options["last"]))
    return Question(
        options["samples"],
        options["prometheus"],
        Selection(first, last, options["model"]),
        SiteChoice(
            options["zone"],
            options["region"],
            options["intensity"],
            options["intensity_file"],
            options["market_intensity"],
            options["method"],
            options["pue"],
            options["node_overhead"],
            options["auxiliary"],
        ),
        options["embodied"],
        (options["lifetime_years"], options["host_lifetime_years"]),
        options["units"],
        options["match"],
    )


def _from_samples(question: Question) -> Record:
    assert question.samples is not None  # as the question checks
    chosen = question.embodied or "product"
    model = next((name for name in get_args(EmbodiedModel) if name == chosen), None)
    file = reading.store_path(question.samples)
    with reading.reading(file) as connection:
        total = count(connection)
    found = watched("reading samples", reading.samples(file), total)
    return stored.read(found, question.selection, EmbodiedChoice(model, *question.lifetimes), file.name)


def _from_prometheus(question: Question) -> Record:
    assert question.prometheus is not None  # as the question checks
    period = prometheus.asked_period(question.selection, time.time())
    asked = prometheus.questions(period, question.match)
    if question.embodied == "none":
        asked = [one for one in asked if isinstance(one.of, str) or "embodied" not in one.of.metric]
    with closing(prometheus.Prometheus(question.prometheus)) as server:
        found = prometheus.read(server, question.selection, period, watched("asking Prometheus", asked, len(asked)))
    return replace(found, source=f"{found.source}, {question.match}") if question.match else found


def _format_of(output: Path | None) -> str:
    """The format that the name of a file asks for; Markdown without a suffix. Raises ValueError for another suffix."""
    suffix = "" if output is None else output.suffix.lower()
    if suffix and suffix not in _SUFFIXES:
        raise ValueError(
            f"-o {output}: {suffix} is no format; allowed: {', '.join(_SUFFIXES)}, or --format {'|'.join(_FORMATS)}"
        )
    return _SUFFIXES.get(suffix, "markdown")


def _writer(form: str) -> Callable[[Report], str]:
    """What writes a format, before anything is read. Raises ValueError when its library is not there."""
    if form != "html":
        return markdown if form == "markdown" else tidy_csv
    try:
        from llmco2_vllm.reporting.page import html
    except ModuleNotFoundError as error:
        raise ValueError(f"--format html: {error.name} is not installed; pip install jinja2") from None
    return html
