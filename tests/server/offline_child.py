"""Offline inference in a process of its own: ``python -m tests.server.offline_child CASE MODEL`` prints one JSON line.

The cases return what the tests look at; the tests say what it must be.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from vllm import LLM, SamplingParams

CARBON = {"zone": "FR", "intensity": 56, "pue": 1.2}
PROMPTS = ["Once upon a time", "The capital of France is"]


def load(model: str, **options: Any) -> LLM:
    """The engine as cheap as it comes; eager, because compiling takes longer than these tests."""
    return LLM(model, dtype="bfloat16", max_model_len=1024, enforce_eager=True, disable_log_stats=True, **options)


def tokens_of(output: Any) -> dict[str, int]:
    """What the host says about a finished request."""
    return {
        "prompt": len(output.prompt_token_ids),
        "completion": sum(len(part.token_ids) for part in output.outputs),
        "sequences": len(output.outputs),
    }


def described(outputs: list[Any]) -> list[dict[str, Any]]:
    """Annotation and tokens of finished requests."""
    return [{"carbon": dict(output.carbon), "ledger": output.carbon.ledger, **tokens_of(output)} for output in outputs]


def in_process(model: str) -> dict[str, Any]:
    """Without carbon, then with it, then for embeddings, the engine core in this very process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    plain = load(model)
    scheduler = type(plain.llm_engine.engine_core.engine_core.scheduler)
    without = plain.generate(PROMPTS, sampling, use_tqdm=False)
    metered = load(model, additional_config={"carbon": CARBON})
    hook = metered.llm_engine.engine_core.engine_core.scheduler
    outputs = metered.generate(PROMPTS, sampling, use_tqdm=False)
    several = SamplingParams(n=2, max_tokens=4, temperature=0.8, seed=1, ignore_eos=True)
    return {
        "plain_scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
        "plain_carbon": [getattr(output, "carbon", None) for output in without],
        "metered_scheduler": [cls.__name__ for cls in type(hook).__mro__],
        "same_text": [o.outputs[0].text for o in without] == [o.outputs[0].text for o in outputs],
        "outputs": described(outputs),
        "several": described(metered.generate(PROMPTS[:1], several, use_tqdm=False)),
        "spent": hook.llmco2_hook.snapshot(),
        "additional_config": metered.llm_engine.vllm_config.additional_config,
        "refused": refused(model),
        "embedded": embedded(model),
    }


def refused(model: str) -> str:
    """What ``LLM`` says to an unknown key."""
    try:
        load(model, additional_config={"carbon": {"zoen": 1}})
    except ValueError as error:
        return str(error)
    return ""


def embedded(model: str) -> list[dict[str, Any]]:
    """Annotation and prompt tokens of embeddings."""
    llm = load(model, runner="pooling", convert="embed", additional_config={"carbon": CARBON})
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    return [{"carbon": dict(getattr(o, "carbon", None) or {}), "prompt": len(o.prompt_token_ids)} for o in outputs]


def speculative(model: str) -> dict[str, Any]:
    """N-gram drafts, the engine core in a process of its own."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    llm = load(model, additional_config={"carbon": CARBON}, speculative_config=drafts)
    sampling = SamplingParams(max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)
    repetitive = "one two three four one two three four one two three four one two"
    return {"outputs": described(llm.generate([repetitive, PROMPTS[0]], sampling, use_tqdm=False))}


CASES = {case.__name__: case for case in (in_process, speculative)}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](sys.argv[2])))
