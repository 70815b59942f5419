"""The NVML shim for the tests of meters."""

from tests.nvml_shim.fixtures import shim_folder

__all__ = ["shim_folder"]
