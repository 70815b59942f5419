"""An exception planted in any of our functions leaves the server serving, with one log line and a counted failure."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore

from llmco2_vllm.core import ledgers
from llmco2_vllm.vllm_plugin import frontend, register
from tests.vllm_plugin import harness
from tests.vllm_plugin.serving import Deployment
from tests.vllm_plugin.test_frontend_contract import word_tokenizer

MODULES = (
    "vllm_plugin.engine",
    "vllm_plugin.hook",
    "vllm_plugin.translate",
    "vllm_plugin.frontend",
    "vllm_plugin.middleware",
    "vllm_plugin.splice",
    "assemble",
    "monitor",
    "core.ledgers",
    "core.carbon",
    "core.kernels",
    "telemetry.ledger",
    "telemetry.accounting",
    "telemetry.annotation",
    "telemetry.requests",
    "telemetry.metrics",
    "predictor.predict",
)


class Planted(RuntimeError):
    """Counts how often it was raised."""

    raised = 0

    def __init__(self) -> None:
        super().__init__("planted")
        Planted.raised += 1


# Their code runs with the globals of the function it replaces, hence the imports.
def _fail(*args: Any, **kwargs: Any) -> Any:
    from tests.vllm_plugin.test_fail_open import Planted

    raise Planted


async def _fail_later(*args: Any, **kwargs: Any) -> Any:
    from tests.vllm_plugin.test_fail_open import Planted

    raise Planted


def function_of(member: Any) -> FunctionType | None:
    """The function behind a member of a class or module."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, cached_property):
        member = member.func
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, FunctionType) else None


def functions() -> Iterator[tuple[str, FunctionType]]:
    """Every function and method written in the modules, by its name in the package."""
    for name in MODULES:
        module = importlib.import_module(f"llmco2_vllm.{name}")
        owners = [(name, module)] + [
            (f"{name}.{cls.__name__}", cls)
            for cls in vars(module).values()
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and not getattr(cls, "_is_protocol", False)
        ]
        for prefix, owner in owners:
            for attribute, member in list(vars(owner).items()):
                function = function_of(member)
                if function is not None and Path(function.__code__.co_filename) == Path(str(module.__file__)):
                    yield f"{prefix}.{attribute}", function


FUNCTIONS = dict(functions())

ELSEWHERE: dict[str, str] = {}
GUARDS: dict[str, str] = {}


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window, which reaches more of the kernels."""
    folder = tmp_path_factory.mktemp("tiny-mistral")
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    return harness.model_folder(folder, **changes)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def fresh_host() -> Iterator[None]:
    """vLLM without our wrappers at first, and sums that are begun anew within a test's few steps."""
    with pytest.MonkeyPatch.context() as patch:
        harness.take_wrappers_off(patch)
        patch.setattr(ledgers, "REBASE_STEPS", 16)
        yield


def deploy(patch: pytest.MonkeyPatch, folder: Path, tokenizer: Any, carbon: bool = True) -> Deployment:
    harness.take_wrappers_off(patch)
    for name in ("llmco2_snapshot", "llmco2_switch"):
        patch.delattr(EngineCore, name, raising=False)
    patch.setattr(frontend, "_front_end", None)
    register()
    return Deployment(folder, tokenizer, carbon)


@pytest.fixture(scope="module")
def without_us(sliding_model: Path, tokenizer: Any) -> list[Any]:
    """What clients get from vLLM alone."""
    with pytest.MonkeyPatch.context() as patch:
        return deploy(patch, sliding_model, tokenizer, carbon=False).serve()


def traced(action: Callable[[], Any]) -> tuple[Any, set[str]]:
    """The outcome of an action, and which of our functions it ran."""
    seen: set[CodeType] = set()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code))
    try:
        outcome = action()
    finally:
        sys.setprofile(None)
    return outcome, {name for name, function in FUNCTIONS.items() if function.__code__ in seen}


@pytest.fixture(scope="module")
def reached(sliding_model: Path, tokenizer: Any, without_us: list[Any]) -> dict[str, set[str]]:
    """Our functions that run at the start, and those that run while serving, when nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        deployment, at_start = traced(lambda: deploy(patch, sliding_model, tokenizer))
        answers, serving = traced(deployment.serve)
        assert not frontend.front_end().guard.failures
        assert [dict(hook.guard.failures) for hook in deployment.hooks] == [{}, {}]
        assert answers == without_us
    return {"start": at_start, "serving": serving}


def test_x(reached):
    got = reached["start"] | reached["serving"]
    print("UNREACHED", sorted(FUNCTIONS.keys() - got))
    print(len(FUNCTIONS), len(reached["start"]), len(reached["serving"]))
    assert 0
