"""Prometheus and promtool of Debian's packages, fetched by dev/prometheus.py: fixtures for those who ask for them."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ("host", "sid")
SECONDS = 120.0
Promtool = Callable[..., "subprocess.CompletedProcess[str]"]


def fetcher() -> ModuleType:
    """dev/prometheus.py, which lies in no package."""
    path = ROOT / "dev" / "prometheus.py"
    spec = importlib.util.spec_from_file_location("dev_prometheus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetched(release: str, name: str) -> Path:
    """A program of a release; skips the test where it cannot be had."""
    found = fetcher()
    try:
        found.fetch(release)
    except RuntimeError as error:
        pytest.skip(f"no {name} of release {release}: {error}")
    path = found.program(release, name)
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="session", params=RELEASES)
def promtool(request: pytest.FixtureRequest) -> Promtool:
    """``promtool(*arguments, text)``: what promtool answers, of each release."""
    program = fetched(request.param, "promtool")

    def run(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS)

    return run
