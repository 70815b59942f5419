"""``llmco2 evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from llmco2_vllm.training.dataset import BadRowsError, Dataset, read

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MEANINGS = {
    "n": "values scored",
    "mape": "mean absolute error, %",
    "median_ape": "median absolute error, %",
    "eba_5": "share at most 5 % off, %",
    "eba_10": "share at most 10 % off, %",
    "eba_30": "share at most 30 % off, %",
    "bias": "mean signed error, %",
    "coverage_90": "share inside the 90 % interval, %",
}


class BadTableError(click.ClickException):
    """A table that cannot be scored as it is."""

    exit_code = 2


@click.command()
@click.option("--data", required=True, type=_FILE, help="Measurements, CSV.")
@click.option("--model-configs", type=_FILE, help="Sizes by model name; by default model_configs.json beside the data.")
@click.option("--bundle", "bundle_file", type=_FILE, help="Bundle to score; by default the one shipped.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out instead of stopping.")
def command(data: Path, model_configs: Path | None, bundle_file: Path | None, as_json: bool, skip_bad: bool) -> None:
    """Score predictions against a table of measurements.

    The table has the columns of mlenergy_v3.csv, mlenergy_v2.csv, splitwise_latency.csv or llmco2_a100.csv. Step energy
    is scored where there is one, else time: decode step times and prefill times, pooled. The labels of llmco2_a100.csv
    have no known unit and say nothing about energy; curves are fitted to its train rows (or over five folds) and scored
    on the others, without the bundle. Scores are in percent.
    """
    dataset = _read(data, model_configs, skip_bad)
    for row in dataset.skipped:
        click.echo(f"skipped {row}", err=True)
    if dataset.left_out:
        click.echo(f"left out: {len(dataset.left_out)} rows known to be no measurements", err=True)
    from llmco2_vllm.predictor.bundle import Bundle
    from llmco2_vllm.training.score_tables import score_table
    from llmco2_vllm.training.sources import LLMCO2

    try:
        bundle = None if dataset.source == LLMCO2 else Bundle.load(bundle_file)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--bundle: {error}") from None
    try:
        target = score_table(dataset, bundle)
    except ValueError as error:
        raise BadTableError(f"{data}: {error}") from None
    click.echo(f"target: {target.name}", err=True)
    scores = target.scores.to_dict()
    if as_json:
        click.echo(json.dumps(scores))
        return
    table = Table("score", "", "meaning", title=target.name)
    for name, value in scores.items():
        shown = "-" if value is None else str(value) if name == "n" else f"{value:.2f}"
        table.add_row(name, shown, _MEANINGS[name])
    Console().print(table)


def _read(data: Path, model_configs: Path | None, skip_bad: bool) -> Dataset:
    try:
        return read(data, model_configs, skip_bad)
    except BadRowsError as error:
        raise BadTableError(f"{error}\n--skip-bad leaves them out") from None
    except (OSError, ValueError) as error:
        raise BadTableError(str(error)) from None
