"""Installed and not asked for, the plugin changes nothing; asked for, it does not change what vLLM compiles."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Child

pytestmark = pytest.mark.engine

BUDGET_SECONDS = 0.050


@pytest.fixture(scope="module")
def bare(child: Child, model_dir: Path) -> dict[str, Any]:
    """vLLM without any plugin."""
    return child("inert_child", str(model_dir), environment={"VLLM_PLUGINS": ""})


@pytest.fixture(scope="module")
def installed(child: Child, model_dir: Path) -> dict[str, Any]:
    """vLLM with the plugin, first off and then on."""
    return child("inert_child", str(model_dir), environment={"VLLM_PLUGINS": "llmco2_vllm"})


def test_off_the_configuration_is_that_of_vllm_without_the_plugin(
    bare: dict[str, Any], installed: dict[str, Any]
) -> None:
    assert installed["off"] == bare["off"]
    assert installed["off"]["scheduler"].startswith("vllm.v1.core.sched.")
    assert installed["off"]["patched"] == []


def test_on_nothing_is_compiled_anew(bare: dict[str, Any], installed: dict[str, Any]) -> None:
    on = installed["on"]
    assert on["hash"] == bare["off"]["hash"]
    assert on["additional_config"] == bare["off"]["additional_config"]
    assert on["scheduler"] != bare["off"]["scheduler"]
    assert len(on["patched"]) == 4


def test_off_only_the_entry_point_is_imported(installed: dict[str, Any]) -> None:
    entry_point = {"", ".vllm_plugin", ".vllm_plugin.compat", ".vllm_plugin.flags", ".config"}
    assert set(installed["modules"]) <= {f"llmco2_vllm{name}" for name in entry_point}


def test_registering_stays_within_its_budget(bare: dict[str, Any]) -> None:
    seconds = statistics.median(bare["registering_seconds"])
    print(f"import and register(): {1000 * seconds:.1f} ms of CPU, median of {len(bare['registering_seconds'])}")
    assert seconds < BUDGET_SECONDS
