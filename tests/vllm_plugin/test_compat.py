"""What wraps vLLM: once, without changing kinds, and without a crash where a symbol is missing."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.config import Settings
from llmco2_vllm.vllm_plugin import compat, output_path, register
from llmco2_vllm.vllm_plugin.compat import SYMBOLS, Symbol
from tests.vllm_plugin import harness
from tests.vllm_plugin.harness import Engine, Server, make_core_request


class Subject:
    """Stands in for a class of vLLM."""

    def method(self, x: int) -> int:
        return x + 1

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    @classmethod
    def of_class(cls, x: int) -> tuple[type, int]:
        return cls, x + 1


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> type[Subject]:
    fresh = type("Subject", (), {k: v for k, v in vars(Subject).items() if not k.startswith("__")})
    monkeypatch.setattr(importlib.import_module(__name__), "Fresh", fresh, raising=False)
    for name in ("method", "static", "of_class", "missing"):
        monkeypatch.setitem(SYMBOLS, name, Symbol(__name__, "Fresh", name, "this test"))
    return fresh


def ten_more(original: Callable[..., Any]) -> Callable[..., Any]:
    def more(*args: Any) -> Any:
        result = original(*args)
        return (result[0], result[1] + 10) if isinstance(result, tuple) else result + 10

    return more


def test_a_wrapped_method_is_wrapped_once_however_often_it_is_asked(subject: type[Subject]) -> None:
    for _ in range(3):
        assert compat.wrap("method", ten_more)
    assert subject().method(1) == 12
    assert inspect.signature(subject.method).parameters.keys() == {"self", "x"}


def test_static_and_class_methods_stay_what_they_are(subject: type[Subject]) -> None:
    for _ in range(2):
        assert compat.wrap("static", ten_more) and compat.wrap("of_class", ten_more)
    assert isinstance(inspect.getattr_static(subject, "static"), staticmethod)
    assert isinstance(inspect.getattr_static(subject, "of_class"), classmethod)
    child = type("Child", (subject,), {})
    assert subject.static(1) == subject().static(1) == 12
    assert child.of_class(1) == (child, 12)


def test_a_missing_symbol_is_not_wrapped_and_nothing_raises(subject: type[Subject]) -> None:
    before = dict(vars(subject))
    assert not compat.wrap("missing", ten_more)
    assert dict(vars(subject)) == before


def test_a_missing_module_or_class_is_a_missing_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYMBOLS, "no module", Symbol("vllm.no_such_module", "A", "b", "this test"))
    monkeypatch.setitem(SYMBOLS, "no class", Symbol("vllm.config", "NoSuchClass", "b", "this test"))
    assert not compat.wrap("no module", ten_more)
    assert not compat.wrap("no class", ten_more)


def test_the_self_check_covers_every_symbol_and_this_version_has_all() -> None:
    assert compat.self_check() == dict.fromkeys(SYMBOLS, True)


def test_nothing_is_said_when_nothing_is_missing(log_records: list[logging.LogRecord]) -> None:
    compat.warn_missing(dict.fromkeys(SYMBOLS, True))
    assert not log_records


def test_several_missing_symbols_are_one_warning(log_records: list[logging.LogRecord]) -> None:
    compat.warn_missing({key: key not in ("trace_headers", "async_llm") for key in SYMBOLS})
    [record] = log_records
    assert record.levelname == "WARNING"
    for part in (compat.host_version(), "EngineCoreOutput.trace_headers (figures", "AsyncLLM.__init__ (engine-wide"):
        assert part in record.getMessage()


def test_the_plugin_wraps_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    harness.take_wrappers_off(monkeypatch)
    register()
    wrapped = [current(key) for key in ("add_cli_args", "from_cli_args", "create_engine_config", "get_scheduler_cls")]
    assert all(hasattr(function, "__wrapped__") for function in wrapped)
    register()
    assert [current(key) for key in SYMBOLS][:4] == wrapped
    assert not any(hasattr(function.__wrapped__, "__llmco2__") for function in wrapped)


def current(key: str) -> Any:
    """The function that a symbol names at the moment, out of its static or class method."""
    static = inspect.getattr_static(compat.resolve(key), SYMBOLS[key].name)
    return getattr(static, "__func__", static)


def test_an_engine_that_does_not_ask_for_the_meter_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    harness.take_wrappers_off(monkeypatch)
    monkeypatch.setattr(output_path, "_front_end", None)
    register()
    config = engine_config(tiny_model)
    assert not hasattr(config, compat.ATTRIBUTE)
    assert not config.scheduler_config.get_scheduler_cls().__name__.startswith("Carbon")
    assert not hasattr(current("process_outputs"), "__llmco2__")


def engine_config(folder: Path, **additional: Any) -> Any:
    """What EngineArgs, the entry of every server and of ``LLM``, makes of ``additional_config``."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=8192, additional_config=dict(additional)
    )
    return arguments.create_engine_config()


def test_settings_travel_from_additional_config_to_a_scheduler_with_the_hook(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr(output_path, "_front_end", None)
    register()
    config = engine_config(tiny_model, carbon={"zone": "FR", "intensity": 42}, other=1)
    assert getattr(config, compat.ATTRIBUTE) == Settings(zone="FR", intensity=42)
    assert config.additional_config == {"other": 1}
    server = Server(Engine(harness.make_scheduler(config)))
    server.add(make_core_request("a", 40, max_tokens=5))
    [output] = server.run()
    assert output.carbon["intensity"]["grams_per_kwh"] == 42
    assert output.carbon["estimate"]["energy_joules"] > 0


# Each is taken away from vLLM before the meter starts, and given back before it serves: a version without
# it would do the same work elsewhere.
LOSSES = {
    "engine_core": "EngineCore.__init__ (engine-wide metrics), EngineCore.sleep (idle power of a sleeping engine), "
    "EngineCore.wake_up (idle power of a sleeping engine), EngineCore.execute_dummy_batch (idle power beside "
    "data-parallel peers)",
    "async_llm": "AsyncLLM.__init__ (engine-wide metrics)",
    "preempt_request": "Scheduler._preempt_request (recomputed tokens)",
    "new_request_output": "RequestState._new_request_output (RequestOutput.carbon)",
    "add_request": "OutputProcessor.add_request (figures in responses)",
    "process_outputs": "OutputProcessor.process_outputs (figures in responses)",
    "do_tracing": "OutputProcessor.do_tracing (llmco2.* attributes of traces)",
    "request_span": "instrument_manual (llmco2.* attributes of traces)",
}
NO_FIGURES = {"new_request_output", "add_request", "process_outputs"}


@pytest.mark.parametrize("key", LOSSES)
def test_a_missing_symbol_is_one_warning_and_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, log_records: list[logging.LogRecord], key: str
) -> None:
    harness.take_wrappers_off(monkeypatch)
    monkeypatch.setattr(output_path, "_front_end", None)
    register()
    give_back = take_away(monkeypatch, key)
    config = engine_config(tiny_model, carbon={"intensity": 42})
    [warning] = [record.getMessage() for record in log_records if record.levelno >= logging.WARNING]
    assert warning == f"llmco2: vLLM {compat.host_version()} lacks {LOSSES[key]}; the rest of the meter runs"
    give_back()
    server = Server(Engine(harness.make_scheduler(config)))
    server.add(make_core_request("a", 40, max_tokens=5))
    [output] = server.run()
    assert output.outputs[0].token_ids == [7] * 5
    assert server.engine.scheduler.llmco2_hook.monitor.totals.finished_requests == 1
    gone = {name for name in SYMBOLS if key == "engine_core" and SYMBOLS[name].owner == "EngineCore"} | {key}
    assert output_path.front_end().self_check == {name: name not in gone for name in SYMBOLS}
    # Without one of the three the client's figure is lost, with the others it is there.
    assert bool(getattr(output, "carbon", None)) is (key not in NO_FIGURES)


def take_away(monkeypatch: pytest.MonkeyPatch, key: str) -> Callable[[], None]:
    """Delete a symbol; what is returned gives it back."""
    owner, name = compat.resolve(key), SYMBOLS[key].name
    assert owner is not None
    original = inspect.getattr_static(owner, name)
    if name == "__init__":
        # Every class has one; the class itself must go.
        module = importlib.import_module(SYMBOLS[key].module)
        monkeypatch.delattr(module, SYMBOLS[key].owner)
        return lambda: None
    monkeypatch.delattr(owner, name)
    return functools.partial(monkeypatch.setattr, owner, name, original, raising=False)
