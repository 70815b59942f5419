"""``llmco2 model``."""

from __future__ import annotations

from pathlib import Path

import click

from llmco2_vllm.cli.failures import one_line_failures


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def command(folder: Path | None) -> None:
    """Convert the demo's model into FOLDER (without it: the cache) unless it is there, and print where."""
    with one_line_failures():
        from llmco2_vllm.demo.weights import model_folder

        click.echo(model_folder(folder))
