"""Start of the meter in an engine core: from the host's configuration to an EngineHook."""

from __future__ import annotations

import json
import logging
from typing import Any

from llmco2_vllm.assemble import Deployment, assemble
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
    provenance = Provenance(meter.monitor.predictor.name, meter.meter, meter.meter_reason)
    origin = Origin(_engine_index(vllm_config), provenance)
    speculative = vllm_config.speculative_config is not None
    hook = EngineHook(meter.monitor, origin, Guard("engine", compat.host_version()), speculative)
    logger.info(
        "llmco2: predictor %s, device %s, meter %s (%s)", provenance.predictor, meter.device.name, *provenance[1:]
    )
    return hook


def add_utilities() -> None:
    """Give the engine core the methods that front ends call, also where no hook will start."""
    compat.add_method("engine_core", "llmco2_snapshot", _snapshot)
    compat.add_method("engine_core", "llmco2_switch", _switch)


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
    )


def _engine_index(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", None)
    return int(parallel.data_parallel_rank if index is None else index)


def _snapshot(self: Any, counted: str) -> str:
    """Utility method of EngineCore: the hook's cumulative figures as JSON text.

    counted: JSON text, joules by id of the requests that this front end ended since its last call.
    """
    hook: EngineHook | None = getattr(self.scheduler, "llmco2_hook", None)
    if hook is None:
        return "{}"
    hook.guard.call("decide", hook.decide, json.loads(counted))
    return json.dumps(hook.snapshot())


def _switch(self: Any, on: bool) -> bool:
    """Utility method of EngineCore: turn the hook off or on; whether there is one."""
    hook: EngineHook | None = getattr(self.scheduler, "llmco2_hook", None)
    if hook is None:
        return False
    hook.switch(on, self.scheduler.requests)
    return True
