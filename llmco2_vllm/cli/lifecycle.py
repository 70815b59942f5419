"""``llmco2 lifecycle``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from llmco2_vllm.core.units import convert
from llmco2_vllm.lifecycle.document import LifecycleError, examples, read_lifecycle
from llmco2_vllm.lifecycle.figures import Figures, Phase, figures

_OPERATIONAL_COLOUR, _EMBODIED_COLOUR = "#0b6e4f", "#d1495b"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), help="Draw the phases into this image file.")
def command(file: Path, as_json: bool, chart: Path | None) -> None:
    """Model the carbon of a language model's life by LLMCarbon: training, experimentation, inference, storage.

    FILE is YAML, or the name of a shipped example: gpt-3, gshard, switch, t5, xlm (rows of the paper), or megatron-145b
    (every phase). Figures are modelled, not measured.
    """
    path = file if file.exists() else examples().get(str(file), file)
    try:
        found = figures(read_lifecycle(path))
    except LifecycleError as error:
        raise click.ClickException(f"{file}: {error}") from None
    except OSError as error:
        names = ", ".join(examples())
        raise click.ClickException(f"{file}: {error.strerror}; expected a YAML file or one of {names}") from None
    if chart is not None:
        _draw(found, chart)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    console = Console()
    console.print(_table(found))
    for line in _lines(found):
        console.print(line, highlight=False, markup=False)


def _table(found: Figures) -> Table:
    caption = "operational, embodied and (embodied while) idle: t CO2e; MWh with PUE"
    # Without vertical lines it fits 80 columns; a figure must never be cut.
    table = Table(title=found.lifecycle.name, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for name in ("devices", "days", "MWh", "operational", "embodied", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in found.phases:
        table.add_row(phase.name, *_cells(phase))
    grams = (found.operational_grams, found.embodied_grams, found.embodied_idle_grams)
    energy = convert(sum(phase.energy_joules for phase in found.phases), "J", "MWh")
    table.add_section()
    table.add_row("total", "", "", f"{energy:.2f}", *(_tonnes(value) for value in grams))
    return table


def _cells(phase: Phase) -> tuple[str, ...]:
    devices = "-" if phase.devices is None else f"{phase.devices:g}"
    days = f"{convert(phase.duration_seconds, 's', 'day'):.2f}"
    energy = f"{convert(phase.energy_joules, 'J', 'MWh'):.2f}"
    grams = (phase.operational_grams, phase.embodied_grams, phase.embodied_idle_grams)
    return (devices, days, energy, *(_tonnes(value) for value in grams))


def _tonnes(grams: float | None) -> str:
    return "-" if grams is None else f"{convert(grams, 'g', 't'):.4g}"


def _lines(found: Figures) -> list[str]:
    published = found.lifecycle.published
    stated = published.model_dump() if published else {}
    lines = [
        f"{name}: {ratio:+.2%} of the published {stated[f'{name}_tonnes']:g} t"
        for name, ratio in found.deviations().items()
    ]
    if found.parallelism:
        layout = found.parallelism
        ranks = f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}"
        lines.append(f"parallelism: {ranks}; {layout.batch} sequences a batch")
    return [*lines, *found.notes, "modelled, not measured"]


def _draw(found: Figures, path: Path) -> None:
    """Bars of operational and embodied carbon by phase. Raises click.ClickException."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise click.ClickException("--chart: matplotlib is not installed; pip install matplotlib") from None
    names = [phase.name for phase in found.phases]
    operational = [convert(phase.operational_grams, "g", "t") for phase in found.phases]
    held = [(phase.embodied_grams or 0.0) + (phase.embodied_idle_grams or 0.0) for phase in found.phases]
    embodied = [convert(grams, "g", "t") for grams in held]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, operational, color=_OPERATIONAL_COLOUR, label="operational")
    axis.barh(names, embodied, left=operational, color=_EMBODIED_COLOUR, label="embodied")
    axis.invert_yaxis()
    unknown = [phase.name for phase in found.phases if phase.embodied_grams is None]
    missing = f"\nembodied not known: {', '.join(unknown)}" if unknown else ""
    axis.set(title=f"{found.lifecycle.name}, modelled", xlabel=f"t CO2e{missing}")
    axis.legend(frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--chart {path}: {' '.join(str(error).split())}") from None
