"""How a command ends when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def one_line_failures() -> Iterator[None]:
    """Turn a DemoError, a missing package or an API error into one line on stderr and exit status 1."""
    from llmco2_vllm.demo.preflight import DemoError

    try:
        yield
    except DemoError as error:
        if error.detail:
            click.echo(error.detail, err=True)
        raise click.ClickException(str(error)) from None
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'llmco2-vllm[demo]'") from None
