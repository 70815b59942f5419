"""One Prometheus of each release beside one server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from tests.nvml_shim.fixtures import shim_folder
from tests.observability.scraping import Prometheus
from tests.prometheus import RELEASES, fetcher

__all__ = ["shim_folder"]

Scrape = Callable[[VllmServer], list[Prometheus]]


@pytest.fixture(scope="session")
def programs() -> list[Path]:
    """Prometheus of every release that can be had; skips where none can."""
    module, found, reasons = fetcher(), [], []
    for release in RELEASES:
        try:
            module.fetch(release)
            found.append(module.program(release, "prometheus"))
        except RuntimeError as error:
            reasons.append(str(error))
    if not found:
        pytest.skip(f"no Prometheus: {'; '.join(reasons)}")
    return found


@pytest.fixture(scope="module")
def scrape(programs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    """``scrape(server)``: every Prometheus there is, scraping it from now on until the module ends."""
    with ExitStack() as running:

        def start(server: VllmServer) -> list[Prometheus]:
            target = server.url.removeprefix("http://")
            return [
                running.enter_context(
                    Prometheus(program, tmp_path_factory.mktemp("prometheus"), choose_port(None), target)
                )
                for program in programs
            ]

        yield start
