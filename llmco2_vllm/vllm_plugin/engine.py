"""Start of the meter in an engine core: from the host's configuration to an EngineHook."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from llmco2_vllm.assemble import Deployment, assemble
from llmco2_vllm.core.attribution import Activity
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.monitor import empty_batch_costs_nothing
from llmco2_vllm.telemetry.ledger import Origin, Provenance
from llmco2_vllm.vllm_plugin import compat
from llmco2_vllm.vllm_plugin.compat import ATTRIBUTE
from llmco2_vllm.vllm_plugin.guard import Guard
from llmco2_vllm.vllm_plugin.hook import EngineHook

logger = logging.getLogger("vllm.llmco2")


def start_hook(vllm_config: Any) -> EngineHook:
    """The hook of one engine's scheduler. Raises where the deployment cannot be priced."""
    settings = getattr(vllm_config, ATTRIBUTE, None) or getattr(vllm_config.scheduler_config, ATTRIBUTE)
    meter = assemble(settings, describe(vllm_config))
    if not empty_batch_costs_nothing(meter.monitor.predictor):
        raise ValueError(f"predictor {meter.monitor.predictor.name} prices an empty step above zero")
    provenance = Provenance(meter.monitor.predictor.name, meter.found.name, meter.found.reason or "")
    origin = Origin(_engine_index(vllm_config), provenance)
    speculative = vllm_config.speculative_config is not None
    hook = EngineHook(meter.monitor, origin, Guard("engine", compat.host_version()), speculative)
    hook.meter_now = meter.found.now
    hook.states.update(meter.states)
    reason = f" ({provenance.meter_reason})" if provenance.meter_reason else ""
    asked_in_vain = meter.found.sampler is None and settings.meter not in ("auto", "none")
    logger.log(
        logging.WARNING if asked_in_vain else logging.INFO,
        "llmco2: predictor %s, device %s, meter %s%s",
        provenance.predictor,
        meter.device.name,
        provenance.meter,
        reason,
    )
    return hook


def add_utilities() -> None:
    """Give the engine core the methods that front ends call, also where no hook will start."""
    compat.add_method("engine_core", "llmco2_snapshot", _snapshot)
    compat.add_method("engine_core", "llmco2_switch", _switch)
    compat.wrap("sleep", _sleep)
    compat.wrap("wake_up", _wake_up)
    compat.wrap("dummy_batch", _dummy_batch)


def describe(vllm_config: Any) -> Deployment:
    """What the host's configuration says about this engine."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Deployment(
        model_config=model_config.hf_config.to_dict(),
        device_name=compat.device_name(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        kv_cache_dtype=str(vllm_config.cache_config.cache_dtype),
        pooling=model_config.runner_type == "pooling",
        topology=Topology(
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
            data_parallel=parallel.data_parallel_size,
            expert_parallel=bool(getattr(parallel, "enable_expert_parallel", False)),
        ),
        meter_devices=compat.own_devices(vllm_config),
        engine=_engine_index(vllm_config),
        engine_version=f"vllm {compat.host_version()}",
    )


def _engine_index(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", None)
    return int(parallel.data_parallel_rank if index is None else index)


def _snapshot(self: Any, question: str) -> str:
    """Utility method of EngineCore: the hook's cumulative figures as JSON text.

    question: JSON text; counted: joules by id of the requests that this front end ended since its last call; awaited:
    ids of requests whose final figure it waits for, answered under ``settled``.
    """
    hook: EngineHook | None = getattr(self.scheduler, "llmco2_hook", None)
    if hook is None:
        return "{}"
    asked = json.loads(question)
    hook.guard.call("decide", hook.decide, asked["counted"])
    snapshot = hook.snapshot()
    snapshot["settled"] = hook.guard.call("settled", hook.settled, asked["awaited"]) or {}
    return json.dumps(snapshot)


def _switch(self: Any, on: bool) -> bool:
    """Utility method of EngineCore: turn the hook off or on; whether there is one."""
    hook: EngineHook | None = getattr(self.scheduler, "llmco2_hook", None)
    if hook is None:
        return False
    hook.switch(on, self.scheduler.requests)
    return True


def _sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _tell(self, Activity.SLEEPING)
        return result

    return sleep


def _wake_up(original: Callable[..., Any]) -> Callable[..., Any]:
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        _tell(self, Activity.AWAKE)
        return original(self, *args, **kwargs)

    return wake_up


def _dummy_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A data-parallel rank without requests keeps its peers company: neither work of a request nor idleness.
        _tell(self, Activity.UNKNOWN)
        result = original(self, *args, **kwargs)
        _tell(self, Activity.AWAKE)
        return result

    return execute_dummy_batch


def _tell(core: Any, activity: Activity) -> None:
    """The engine falls asleep or wakes up: idle power is another one."""
    hook: EngineHook | None = getattr(getattr(core, "scheduler", None), "llmco2_hook", None)
    if hook is not None and hook.monitor.metering is not None:
        hook.guard.call("sleep", hook.monitor.metering.switched, activity)
