"""One server for the whole package, started with the flags in the forms an operator types them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from tests.server.clients import MODEL, Clients

KEY = "sesame"
ARGUMENTS = (
    *("--api-key", KEY, "--served-model-name", MODEL, "--carbon"),
    *("--carbon-config", '{"pue": 1.2, "intensity": 56}'),
    *("--carbon-config.zone", "FR", "--carbon-config.headers", "true", "--carbon-config.switch=true"),
)


@pytest.fixture(scope="package")
def server(model_dir: Path) -> Iterator[VllmServer]:
    with VllmServer(model_dir, ARGUMENTS, None, choose_port(None)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="package")
def clients(server: VllmServer) -> Iterator[Clients]:
    with Clients(server.url, KEY) as clients:
        yield clients
