"""What ``make demo`` and ``make serve`` do, from the model to the report."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmco2_vllm.demo import report
from llmco2_vllm.demo.preflight import check_memory, choose_port
from llmco2_vllm.demo.requests import send_all
from llmco2_vllm.demo.server import STAGES, VllmServer
from llmco2_vllm.demo.weights import model_folder

# A site in France: the yearly average of its grid in g CO2e/kWh as an operator would state it.
CARBON_ARGUMENTS = ("--carbon", "--carbon-config", '{"zone": "FR", "intensity": 56, "pue": 1.2}')
READY_SECONDS = 400.0


@dataclass(frozen=True)
class Options:
    """``port`` None: a free one. ``model`` None: the demo's own, converted when needed."""

    port: int | None = None
    model: Path | None = None
    json: bool = False


def run_demo(options: Options) -> str | None:
    """Start a server, send real requests, report, stop it. Returns the JSON document when asked for one.

    Progress goes to the terminal (stderr with JSON). Raises DemoError.
    """
    console = report.console(to_stderr=options.json)
    with _running(options, console) as server:
        answers, metrics = send_all(server.url, lambda name: console.print(f"Sending {name}"))
    if options.json:
        return report.document(server.command_line(), answers, metrics)
    console.print(report.report(answers, metrics))
    return None


def serve(options: Options) -> None:
    """Start a server and leave it up until Ctrl-C or until it ends. Raises DemoError."""
    console = report.console()
    with _running(options, console) as server:
        console.print(f"Serving at {server.url}/v1, metrics at {server.url}/metrics, log in {server.log_path}. Try:")
        console.print(
            f"  curl {server.url}/v1/completions -H 'Content-Type: application/json' "
            f'-d \'{{"prompt": "The capital of France is", "max_tokens": 16}}\'',
            soft_wrap=True,
        )
        console.print("Ctrl-C stops it.")
        try:
            server.wait_stopped()
        except KeyboardInterrupt:
            console.print()


def prepare_model(console: Console, folder: Path | None = None) -> Path:
    """The folder of the demo's model, with a word on the screen while it is converted. Raises DemoError."""
    with console.status("Preparing the model (converted once, about half a minute)"):
        model = model_folder(folder)
    console.print(f"Model in {model}")
    return model


@contextmanager
def _running(options: Options, console: Console) -> Iterator[VllmServer]:
    """A server that answers; it is stopped however this ends, a signal included."""
    port = choose_port(options.port)
    check_memory()
    model = options.model or prepare_model(console)
    server = VllmServer(model, ("--served-model-name", model.name, *CARBON_ARGUMENTS), port=port)
    console.print(f"\n$ {server.command_line()}\n", soft_wrap=True)
    with _signals_as_exceptions(), server:
        _wait(server, console)
        yield server
        console.print("Stopping the server")


def _wait(server: VllmServer, console: Console) -> None:
    began = time.monotonic()
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting vLLM", total=len(STAGES))
        shown = ""

        def on_stage(number: int, name: str) -> None:
            nonlocal shown
            progress.update(task, completed=number, description=name)
            if name != shown and not console.is_terminal:
                console.print(f"  {time.monotonic() - began:4.0f} s  {name}")
            shown = name

        server.wait_ready(READY_SECONDS, on_stage)
    console.print(f"Server ready after {time.monotonic() - began:.0f} s")


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that nothing is left running."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
