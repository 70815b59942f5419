"""Questions that the tests ask: models of four sizes, a decode-heavy and a prefill-heavy workload, three grids."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmco2_vllm.advice.sweep import Question
from llmco2_vllm.advice.workload import Workload
from llmco2_vllm.advice.zones import ZoneIntensity
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.core.model import ModelSpec
from tests.core.published import PUBLISHED, Config


def _dense(layers: int, hidden: int, heads: int, intermediate: int, **more: Any) -> Config:
    return {
        "model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": 8, "intermediate_size": intermediate, "head_dim": 128,
        "vocab_size": 128256, **more,
    }  # fmt: skip


LLAMA_8B: Config = PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"][0]
LLAMA_70B = _dense(80, 8192, 64, 28672)
# Sizes as published with Qwen3-0.6B.
SMALL = _dense(28, 1024, 16, 3072, vocab_size=151936, tie_word_embeddings=True)
MODELS = {"0.6B": SMALL, "8B": LLAMA_8B, "32B": PUBLISHED["Qwen/Qwen3-32B"][0], "70B": LLAMA_70B}
COAL, GAS, CLEAN = (
    ZoneIntensity("coal", 820.0, "test"),
    ZoneIntensity("gas", 490.0, "test"),
    ZoneIntensity("clean", 12.0, "test"),
)


def of_length(prompt: int, output: int, rate: float | None = None) -> Workload:
    """Requests that are all alike."""
    return Workload("alike", np.array([float(prompt)]), np.array([float(output)]), np.ones(1), rate)


DECODE_HEAVY = of_length(64, 1024)


def asked(config: Config = LLAMA_8B, **changes: Any) -> Question:
    """A question about H100s; see Question for what may be changed."""
    given: dict[str, Any] = {
        "workload": DECODE_HEAVY, "devices": [device_by_name("h100-sxm")], "zones": (COAL,), **changes,
    }  # fmt: skip
    return Question(ModelSpec.from_config(config), **given)
