"""Model sizes by name: entries of a model_configs.json, or Hugging Face configs, to ModelSpec.

Sizes of public models that older tables name ship in ``data/model_sizes.json``, same format; they are facts
published with each model, and a test compares the parameters they add up to with the published number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmco2_vllm.core.model import ModelSpec

Entry = Mapping[str, Any]
_RENAMED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "experts": "num_experts",
    "topk": "num_experts_per_tok",
    "moe_intermediate": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "attention_chunk": "attention_chunk_size",
    "nope_every": "no_rope_layer_interval",
    "hybrid_pattern": "hybrid_override_pattern",
}
_KEPT = (
    "head_dim",
    "sliding_window",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_MAMBA = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "state": "ssm_state_size",
    "groups": "n_groups",
    "conv": "conv_kernel",
}
_NEEDED = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "tie_embeddings")
# Every n-th layer sees the whole context.
_SLIDING_PERIOD = {"5 local : 1 global": 6, "alternating": 2}
# Publishers whose fp8 checkpoints carry one scale per block of 128 x 128 weights (``weight_block_size`` in the
# config.json of the Qwen3 FP8 and DeepSeek-V3 checkpoints). Meta's carry one per channel and leave attention in
# bfloat16 ("The Llama 3 Herd of Models", arXiv:2407.21783, section 6.2; modules_to_not_convert of the checkpoints).
_BLOCK_QUANTISED = ("Qwen/", "deepseek-ai/")
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_CHANNELS = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["model.layers.*.self_attn"]}
# gpt-oss: the experts alone are quantised (config.json of openai/gpt-oss-20b).
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
PRECISIONS = ("bfloat16", "float16", "fp8", "mxfp4")


class ModelSizes:
    """ModelSpec by model name and precision: given entries first, then those that ship with the package."""

    def __init__(self, entries: Mapping[str, Entry] | None = None) -> None:
        self._entries = {**shipped_sizes(), **(entries or {})}
        self._known: dict[tuple[str, str], ModelSpec] = {}

    def spec(self, name: str, precision: str) -> ModelSpec:
        """The model; ValueError for an unknown name or a faulty entry."""
        key = (name, precision)
        if key not in self._known:
            if name not in self._entries:
                raise ValueError(f"unknown model {name!r}: no entry in the model configs")
            try:
                self._known[key] = model_spec(name, self._entries[name], precision)
            except (AttributeError, KeyError, TypeError) as error:  # a size of the wrong kind
                raise ValueError(f"the entry of {name!r} cannot be read: {error!r}") from error
        return self._known[key]


@cache
def shipped_sizes() -> dict[str, Entry]:
    """Entries of ``data/model_sizes.json`` by model name, other names for the same model resolved."""
    entries = json.loads(files("llmco2_vllm").joinpath("data", "model_sizes.json").read_text("utf-8"))
    return {name: entries[entry.get("same_as", name)] for name, entry in entries.items()}


def read_configs(path: Path) -> dict[str, Entry]:
    """Entries of a file in the format of model_configs.json; ValueError when it is something else."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path}: expected one JSON object with an object of sizes for each model name")
    return content


def block_quantised(name: str, precision: str) -> bool:
    """Whether a checkpoint's fp8 weights have a scale per block of 128 x 128."""
    return precision == "fp8" and name.startswith(_BLOCK_QUANTISED)


def model_spec(name: str, entry: Entry, precision: str) -> ModelSpec:
    """ModelSpec of an entry at one of ``PRECISIONS``; ValueError that names what is missing or impossible.

    An entry states the whole layout, so a family that is not known is no reason to call the model generic.
    """
    if "hidden_size" in entry or "text_config" in entry:
        return ModelSpec.from_config({**entry, **_precision(name, precision)})
    spec = ModelSpec.from_config({**huggingface_config(entry), **_precision(name, precision)})
    if spec.moe_layers != entry.get("moe_layers", 0):
        raise ValueError(f"moe_layers={entry.get('moe_layers')!r}: where the experts lie is not known")
    if "2-matrix" in str(entry.get("mlp", "")):
        spec = replace(spec, gated_mlp=False)
    return replace(spec, generic="note" in entry)


def huggingface_config(entry: Entry) -> dict[str, Any]:
    """An entry with the keys of a Hugging Face ``config.json``; precision is not part of it."""
    missing = [key for key in _NEEDED if key not in entry]
    if missing:
        raise ValueError(f"model config: key {missing[0]!r} is missing")
    config: dict[str, Any] = {"model_type": entry.get("model_type") or _model_type(entry)}
    config |= {new: entry[old] for old, new in _RENAMED.items() if old in entry}
    config |= {key: entry[key] for key in _KEPT if key in entry}
    config |= {new: entry["mamba"][old] for old, new in _MAMBA.items() if old in entry.get("mamba", {})}
    period = _SLIDING_PERIOD.get(str(entry.get("sliding_pattern", "")))
    if period:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[layer % period == 0] for layer in range(1, entry["layers"] + 1)]
    if entry.get("first_k_dense"):
        config["first_k_dense_replace"] = entry["first_k_dense"]
    elif 0 < entry.get("moe_layers", 0) < entry["layers"]:
        config["interleave_moe_layer_step"] = entry["layers"] // entry["moe_layers"]
    return config


def _model_type(entry: Entry) -> str:
    """The family an entry looks like; the sizes decide, the name hardly matters."""
    if entry.get("kv_lora_rank"):
        return "deepseek_v3"
    if entry.get("hybrid_pattern"):
        return "nemotron_h"
    if entry.get("attention_chunk"):
        return "llama4_text"
    pattern = str(entry.get("sliding_pattern", ""))
    if pattern in _SLIDING_PERIOD:
        return "gemma3_text" if _SLIDING_PERIOD[pattern] == 6 else "gpt_oss"
    if entry.get("qk_norm"):
        return "qwen3_moe" if entry.get("experts") else "qwen3"
    return "llama"


def _precision(name: str, precision: str) -> dict[str, Any]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    if precision in ("bfloat16", "float16"):
        return {"dtype": precision, "quantization_config": None}
    quantised: dict[str, Any] = {"quant_method": "fp8"}
    if precision == "mxfp4":
        quantised = _MXFP4
    elif name.startswith("meta-llama/"):
        quantised = _CHANNELS
    elif block_quantised(name, precision):
        quantised = _BLOCKS
    return {"dtype": "bfloat16", "quantization_config": quantised}
