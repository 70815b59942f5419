"""Fixtures over vLLM's real scheduler classes, no model needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llmco2_vllm.config import Settings
from llmco2_vllm.telemetry.metrics import Identity, Recorder
from llmco2_vllm.testing import ConstantPredictor
from llmco2_vllm.vllm_plugin import frontend, output_path, register


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


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> frontend.CarbonFrontEnd:
    """This process as a front end, with metrics of its own; it is none any more after the test."""
    monkeypatch.setattr(output_path, "_front_end", None)
    model = SimpleNamespace(served_model_name="tiny")
    output_path.enable(Settings(intensity=100.0), SimpleNamespace(model_config=model))
    front = output_path.front_end()
    front._recorder = Recorder(Identity("tiny", "0", "0"), CollectorRegistry())
    return front


@pytest.fixture
def log_records() -> Iterator[list[logging.LogRecord]]:
    """What our logger says; vLLM's own logging set-up keeps it from the root logger."""
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Collector()
    logger = logging.getLogger("vllm.llmco2")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
