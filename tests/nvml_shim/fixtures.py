"""Pytest fixture of the shim: ``from tests.nvml_shim.fixtures import shim_folder`` where it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nvml_shim import shim


@pytest.fixture(scope="session")
def shim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for LD_LIBRARY_PATH with the compiled shim; skips where there is no C compiler."""
    if shim.compiler() is None:
        pytest.skip("no C compiler to build the NVML shim with")
    return shim.build(tmp_path_factory.mktemp("nvml-shim"))
