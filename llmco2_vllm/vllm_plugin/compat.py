"""Every vLLM name that is not a public interface, and how to wrap it.

A missing symbol is one warning with the version, never a crash: the parts that work still run.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger("vllm.llmco2")
# Carries the settings through the host's configuration objects.
ATTRIBUTE = "llmco2"
_MARK = "__llmco2__"


class Symbol(NamedTuple):
    """Where a symbol lives and what is lost without it. A function of the module has an empty owner."""

    module: str
    owner: str
    name: str
    used_for: str


SYMBOLS: dict[str, Symbol] = {
    "add_cli_args": Symbol("vllm.engine.arg_utils", "EngineArgs", "add_cli_args", "the --carbon flag"),
    "from_cli_args": Symbol("vllm.engine.arg_utils", "EngineArgs", "from_cli_args", "the HTTP annotation"),
    "create_engine_config": Symbol("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", "everything"),
    "get_scheduler_cls": Symbol("vllm.config", "SchedulerConfig", "get_scheduler_cls", "prediction and ledgers"),
    "schedule": Symbol("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", "prediction"),
    "update_from_output": Symbol("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output", "ledgers"),
    "get_grammar_bitmask": Symbol(
        "vllm.v1.core.sched.scheduler", "Scheduler", "get_grammar_bitmask", "that no step waits for our bookkeeping"
    ),
    "free_request": Symbol("vllm.v1.core.sched.scheduler", "Scheduler", "_free_request", "final figures"),
    "preempt_request": Symbol("vllm.v1.core.sched.scheduler", "Scheduler", "_preempt_request", "recomputed tokens"),
    "trace_headers": Symbol("vllm.v1.engine", "EngineCoreOutput", "trace_headers", "figures in responses"),
    "engine_core": Symbol("vllm.v1.engine.core", "EngineCore", "__init__", "engine-wide metrics"),
    "sleep": Symbol("vllm.v1.engine.core", "EngineCore", "sleep", "idle power of a sleeping engine"),
    "wake_up": Symbol("vllm.v1.engine.core", "EngineCore", "wake_up", "idle power of a sleeping engine"),
    "dummy_batch": Symbol(
        "vllm.v1.engine.core", "EngineCore", "execute_dummy_batch", "idle power beside data-parallel peers"
    ),
    "async_llm": Symbol("vllm.v1.engine.async_llm", "AsyncLLM", "__init__", "engine-wide metrics"),
    "add_request": Symbol("vllm.v1.engine.output_processor", "OutputProcessor", "add_request", "figures in responses"),
    "process_outputs": Symbol(
        "vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs", "figures in responses"
    ),
    "abort_requests": Symbol(
        "vllm.v1.engine.output_processor", "OutputProcessor", "abort_requests", "aborted energy of stop strings"
    ),
    "new_request_output": Symbol(
        "vllm.v1.engine.output_processor", "RequestState", "_new_request_output", "RequestOutput.carbon"
    ),
    "do_tracing": Symbol(
        "vllm.v1.engine.output_processor", "OutputProcessor", "do_tracing", "llmco2.* attributes of traces"
    ),
    "request_span": Symbol("vllm.v1.engine.output_processor", "", "instrument_manual", "llmco2.* attributes of traces"),
    "embedding_output": Symbol("vllm.outputs", "EmbeddingRequestOutput", "from_base", "carbon of LLM.embed"),
    "classification_output": Symbol(
        "vllm.outputs", "ClassificationRequestOutput", "from_base", "carbon of LLM.classify"
    ),
    "scoring_output": Symbol("vllm.outputs", "ScoringRequestOutput", "from_base", "carbon of LLM.score"),
}


def host_version() -> str:
    """The version of vLLM, or ``unknown``."""
    try:
        return str(importlib.import_module("vllm").__version__)
    except Exception:
        return "unknown"


def device_name() -> str:
    """``cpu``, or the accelerator's name as its platform reports it."""
    platform = importlib.import_module("vllm.platforms").current_platform
    return "cpu" if platform.is_cpu() else str(platform.get_device_name())


def own_devices(vllm_config: Any) -> tuple[str | int, ...] | None:
    """The GPUs of this engine, tokens as in CUDA_VISIBLE_DEVICES; None on other platforms.

    vLLM gives data-parallel ranks of one host either a variable of their own or consecutive devices of one list.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_cpu():
        return None
    parallel = vllm_config.parallel_config
    count = int(parallel.world_size)
    variable = os.environ.get(str(getattr(platform, "device_control_env_var", "CUDA_VISIBLE_DEVICES")))
    tokens: list[str | int] = [t.strip() for t in variable.split(",") if t.strip()] if variable else []
    first = int(getattr(parallel, "data_parallel_rank_local", None) or 0) * count
    if not tokens:
        return tuple(range(first, first + count))
    return tuple(tokens if len(tokens) <= count else tokens[first : first + count] or tokens[:count])


def resolve(key: str) -> type[Any] | None:
    """The class or module that owns a symbol, or None where this vLLM has no such symbol."""
    symbol = SYMBOLS[key]
    try:
        module: Any = importlib.import_module(symbol.module)
        owner: type[Any] = getattr(module, symbol.owner) if symbol.owner else module
        inspect.getattr_static(owner, symbol.name)
    except (ImportError, AttributeError):
        return None
    return owner


def self_check() -> dict[str, bool]:
    """Which symbols this vLLM has. Imports the modules that hold them."""
    return {key: resolve(key) is not None for key in SYMBOLS}


def warn_missing(found: dict[str, bool]) -> None:
    """One warning that names the version and what is lost, if anything is."""
    lost = [
        f"{SYMBOLS[key].owner}.{SYMBOLS[key].name} ({SYMBOLS[key].used_for})".removeprefix(".")
        for key, ok in found.items()
        if not ok
    ]
    if lost:
        logger.warning("llmco2: vLLM %s lacks %s; the rest of the meter runs", host_version(), ", ".join(lost))


def wrap(key: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace a symbol by ``make(original)``, once; static and class methods stay what they are.

    Returns False where the symbol is missing.
    """
    owner = resolve(key)
    if owner is None:
        return False
    name = SYMBOLS[key].name
    static = inspect.getattr_static(owner, name)
    kind = type(static) if isinstance(static, (staticmethod, classmethod)) else None
    original = static.__func__ if kind else static
    if getattr(original, _MARK, False):
        return True
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, kind(replacement) if kind else replacement)
    return True


def add_method(key: str, name: str, method: Callable[..., Any]) -> None:
    """Give the class that owns a symbol one more method."""
    owner = resolve(key)
    if owner is not None and not hasattr(owner, name):
        setattr(owner, name, method)


async def call_engines(engine_client: Any, method: str, *arguments: Any) -> list[Any]:
    """Call a utility method of every engine core behind an AsyncLLM; their answers in engine order."""
    core = engine_client.engine_core
    if hasattr(core, "call_utility_all_async"):
        return list(await core.call_utility_all_async(method, *arguments))
    engines = getattr(core, "core_engines", None)
    if engines is None or not hasattr(core, "_call_utility_async"):
        return [await core.call_utility_async(method, *arguments)]
    return [await core._call_utility_async(method, *arguments, engine=engine) for engine in engines]


def client_index(engine_client: Any) -> int:
    """Index of this API server among those of the engine; 0 owns the engine-wide figures."""
    return int(getattr(engine_client.engine_core, "client_index", 0))
