"""Fixtures shared by all tests: the demo's model and real servers, made by the demo's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from llmco2_vllm.demo.weights import model_folder

Serve = Callable[..., VllmServer]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of the demo's model, converted when it is not in the cache."""
    return model_folder()


@pytest.fixture(scope="module")
def serve(model_dir: Path) -> Iterator[Serve]:
    """``serve(arguments, environment)``: a server that answers on a free port, stopped after the module."""
    with ExitStack() as running:

        def start(arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> VllmServer:
            server = running.enter_context(VllmServer(model_dir, arguments, environment, choose_port(None)))
            server.wait_ready()
            return server

        yield start
