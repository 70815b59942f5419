"""One server for the whole package that believes it runs on an H100, which is the shim's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from tests.nvml_shim import shim
from tests.nvml_shim.fixtures import shim_folder
from tests.server.clients import MODEL, Clients
from tests.server.metered.device import Device

__all__ = ["shim_folder"]

# Few at once, so that 200 requests queue as well as run.
ARGUMENTS = (
    *("--served-model-name", MODEL, "--max-num-seqs", "16", "--carbon"),
    *("--carbon-config.meter", "nvml", "--carbon-config.device", "h100-sxm", "--carbon-config.intensity", "56"),
)


@pytest.fixture(scope="package")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with shim.Control(tmp_path_factory.mktemp("device") / "control") as control:
        yield Device(control)


@pytest.fixture(scope="package")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server keeps samples in."""
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="package")
def server(model_dir: Path, shim_folder: Path, device: Device, samples: Path) -> Iterator[VllmServer]:
    environment = shim.environment(shim_folder, shim.Settings(devices=(shim.H100,)), control=device.control)
    arguments = (*ARGUMENTS, "--carbon-config.samples", str(samples))
    with VllmServer(model_dir, arguments, environment, choose_port(None)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="package")
def clients(server: VllmServer) -> Iterator[Clients]:
    with Clients(server.url) as clients:
        yield clients
