"""The scheduler hook: a mixin over whatever scheduler class the host picked."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from llmco2_vllm.vllm_plugin import compat, engine
from llmco2_vllm.vllm_plugin.hook import EngineHook

logger = logging.getLogger("vllm.llmco2")


class CarbonMixin:
    """Sits in front of a scheduler class; ``llmco2_hook`` is None where the meter could not start."""

    llmco2_hook: EngineHook | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.llmco2_hook = None
        try:
            engine.add_utilities()
            self.llmco2_hook = engine.start_hook(kwargs.get("vllm_config") or getattr(self, "vllm_config", None))
        except Exception as error:
            logger.error(
                "llmco2: no figures from this engine (%s: %s), vLLM %s; serving goes on",
                type(error).__name__,
                error,
                compat.host_version(),
            )

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The host's ``schedule``, and the price of what it decided."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if (hook := self.llmco2_hook) is not None:
            hook.guard.call("schedule", hook.scheduled, output, self)
        return output

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, which it asks for while the step runs: so does what need not be done before."""
        if (hook := self.llmco2_hook) is not None:
            hook.guard.call("get_grammar_bitmask", hook.running)
        return super().get_grammar_bitmask(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's ``update_from_output``, between the end of the step and the outbox."""
        if (hook := self.llmco2_hook) is None:
            return super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        hook.guard.call("update_from_output", hook.executed, scheduler_output)
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        hook.guard.call("attach", hook.attach, outputs)
        return outputs

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (hook := self.llmco2_hook) is not None:
            hook.guard.call("free_request", hook.freed, request)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (hook := self.llmco2_hook) is not None:
            hook.guard.call("preempt_request", hook.preempted, request)
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]


@cache
def with_carbon(base: type) -> type:
    """``base`` with the mixin in front; the same class every time."""
    if issubclass(base, CarbonMixin):
        return base
    return type("Carbon" + base.__name__, (CarbonMixin, base), {"__module__": __name__})
