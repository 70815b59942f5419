"""What the plugin does to vLLM when it is off: ``python -m tests.server.inert_child MODEL`` prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from vllm.engine.arg_utils import EngineArgs

RUNS = 5


def configured(model: str, **options: Any) -> dict[str, Any]:
    """What vLLM makes of these arguments."""
    config = EngineArgs(model=model, dtype="bfloat16", max_model_len=1024, **options).create_engine_config()
    scheduler = config.scheduler_config.get_scheduler_cls()
    return {
        "hash": config.compute_hash(),
        "scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
        "additional_config": config.additional_config,
        "patched": sorted(patched()),
    }


def patched() -> list[str]:
    """Methods of vLLM's output path that are ours."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    methods = (AsyncLLM.__init__, OutputProcessor.add_request, OutputProcessor.process_outputs)
    return [m.__qualname__ for m in (*methods, RequestState._new_request_output) if hasattr(m, "__llmco2__")]


def registering_seconds() -> float:
    """CPU time of importing and registering the plugin, in a fork of this process, which has vLLM imported."""
    readable, writable = os.pipe()
    process = os.fork()
    if process == 0:
        begin = time.process_time()
        from llmco2_vllm.vllm_plugin import register

        register()
        os.write(writable, repr(time.process_time() - begin).encode())
        os._exit(0)
    os.waitpid(process, 0)
    return float(os.read(readable, 100))


def main(model: str) -> dict[str, Any]:
    assert "llmco2_vllm" not in sys.modules
    seconds = [registering_seconds() for _ in range(RUNS)] if os.environ.get("VLLM_PLUGINS") == "" else []
    answer = {"registering_seconds": seconds, "off": configured(model)}
    if not seconds:
        answer["modules"] = sorted(name for name in sys.modules if name.startswith("llmco2_vllm"))
        answer["on"] = configured(model, additional_config={"carbon": {"zone": "FR"}})
    return answer


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
