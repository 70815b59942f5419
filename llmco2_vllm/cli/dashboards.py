"""``llmco2 dashboards``."""

from __future__ import annotations

from pathlib import Path

import click

from llmco2_vllm.cli.options import http_url
from llmco2_vllm.dashboards import build


@click.command()
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to; in a checkout, without it, where the project keeps them.",
)
@click.option(
    "--runbooks-url",
    type=http_url,
    metavar="URL",
    help="Where your operators read docs/runbooks.md; alerts refer to it. [its path in the project]",
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 and a line for each file that is stale.")
def command(folder: Path | None, runbooks_url: str | None, check: bool) -> None:
    """Write the Grafana dashboard, Prometheus rules and the list of metrics, all made from the metric table."""
    try:
        places = build.places(folder)
        if not check:
            for path in build.write(places, runbooks_url):
                click.echo(f"{path}: written")
            return
        found = build.stale(places, runbooks_url)
    except FileNotFoundError as error:
        raise click.ClickException(f"-o: {error}; give a folder to write to") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    for path in found:
        click.echo(f"{path}: stale; run llmco2 dashboards", err=True)
    if found:
        raise SystemExit(1)
