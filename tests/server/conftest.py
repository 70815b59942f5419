"""Child processes with vLLM in them, and what they answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.demo.server import ENVIRONMENT, OWN_PREFIX

ROOT = Path(__file__).resolve().parents[2]
CHILD_SECONDS = 300.0
Child = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def child() -> Child:
    """``child(module, *arguments, environment)``: the JSON on the last line a module of the tests prints."""

    def run(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(OWN_PREFIX)}
        answer = subprocess.run(
            [sys.executable, "-m", f"tests.server.{module}", *arguments],
            cwd=ROOT,
            env={**inherited, **ENVIRONMENT, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
        )
        assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
        document = json.loads(answer.stdout.splitlines()[-1])
        assert isinstance(document, dict)
        return document

    return run
