"""Fixtures of the providers' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.live import Patience
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import NOW
from tests.grid.server import Remote, remote_server

SECRET = "em-secret-3141592653"
PASSWORD = "wt-secret-2718281828"
ENVIRONMENT = {"ELECTRICITY_MAPS_API_KEY": SECRET, "WATTTIME_USER": "somebody", "WATTTIME_PASSWORD": PASSWORD}
ZONES = {"electricity-maps": "DE", "watttime": "CAISO_NORTH", "uk-carbon-intensity": "GB"}

Opener = Callable[..., Chain]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def remote() -> Iterator[Remote]:
    with remote_server() as running:
        running.now_epoch_seconds = NOW
        yield running


@pytest.fixture
def opened(remote: Remote, clock: FakeClock, tmp_path: Path) -> Opener:
    """``opened(provider, **choice)``: a chain that asks the test's server, with keys and a cache of its own."""

    def make(provider: str, **choice: Any) -> Chain:
        choice = {"zone": ZONES[provider], "provider_url": remote.base_url, "cache": tmp_path / "cache"} | choice
        patience = Patience(retry_seconds=30.0, hold_seconds=6 * 3600.0)
        return open_chain(GridChoice(provider, patience=patience, **choice), ENVIRONMENT, clock)

    return make
