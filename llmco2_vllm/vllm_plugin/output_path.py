"""The host's output path, wrapped: every request and every output passes the front end of its process."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from llmco2_vllm.assemble import open_accountant
from llmco2_vllm.config import Settings
from llmco2_vllm.grid.zones import WORLD
from llmco2_vllm.telemetry.accounting import Accountant
from llmco2_vllm.vllm_plugin import compat, tracing
from llmco2_vllm.vllm_plugin.engine import describe
from llmco2_vllm.vllm_plugin.frontend import CarbonFrontEnd

logger = logging.getLogger("vllm.llmco2")

_front_end: CarbonFrontEnd | None = None


def front_end() -> CarbonFrontEnd:
    """This process's front end. Raises RuntimeError where none was enabled."""
    if _front_end is None:
        raise RuntimeError("the carbon meter is not enabled in this process")
    return _front_end


def enable(settings: Settings, vllm_config: Any) -> None:
    """Make this process a front end and wrap the host's output path, once."""
    global _front_end
    names = vllm_config.model_config.served_model_name
    accountant = _accountant(settings, vllm_config)
    intensity = accountant.now().intensity
    _front_end = CarbonFrontEnd(settings, names if isinstance(names, str) else names[0], accountant)
    compat.warn_missing(_front_end.self_check)
    if intensity is not None and intensity.zone == WORLD:
        logger.warning(
            "llmco2: no carbon intensity is set; grams use the world average of %g g/kWh and say so "
            "(--carbon-config.zone, .region or .intensity)",
            intensity.grams_per_kwh,
        )
    compat.wrap("async_llm", _async_llm_init)
    compat.wrap("add_request", _add_request)
    compat.wrap("process_outputs", _process_outputs)
    compat.wrap("abort_requests", _abort_requests)
    compat.wrap("new_request_output", _new_request_output)
    for key in ("embedding_output", "classification_output", "scoring_output"):
        compat.wrap(key, _from_base)
    tracing.enable(lambda: _front_end)


def _accountant(settings: Settings, vllm_config: Any) -> Accountant:
    """The accountant of this deployment; one without embodied carbon where its hardware cannot be told."""
    try:
        deployment = describe(vllm_config)
        name, devices = settings.device or deployment.device_name, deployment.topology.engine_devices
        return open_accountant(settings, name, devices)
    except Exception as error:
        logger.info("llmco2: no embodied carbon (%s: %s)", type(error).__name__, error)
        return open_accountant(settings)


def _async_llm_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.engine_client = weakref.ref(self)

    return __init__


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("add_request", _front_end.track, self, request)
        return result

    return add_request


def _process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        front = _front_end
        if front is None:
            return original(self, engine_core_outputs, *args, **kwargs)
        # Before the original: generators may read the ledger right after it.
        received = front.guard.call("receive", front.receive, self, engine_core_outputs)
        result = original(self, engine_core_outputs, *args, **kwargs)
        ended = getattr(result, "reqs_to_abort", ())
        if received or ended:
            front.guard.call("settle", front.settle, self, received or (), ended)
        return result

    return process_outputs


def _abort_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        request_ids = original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("abort_requests", _front_end.abandoned, request_ids)
        return request_ids

    return abort_requests


def _from_base(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_base(request_output: Any, *args: Any, **kwargs: Any) -> Any:
        # The offline pooling calls rebuild their outputs.
        output = original(request_output, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("from_base", _carry_over, request_output, output)
        return output

    return from_base


def _carry_over(request_output: Any, output: Any) -> None:
    if (carbon := getattr(request_output, "carbon", None)) is not None:
        output.carbon = carbon


def _new_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("request_output", _attach_view, _front_end, self, output)
        return output

    return _new_request_output


def _attach_view(front: CarbonFrontEnd, state: Any, output: Any) -> None:
    output.carbon = front.carbon_of(state)
