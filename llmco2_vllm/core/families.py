"""Layouts of model families, read from a Hugging Face config: layers, attention, MLP and experts, windows.

Sources: the configuration and modelling classes of Hugging Face Transformers (``<model_type>``) and vLLM's models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmco2_vllm.core.mixers import HybridLayers, LatentAttention, StateSpace
from llmco2_vllm.core.precision import state_bytes

Config = Mapping[str, Any]


class Family(NamedTuple):
    """What a family's config leaves to its class.

    sliding_period p: every p-th layer attends to the full context; 1 means that no layer is exempt from the window.
    defaults: values of the class for keys that published configs leave out.
    """

    gated: bool = True
    tied: bool = False
    sliding_period: int = 1
    encoder: bool = False
    defaults: Mapping[str, int] = {}


_DECODER = Family()
_ENCODER = Family(gated=False, tied=True, encoder=True)
_GEMMA3 = Family(
    tied=True,
    sliding_period=6,
    defaults={"vocab_size": 262208, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4},
)
_LLAMA4 = Family(defaults={"num_experts_per_tok": 1})
FAMILIES: Mapping[str, Family] = {
    "llama": _DECODER,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "mistral": _DECODER,
    "mixtral": _DECODER,
    "qwen2": _DECODER,
    "qwen2_moe": _DECODER,
    "qwen3": _DECODER,
    "qwen3_moe": _DECODER,
    "qwen3_vl_text": _DECODER,
    "qwen3_vl_moe_text": _DECODER,
    "qwen3_omni_moe_text": _DECODER,
    "phi3": _DECODER,
    "gemma": Family(tied=True, defaults={"head_dim": 256}),
    "gemma2": Family(tied=True, sliding_period=2, defaults={"head_dim": 256}),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": Family(sliding_period=2),
    "deepseek_v2": _DECODER,
    "deepseek_v3": _DECODER,
    "kimi_k2": _DECODER,
    "nemotron_h": Family(gated=False),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
}
# Letters of hybrid_override_pattern, and what Transformers calls the kinds.
_HYBRID_KINDS = {
    "M": "state_space",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
    "mamba": "state_space",
    "linear_attention": "state_space",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
# Llama 4: every fourth layer has no rotary position and attends to everything (no_rope_layer_interval).
_NO_ROPE_INTERVAL = 4


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of a multimodal config, outer keys kept, defaults of its family filled in."""
    merged = dict(config)
    for key in ("thinker_config", "text_config"):
        inner = merged.get(key)
        if isinstance(inner, Mapping):
            merged.update(inner)
    defaults = FAMILIES.get(str(merged.get("model_type", "")), _DECODER).defaults
    return {**defaults, **{key: value for key, value in merged.items() if value is not None or key not in defaults}}


def integer(config: Config, *names: str) -> int:
    """The first of ``names`` that is set, as a positive integer; ValueError that names what is missing or wrong."""
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model config: {name}={value!r} is not possible; expected a positive integer")
            return value
    raise ValueError(f"model config: key {names[0]!r} is missing")


def _optional(config: Config, *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _layers(config: Config) -> int:
    kinds = _hybrid_kinds(config)
    return len(kinds) if kinds else integer(config, "num_hidden_layers", "n_layer")


def read_attention(config: Config) -> dict[str, Any]:
    """Layers, hidden width and heads. Keys of latent attention make its head dimension that of a query."""
    hidden = integer(config, "hidden_size", "n_embd", "d_model")
    heads = integer(config, "num_attention_heads", "n_head")
    latent = None
    head_dim = _optional(config, "head_dim", "attention_head_dim") or max(1, hidden // heads)
    if config.get("kv_lora_rank") and config.get("qk_rope_head_dim"):
        latent = LatentAttention(
            query_rank=_optional(config, "q_lora_rank"),
            latent_rank=integer(config, "kv_lora_rank"),
            nope_dim=integer(config, "qk_nope_head_dim"),
            rope_dim=integer(config, "qk_rope_head_dim"),
            value_dim=integer(config, "v_head_dim"),
        )
        head_dim = latent.nope_dim + latent.rope_dim
    return {
        "layers": _layers(config),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _optional(config, "num_key_value_heads") or heads,
        "head_dim": head_dim,
        "latent": latent,
    }


def read_mlp(config: Config) -> dict[str, Any]:
    """Widths of the dense MLP, of routed and shared experts, and how many layers have experts."""
    experts = _optional(config, "num_experts", "num_local_experts", "n_routed_experts")
    moe_layers = _moe_layers(config) if experts > 1 else 0
    if not moe_layers:
        return {"intermediate": integer(config, "intermediate_size", "n_inner")}
    moe_intermediate = _optional(config, "moe_intermediate_size") or integer(config, "intermediate_size")
    dense = _optional(config, "intermediate_size_mlp", "intermediate_size") or moe_intermediate
    shared = _optional(config, "shared_expert_intermediate_size")
    shared = shared or _optional(config, "n_shared_experts") * (
        _optional(config, "moe_shared_expert_intermediate_size") or moe_intermediate
    )
    if str(config.get("model_type", "")).startswith("llama4"):
        shared = moe_intermediate  # one shared expert, always on: Llama4MoE
    return {
        "intermediate": dense,
        "experts": experts,
        "experts_per_token": integer(config, "num_experts_per_tok", "num_experts_per_token"),
        "moe_intermediate": moe_intermediate,
        "shared_intermediate": shared,
        "moe_layers": moe_layers,
    }


def _moe_layers(config: Config) -> int:
    kinds = _hybrid_kinds(config)
    if kinds:
        return kinds.count("moe")
    if isinstance(config.get("moe_layers"), (list, tuple)) and config["moe_layers"]:
        return len(config["moe_layers"])
    layers = _layers(config)
    step = max(1, _optional(config, "decoder_sparse_step", "interleave_moe_layer_step"))
    every = max(1, _optional(config, "moe_layer_freq") if isinstance(config.get("moe_layer_freq"), int) else 1)
    dense_only = set(config.get("mlp_only_layers") or [])
    dense_only |= set(range(_optional(config, "first_k_dense_replace")))
    return sum((layer + 1) % step == 0 and layer % every == 0 and layer not in dense_only for layer in range(layers))


def read_window(config: Config, family: Family) -> dict[str, Any]:
    """Layers that attend locally, to the last ``sliding_window`` tokens or within chunks of that many."""
    chunk = _optional(config, "attention_chunk_size")
    window = chunk or _optional(config, "sliding_window")
    if not window or config.get("use_sliding_window") is False or _hybrid_kinds(config):
        return {"sliding_window": None, "sliding_layers": 0}
    layers = _layers(config)
    kinds = config.get("layer_types")
    if kinds:
        local = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    elif chunk:
        rotary = config.get("no_rope_layers") or []
        interval = _optional(config, "no_rope_layer_interval") or _NO_ROPE_INTERVAL
        local = sum(map(bool, rotary[:layers])) if rotary else layers - layers // interval
    else:
        period = _optional(config, "sliding_window_pattern") or family.sliding_period
        local = layers - (layers // period if period > 1 else 0)
    return {"sliding_window": window, "sliding_layers": local, "chunked_window": bool(chunk)}


def _hybrid_kinds(config: Config) -> list[str]:
    """Kind of each layer of a Nemotron-H model; empty for other families."""
    if config.get("model_type") != "nemotron_h":
        return []
    listed = config.get("hybrid_override_pattern") or config.get("layers_block_type") or config.get("layer_types")
    if not listed:
        raise ValueError("model config: key 'hybrid_override_pattern' is missing")
    unknown = set(listed) - _HYBRID_KINDS.keys()
    if unknown:
        raise ValueError(f"model config: layer kind {sorted(unknown)[0]!r} is not possible; allowed: M, *, -, E")
    return [_HYBRID_KINDS[kind] for kind in listed]


def read_hybrid(config: Config) -> dict[str, Any]:
    """Layers by kind and sizes of the state space of a hybrid model; nothing for other families."""
    kinds = Counter(_hybrid_kinds(config))
    if not kinds:
        return {}
    space = StateSpace(
        heads=integer(config, "mamba_num_heads"),
        head_dim=integer(config, "mamba_head_dim"),
        state=integer(config, "ssm_state_size"),
        groups=integer(config, "n_groups"),
        kernel=integer(config, "conv_kernel"),
        chunk=_optional(config, "chunk_size") or 128,
        state_bytes=state_bytes(config),
    )
    hybrid = HybridLayers(kinds["state_space"], kinds["attention"], kinds["mlp"] + kinds["moe"])
    return {"hybrid": hybrid, "state_space": space}
