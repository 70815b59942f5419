"""``llmco2 demo``."""

from __future__ import annotations

from pathlib import Path

import click

from llmco2_vllm.cli.failures import one_line_failures


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the server; without it a free one.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a model vLLM can serve; without it SmolLM2-135M-Instruct.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, progress on stderr.")
@click.option("--serve", is_flag=True, help="Send nothing; leave the server up until Ctrl-C.")
def command(port: int | None, model: Path | None, as_json: bool, serve: bool) -> None:
    """Start vllm serve MODEL --carbon, send real requests and show what they cost."""
    with one_line_failures():
        from llmco2_vllm.demo import run

        options = run.Options(port=port, model=model, json=as_json)
        if serve:
            run.serve(options)
        elif document := run.run_demo(options):
            click.echo(document)
