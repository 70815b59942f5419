"""The GPU recorder's scripts as they are typed, and a card that could have been recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gpu_record
from benchmarks.gpu_provenance import Identity
from benchmarks.gpu_record import Recording

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600.0
CARD = Identity("NVIDIA H200", "GPU-1f2e", "580.1", "instant power", 700.0, "/usr/lib/libnvidia-ml.so.580.1", "ab", ())


def run(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """A script as it is typed."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=SECONDS
    )


def refused(answer: Any) -> str:
    """The one line of a run that was refused."""
    assert answer.returncode == 2, answer.stdout + answer.stderr
    (line,) = answer.stderr.strip().splitlines()
    return str(line)


def recording(folder: Path, identity: Identity = CARD, **options: Any) -> Recording:
    """An empty recording of ``identity``; options: of the command line."""
    arguments = gpu_record.parse(["--write", str(folder)])
    return Recording(folder, 0, identity, Namespace(**{**vars(arguments), **options}), lambda text: None)
