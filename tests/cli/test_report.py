"""``llmco2 report``: what it writes where, and errors of one line."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from llmco2_vllm.cli.main import main
from llmco2_vllm.cli.options import FiniteRange
from tests.reporting.made import MODEL, OTHER, intensity_file, stored, window
from tests.reporting.prometheus_server import prometheus_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of two days and two models."""
    samples = [window(hour, 1000.0 + hour, (30.0, 400, 0), (20.0, 0, 16), idle=99.0) for hour in range(30)]
    return stored(tmp_path / "samples", [*samples, window(25, 777.0, model=OTHER)])


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)], env={"COLUMNS": "140"})


def error(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_markdown_goes_to_the_terminal(folder: Path) -> None:
    result = run("--samples", folder, "--intensity", 100)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# Carbon report\n")
    for title in ("Totals", "By day", "By model", "Worst predicted windows", "Coverage", "Method", "Not known"):
        assert f"\n## {title}\n" in result.stdout
    assert f"| {MODEL} |" in result.stdout and "| 2026-03-03 |" in result.stdout


@pytest.mark.parametrize(("name", "begin"), [("a.html", "<!DOCTYPE html>"), ("a.csv", "day,model,"), ("a", "# Carb")])
def test_the_name_of_the_file_says_the_format(folder: Path, name: str, begin: str) -> None:
    file = folder / name
    result = run("--samples", folder, "-o", file)
    assert result.exit_code == 0 and result.stdout == ""
    assert file.read_text().startswith(begin)
    assert str(file) in result.stderr.replace("\n", "")


def test_the_format_asked_for_is_the_one_that_is_written(folder: Path) -> None:
    assert run("--samples", folder, "--format", "csv").stdout.startswith("day,model,figure,unit,value,missing_hours\n")


def test_options_reach_the_figures(folder: Path, tmp_path: Path) -> None:
    file = intensity_file(tmp_path / "grid.csv", [200.0] * 30)
    options = ("--pue", 1.5, "--node-overhead", 0.2, "--auxiliary", 0.1, "--market-intensity", 50, "--format", "csv")
    chosen = ("--model", MODEL[:4], "--from", "2026-03-03", "--to", "2026-03-03", "--unit", "page=500 tokens")
    result = run("--samples", folder, "--intensity-file", file, *options, *chosen)
    assert result.exit_code == 0, result.output
    rows = {(r["day"], r["model"], r["figure"]): r["value"] for r in csv.DictReader(result.stdout.splitlines())}
    assert {model for _, model, _ in rows} == {"all", MODEL} and {day for day, _, _ in rows} == {"all", "2026-03-03"}
    energy = sum(1000.0 + hour for hour in range(24, 30))
    assert float(rows["all", "all", "energy_joules"]) == pytest.approx(energy)
    grams = energy / 3.6e6 * 1.2 * 1.1 * 1.5
    assert float(rows["all", "all", "operational_location_grams"]) == pytest.approx(200 * grams)
    assert float(rows["all", "all", "operational_market_grams"]) == pytest.approx(50 * grams)
    assert float(rows["all", "all", "sci_per_page_grams"]) > 0


def test_the_pue_of_a_region_is_taken_where_none_is_given(folder: Path) -> None:
    found = run("--samples", folder, "--region", "aws:eu-west-3")
    assert found.exit_code == 0, found.output
    assert "in FR" in found.stdout and "of aws:eu-west-3" in found.stdout


def test_without_embodied_carbon_there_is_no_sci(folder: Path) -> None:
    found = run("--samples", folder, "--embodied", "none").stdout
    assert "| per 1000 tokens | unknown |" in found and "embodied carbon was not asked for" in found


def test_prometheus_is_asked_and_its_figures_are_written() -> None:
    with prometheus_server() as server:
        hours = range(491_000, 491_048)
        server.add("llmco2_metered_energy_joules_total", dict.fromkeys(hours, 7.2e6), model_name="m")
        server.add("llmco2_embodied_carbon_grams_total", dict.fromkeys(hours, 1.0), model_name="m", state="busy")
        options = ("--from", "2026-01-05", "--to", "2026-01-08", "--intensity", 100, "--embodied", "none")
        result = run("--prometheus", server.url, *options)
        assert result.exit_code == 0, result.output
        assert "| operational, location-based | 9,600 | g CO2e | 0 |" in result.stdout
        assert not [one for one in server.asked if "embodied" in one["query"]]
        server.asked.clear()
        chosen = run("--prometheus", server.url, *options, "--match", 'job=""')
        assert f'Source: Prometheus, {server.url[7:]}, job="".' in chosen.stdout
        assert server.asked and all('{job=""}[1h]' in one["query"] for one in server.asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--samples or --prometheus is needed, one of the two"),
        (("--samples", "x", "--prometheus", "http://x"), "--samples or --prometheus is needed, one of the two"),
        (("--samples", "/nowhere"), "/nowhere: no such file; samples are stored there"),
        (("--prometheus", "http://127.0.0.1:1"), "prometheus 127.0.0.1:1 is not reachable (ConnectError)"),
        (("--samples", "x", "--match", 'job="x"'), "--match is for --prometheus"),
        (("--prometheus", "http://x", "--match", "job=x"), "match='job=x' is not possible; allowed: label matchers"),
        (("--prometheus", "x"), "the address is not possible; allowed: http://HOST:PORT"),
        (("--prometheus", "http://x", "--embodied", "product"), "--embodied is for --samples"),
    ],
)
def test_a_source_that_is_none_is_told_in_one_line(options: tuple[str, ...], message: str) -> None:
    assert message in error(run(*options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "ff"), f"model='ff' is not in the data; allowed: {MODEL}, {OTHER}"),
        (("--unit", "page=many"), "unit='page=many' is not possible; allowed: page=500 tokens"),
        (("--zone", "XX"), "zone='XX' is not known; allowed:"),
        (("--zone", "fr"), "near: FR"),
        (
            ("-o", "x.pdf"),
            "-o x.pdf: .pdf is no format; allowed: .html, .htm, .csv, .md, or --format markdown|csv|html",
        ),
        (("--region", "aws:mars"), "region='aws:mars' is not in the table"),
        (("--zone", "FR", "--region", "aws:eu-west-3"), "allowed: one of them"),
        (("--market-intensity", "nowhere.csv"), "market-intensity: intensity_file='nowhere.csv' cannot be read"),
        (("--market-intensity", "-3"), "market-intensity: intensity=-3.0 is not possible; allowed: 0 to 3000"),
        (("--from", "2026-03-09"), "none of its 31 samples lies in the days asked for"),
        (("--from", "2026-03-03", "--to", "2026-03-02"), "to=2026-03-02 is not possible; allowed: 2026-03-03"),
        (("--market-intensity", "nan"), "market-intensity: intensity=nan is not possible"),
        (("--method", "marginal"), "method=marginal needs intensity or intensity-file"),
        (("-o", "/nowhere/report.md"), "No such file or directory: '/nowhere/report.md'"),
    ],
)
def test_an_option_that_is_not_possible_is_told_in_one_line(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in error(run("--samples", folder, *options))


def test_an_empty_store_and_a_file_that_is_none_are_told_in_one_line(tmp_path: Path) -> None:
    assert "samples.sqlite: no samples" in error(run("--samples", stored(tmp_path / "empty", [])))
    file = tmp_path / "other.sqlite"
    file.write_bytes(b"not a database" * 100)
    assert "other.sqlite: not readable as samples" in error(run("--samples", file))


def test_without_jinja2_html_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llmco2_vllm.reporting.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "--format html: jinja2 is not installed" in error(run("--samples", folder, "--format", "html"))


def test_the_format_is_known_to_be_possible_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nothing"
    assert "x.pdf: .pdf is no format" in error(run("--samples", missing, "-o", "x.pdf"))
    monkeypatch.delitem(sys.modules, "llmco2_vllm.reporting.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install jinja2" in error(run("--samples", missing, "-o", "x.html"))


def test_a_format_that_is_asked_for_goes_into_any_file(folder: Path) -> None:
    assert run("--samples", folder, "--format", "csv", "-o", folder / "x.pdf").exit_code == 0
    assert (folder / "x.pdf").read_text().startswith("day,model,")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "NaN"])
@pytest.mark.parametrize(
    "option",
    ["--intensity", "--pue", "--node-overhead", "--auxiliary", "--lifetime-years", "--host-lifetime-years"],
)
def test_a_number_that_is_none_is_refused_by_the_name_of_its_option(folder: Path, option: str, number: str) -> None:
    result = run("--samples", folder, option, number)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and f"Invalid value for '{option}'" in lines[0] and "range" in lines[0]


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_infinity_is_refused_where_there_is_no_upper_bound(number: str) -> None:
    with pytest.raises(click.BadParameter, match="a finite number in the range x>=1"):
        FiniteRange(1).convert(number, None, None)
    assert FiniteRange(1).convert("1e300", None, None) == 1e300


def test_help_names_what_can_be_asked() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("--samples", "--prometheus", "--market-intensity", "--unit"))
