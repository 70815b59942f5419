"""Markdown, CSV and HTML of a report: the same figures, and a page that stands alone."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from llmco2_vllm.reporting.charts import charts
from llmco2_vllm.reporting.figures import ALL, functional_unit
from llmco2_vllm.reporting.held import EmbodiedChoice
from llmco2_vllm.reporting.hours import Selection
from llmco2_vllm.reporting.page import html
from llmco2_vllm.reporting.pricing import SiteChoice, open_pricing
from llmco2_vllm.reporting.report import Report, make_report, shown, tables
from llmco2_vllm.reporting.stored import read
from llmco2_vllm.reporting.writing import markdown, tidy_csv
from llmco2_vllm.store.sample import Sample
from tests.reporting.made import MODEL, OTHER, intensity_file, window


class Page(HTMLParser):
    """What a reader of the page meets: tags with their attributes, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def made(samples: Sequence[Sample], site: SiteChoice) -> Report:
    found = read(samples, Selection(), EmbodiedChoice(), "store")
    return make_report(found, open_pricing(site, found), [functional_unit("page=500 tokens")])


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Three days of two models; the second hour has no intensity."""
    file = intensity_file(tmp_path / "grid.csv", [120.5, None, *range(100, 170)])
    rows = [(30.0, 400, 0), (20.0, 0, 16), (25.0, 90, 8)]
    samples = [window(hour, 512.3 + hour, *rows, idle=100.0) for hour in range(60)]
    samples += [window(hour, 901.7 + hour, *rows, model=OTHER) for hour in range(30, 50)]
    return made(samples, SiteChoice(file=file, market="40", pue=1.2))


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| :--")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_markdown_and_html_hold_the_same_cells(report: Report) -> None:
    assert markdown_rows(markdown(report)) == Page(html(report)).rows


def test_the_csv_holds_every_figure_in_full_and_tables_show_them(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(tidy_csv(report))))
    assert len(rows) == len(report.figures)
    values = {(row["day"], row["model"], row["figure"]): row["value"] for row in rows}
    for key, figure in report.find().items():
        assert values[key] == ("" if figure.value is None else repr(figure.value))
    written = {row[0]: row for row in markdown_rows(markdown(report))}
    for day in report.period.days():
        for name in ("energy_joules", "operational_location_grams", "operational_market_grams", "carbon_grams"):
            assert shown(float(values[day, ALL, name]), "g") in [cell.rstrip("*") for cell in written[day]]
    for model in report.models:
        assert shown(float(values[ALL, model, "energy_joules"]), "J") in written[model]
    assert written["per page"][1] == shown(float(values[ALL, ALL, "sci_per_page_grams"]), "g")


def test_a_sum_that_lacks_hours_is_marked_in_its_row_and_no_other(report: Report) -> None:
    written = {row[0]: row for row in markdown_rows(markdown(report))}
    head, grams = written["day"], written["day"].index("location, g")
    assert "predicted, J" not in head
    assert written["2026-03-02"][grams].endswith("*") and not written["2026-03-03"][grams].endswith("*")
    assert not written["2026-03-02"][head.index("energy, J")].endswith("*")


def test_unknown_figures_have_no_value_in_the_csv_and_are_called_so_in_tables(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(tidy_csv(report))))
    assert {row["value"] for row in rows if row["figure"] == "sci_per_request_grams"} == {""}
    written = {row[0]: row for row in markdown_rows(markdown(report))}
    assert written["per request"][1] == "unknown"


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(report: Report) -> None:
    page = html(report)
    assert not re.search(r"https?:|//|@import|url\(", page)
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object"}


def test_the_page_follows_the_scheme_and_can_be_read_without_eyes(report: Report) -> None:
    page = html(report)
    assert "prefers-color-scheme: dark" in page
    tags = Page(page).tags
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) == 5
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    count = {name: sum(tag == name for tag, _ in tags) for name in ("table", "caption", "h1")}
    assert count["table"] == count["caption"] == len(tables(report)) and count["h1"] == 1
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    assert next(attributes for tag, attributes in tags if tag == "html")["lang"] == "en"


def test_names_from_outside_cannot_become_markup() -> None:
    name = "<script>alert(1)</script>|x"
    found = made([window(0, 10.0, model=name), window(1, 10.0)], SiteChoice(grams_per_kwh=5.0))
    assert "<script" not in html(found) and "<script" not in markdown(found)
    assert r"\|x" in markdown(found)


def test_a_page_of_a_year_stays_below_500_kilobytes() -> None:
    samples = [window(24 * day, 1000.0 + day, (30.0, 400, 0), model=m) for day in range(366) for m in (MODEL, OTHER)]
    found = made(samples, SiteChoice(grams_per_kwh=300.0, market="40"))
    assert len(list(found.period.days())) == 366
    assert len(html(found).encode()) < 500_000


def test_bars_are_as_high_as_their_values_and_stand_on_each_other(report: Report) -> None:
    chart = next(chart for chart in charts(report) if chart.title == "Metered energy by day")
    bars: dict[float, list[tuple[float, float]]] = {}
    for x, y, height in re.findall(r'<rect class="c\d" x="([\d.]+)" y="([\d.]+)"[^>]*height="([\d.]+)"', chart.svg):
        bars.setdefault(float(x), []).append((float(y), float(y) + float(height)))
    for layers in bars.values():
        for (top, _), (_, bottom) in pairwise(layers):
            assert bottom == pytest.approx(top, abs=0.2)
    found = report.find()
    wanted = [found[day, ALL, "energy_joules"].value or 0.0 for day in report.period.days()]
    drawn = [bars[x][0][1] - bars[x][-1][0] for x in sorted(bars)]
    assert [height / max(drawn) for height in drawn] == pytest.approx([v / max(wanted) for v in wanted], abs=0.01)
