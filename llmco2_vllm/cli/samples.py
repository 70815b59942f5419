"""``llmco2 samples``."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from llmco2_vllm.cli.progress import watched
from llmco2_vllm.store import reading
from llmco2_vllm.store.database import FILE_NAME, count, used_bytes
from llmco2_vllm.store.file import StoreFile
from llmco2_vllm.store.sample import COLUMNS, STEP_COLUMNS, Sample

_COMMIT_SAMPLES = 256
# The last that a date has a name for.
_LAST_EPOCH_SECONDS = 253402300799.0
_folder = click.option(
    "--folder",
    required=True,
    envvar="LLMCO2_SAMPLES",
    type=click.Path(path_type=Path),
    help="Folder given to the server as samples, or the file in it. [env: LLMCO2_SAMPLES]",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, a sample a line.")


@click.group()
def command() -> None:
    """List, show, export and import metered samples.

    A sample is one window of the meter: its energy, the counts of the steps inside it, and what they ran on.
    """


@command.command("list")
@_folder
@click.option("--last", default=20, type=click.IntRange(1, 1_000_000), show_default=True, help="Samples to list.")
@_as_json
def list_samples(folder: Path, last: int, as_json: bool) -> None:
    """List the last samples, and say what the file holds."""
    with _one_line_failures():
        found = reading.latest(folder, last)
        with reading.reading(folder) as connection:
            total, size = count(connection), used_bytes(connection)
    if as_json:
        for stored in found:
            click.echo(json.dumps(_summary(stored)))
        return
    table = Table("#", "began (UTC)", "device", "model", "meter")
    for name in ("seconds", "joules", "+-", "error", "steps", "prefill", "decode"):
        table.add_column(name, justify="right")
    table.add_column("doubt")
    for stored in found:
        table.add_row(*_cells(stored))
    screen = Console()
    screen.print(table)
    screen.print(f"{len(found)} of {total} samples, {size / 2**20:.1f} MiB", highlight=False)


@command.command()
@_folder
@click.argument("number", type=click.IntRange(1, 2**62))
@_as_json
def show(folder: Path, number: int, as_json: bool) -> None:
    """Show one sample with its steps, by its number in the list."""
    with _one_line_failures():
        sample = reading.sample(folder, number)
    if sample is None:
        raise click.ClickException(f"NUMBER: no sample {number} in {reading.store_path(folder)}; llmco2 samples list")
    fields = _fields(sample)
    if as_json:
        steps = [{k: v for k, v in zip(STEP_COLUMNS, row, strict=True) if v == v} for row in sample.steps.tolist()]
        click.echo(json.dumps({"number": number, **fields, "steps": steps}))
        return
    screen = Console()
    table = Table("field", "value", title=f"Sample {number}")
    for name, value in fields.items():
        table.add_row(name, str(value))
    screen.print(table)
    steps_table = Table(*(name.replace("_", " ") for name in STEP_COLUMNS), title="Steps")
    for row in sample.steps.tolist():
        steps_table.add_row(*("-" if value != value else f"{value:.6g}" for value in row))
    screen.print(steps_table)


@command.command()
@_folder
@click.option("--parquet", "file", required=True, type=click.Path(dir_okay=False, path_type=Path), help="To write.")
@click.option("--trusted", is_flag=True, help="Leave out samples in doubt.")
def export(folder: Path, file: Path, trusted: bool) -> None:
    """Write all samples to a Parquet file."""
    with _one_line_failures():
        from llmco2_vllm.store.parquet import write_parquet

        with reading.reading(folder) as connection:
            total = count(connection)
        written = write_parquet(watched("exporting", reading.samples(folder, trusted), total), file)
    Console(stderr=True).print(f"{file}: {written} samples", highlight=False, markup=False)


@command.command("import")
@_folder
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_samples(folder: Path, file: Path) -> None:
    """Add the samples of an exported Parquet file; those already there are skipped.

    The file is read once before, so that one that is faulty adds nothing. A server that writes to the folder prunes
    what exceeds its capacity.
    """
    with _one_line_failures():
        from llmco2_vllm.store.parquet import read_parquet

        total = sum(1 for _ in read_parquet(file))
        path = folder if folder.is_file() else folder / FILE_NAME
        added = _add(path, watched("importing", read_parquet(file), total))
    screen = Console(stderr=True)
    screen.print(f"{path}: {added} samples added, {total - added} skipped", highlight=False, markup=False)


def _add(path: Path, found: Iterable[Sample]) -> int:
    """Commit samples in batches; how many were new."""
    target, added, rest = StoreFile(path, sys.maxsize), 0, iter(found)
    try:
        while batch := list(islice(rest, _COMMIT_SAMPLES)):
            added += target.write(batch).added
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        target.close()
    return added


@contextmanager
def _one_line_failures() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'llmco2-vllm[samples]'") from None
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _fields(sample: Sample) -> dict[str, Any]:
    """All but the steps; what is unknown is left out."""
    pairs = zip(COLUMNS, sample.values, strict=True)
    return {column.name: value for column, value in pairs if value is not None}


def _summary(stored: reading.Stored) -> dict[str, Any]:
    return {"number": stored.number, **_fields(stored.sample), "steps": len(stored.sample.steps)}


def _cells(stored: reading.Stored) -> tuple[str, ...]:
    sample, error = stored.sample, stored.sample.relative_error
    prefill, _, decode, _ = sample.regime
    began = datetime.fromtimestamp(min(sample.began_epoch_seconds, _LAST_EPOCH_SECONDS), UTC)
    return (
        str(stored.number),
        f"{began:%Y-%m-%d %H:%M:%S}",
        f"{sample.devices} x {sample.device}",
        sample.model_fingerprint[:8],
        sample.meter,
        f"{sample.duration_seconds:.3f}",
        f"{sample.energy_joules:.2f}",
        f"{sample.sigma_joules:.2f}",
        "-" if error is None else f"{error:+.1%}",
        str(len(sample.steps)),
        f"{prefill:.1f}",
        f"{decode:.1f}",
        sample.doubt,
    )
