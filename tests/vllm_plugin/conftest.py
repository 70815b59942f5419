"""Fixtures over vLLM's real scheduler classes, no model needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.config import Settings
from llmco2_vllm.testing import ConstantPredictor
from llmco2_vllm.vllm_plugin import register


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a small Llama."""
    from tests.vllm_plugin import harness

    return harness.model_folder(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def make_engine(tiny_model: Path) -> Callable[..., Any]:
    """An engine loop over a scheduler with the hook, priced by hand-checkable constant rates."""
    from tests.vllm_plugin import harness

    register()

    def make(
        depth: int = 1, blocks: int = 20000, base: type | None = None, sample: Any = None, **options: Any
    ) -> harness.Engine:
        options.setdefault("async_scheduling", depth > 1)
        config = harness.make_config(tiny_model, Settings(), **options)
        scheduler = harness.make_scheduler(config, blocks, base)
        scheduler.llmco2_hook.monitor.predictor = ConstantPredictor()
        return harness.Engine(scheduler, depth, sample)

    return make
