"""ModelSpec: the sizes of a transformer that decide its FLOPs and bytes, from a Hugging Face ``config.json``.

Families whose layout differs from the generic decoder (latent attention, state-space layers, ...) are read as
a generic decoder with ``generic=True``; the predictor then widens its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class _Family(NamedTuple):
    """What a family's config leaves to its class: gated MLP, tied embeddings, default sliding period."""

    gated: bool = True
    tied: bool = False
    sliding_period: int = 1
    encoder: bool = False


_ENCODER = _Family(gated=False, tied=True, encoder=True)
# Source: the configuration classes of Hugging Face Transformers (configuration_<model_type>.py).
# sliding_period p: every p-th layer attends to the full context; 1 means that no layer is exempt from the window.
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "mixtral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "qwen2_moe": _Family(),
    "qwen3_moe": _Family(),
    "qwen3_vl_text": _Family(),
    "phi3": _Family(),
    "gemma": _Family(tied=True),
    "gemma2": _Family(tied=True, sliding_period=2),
    "gemma3": _Family(tied=True, sliding_period=6),
    "gemma3_text": _Family(tied=True, sliding_period=6),
    "gpt_oss": _Family(sliding_period=2),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
}
_DTYPES = {
    "bfloat16": ("bf16", 2.0),
    "float16": ("fp16", 2.0),
    "half": ("fp16", 2.0),
    "float32": ("fp32", 4.0),
    "float": ("fp32", 4.0),
}
# Bytes per weight and the dtype products are computed in (None: weights are widened, activations decide).
# mxfp4 adds one scale byte per 32 weights (OCP Microscaling Formats v1.0); gptq and awq one 16-bit scale
# per group of 128, and small zero points.
_QUANTISED: Mapping[str, tuple[float, str | None]] = {
    "fp8": (1.0, "fp8"),
    "fbgemm_fp8": (1.0, "fp8"),
    "mxfp4": (0.5 + 1 / 32, None),
    "int8": (1.0, "int8"),
    "int4": (0.5 + 2 / 128, None),
}
_KV_BYTES = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
_NO_HEAD = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForRewardModel")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one model; counts unless the name says otherwise.

    intermediate: width of the dense MLP; moe_intermediate: of one expert; shared_intermediate: of all
    shared experts of a layer together. moe_layers of ``layers`` have experts instead of the dense MLP.
    sliding_layers of ``layers`` attend to the last ``sliding_window`` tokens only.
    weight_bytes: bytes per weight of the linear layers; head and embedding stay at activation_bytes.
    compute_dtype: dtype of the products of the linear layers; activation_dtype: of everything else.
    generic: the layout was guessed, estimates are out of distribution.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    shared_intermediate: int = 0
    moe_layers: int = 0
    sliding_window: int | None = None
    sliding_layers: int = 0
    activation_dtype: str = "bf16"
    compute_dtype: str = "bf16"
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    kv_bytes: float = 2.0
    has_lm_head: bool = True
    generic: bool = False
    family: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], kv_cache_dtype: str = "auto") -> ModelSpec:
        """Read a Hugging Face config (``config.json`` as a dict, multimodal ``text_config`` included).

        ``dtype`` (or ``torch_dtype``) may be overridden in the mapping with what the engine really runs.
        Raises ValueError that names the missing or impossible key.
        """
        text = config.get("text_config")
        merged = {**config, **text} if isinstance(text, Mapping) else dict(config)
        family = str(merged.get("model_type", ""))
        traits = _FAMILIES.get(family, _Family())
        precision = _precision(merged, config.get("quantization_config"), kv_cache_dtype)
        # An encoder attends both ways, which the causal pairs of a batch do not count: not calibrated either.
        precision["generic"] |= family not in _FAMILIES or traits.encoder
        return cls(
            **_attention(merged),
            **_mlp(merged),
            **_sliding(merged, traits),
            **precision,
            vocab=_integer(merged, "vocab_size"),
            gated_mlp=traits.gated,
            tied_embeddings=bool(merged.get("tie_word_embeddings", traits.tied)),
            has_lm_head=_has_lm_head(config, traits),
            family=family,
        )

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; the value heads have the same."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP: up and down, and gate."""
        return 3 if self.gated_mlp else 2

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding."""
        return self.vocab * self.hidden

    @property
    def non_embedding_parameters(self) -> int:
        """Weights of all layers and the final norm, without embedding and LM head."""
        attention = self.hidden * (2 * self.q_width + 2 * self.kv_width)
        dense = self.mlp_matrices * self.hidden * self.intermediate
        experts = self.experts * self.mlp_matrices * self.hidden * self.moe_intermediate
        shared = self.mlp_matrices * self.hidden * self.shared_intermediate
        moe = self.hidden * self.experts + experts + shared
        norms = 2 * self.hidden
        dense_layers = self.layers - self.moe_layers
        return self.layers * (attention + norms) + dense_layers * dense + self.moe_layers * moe + self.hidden

    @property
    def parameters(self) -> int:
        """All weights: layers, embedding, and the LM head where it is not tied; biases are left out."""
        head = self.embedding_parameters if self.has_lm_head and not self.tied_embeddings else 0
        return self.non_embedding_parameters + self.embedding_parameters + head


def _integer(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model config: {name}={value!r} is not possible; expected a positive integer")
            return value
    raise ValueError(f"model config: key {names[0]!r} is missing")


def _optional(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = _integer(config, "hidden_size", "n_embd", "d_model")
    heads = _integer(config, "num_attention_heads", "n_head")
    return {
        "layers": _integer(config, "num_hidden_layers", "n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _optional(config, "num_key_value_heads") or heads,
        "head_dim": _optional(config, "head_dim") or max(1, hidden // heads),
    }


def _mlp(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = _optional(config, "num_experts", "num_local_experts", "n_routed_experts")
    layers = _integer(config, "num_hidden_layers", "n_layer")
    if experts <= 1:
        return {"intermediate": _integer(config, "intermediate_size", "n_inner")}
    moe_intermediate = _optional(config, "moe_intermediate_size") or _integer(config, "intermediate_size")
    shared = _optional(config, "shared_expert_intermediate_size")
    shared = shared or _optional(config, "n_shared_experts") * moe_intermediate
    step = max(1, _optional(config, "decoder_sparse_step"))
    dense_only = set(config.get("mlp_only_layers") or [])
    dense_only |= set(range(_optional(config, "first_k_dense_replace")))
    moe_layers = sum((layer + 1) % step == 0 and layer not in dense_only for layer in range(layers))
    return {
        "intermediate": _optional(config, "intermediate_size") or moe_intermediate,
        "experts": experts,
        "experts_per_token": _integer(config, "num_experts_per_tok", "num_experts_per_token"),
        "moe_intermediate": moe_intermediate,
        "shared_intermediate": shared,
        "moe_layers": moe_layers,
    }


def _sliding(config: Mapping[str, Any], traits: _Family) -> dict[str, Any]:
    window = _optional(config, "sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return {"sliding_window": None, "sliding_layers": 0}
    layers = _integer(config, "num_hidden_layers", "n_layer")
    kinds = config.get("layer_types")
    if kinds:
        return {"sliding_window": window, "sliding_layers": sum(kind == "sliding_attention" for kind in kinds)}
    period = _optional(config, "sliding_window_pattern") or traits.sliding_period
    full = layers // period if period > 1 else 0
    return {"sliding_window": window, "sliding_layers": layers - full}


def _precision(config: Mapping[str, Any], quantised: Any, kv_cache_dtype: str) -> dict[str, Any]:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"model config: dtype={name!r} is not possible; allowed: {', '.join(sorted(_DTYPES))}")
    dtype, size = _DTYPES[name]
    weight_bytes, compute = size, dtype
    method = _quantisation(quantised if quantised is not None else config.get("quantization_config"))
    if method is not None and method in _QUANTISED:
        weight_bytes, products = _QUANTISED[method]
        compute = products or dtype
    return {
        "generic": method == "unknown",
        "activation_dtype": dtype,
        "compute_dtype": compute,
        "weight_bytes": weight_bytes,
        "activation_bytes": size,
        "kv_bytes": _KV_BYTES.get(kv_cache_dtype, size),
    }


def _quantisation(settings: Any) -> str | None:
    """Key of ``_QUANTISED``, None for weights stored in the model's dtype, ``unknown`` for a method not listed."""
    if not isinstance(settings, Mapping):
        return None
    method = str(settings.get("quant_method", "")).lower()
    if method is not None and method in _QUANTISED:
        return method
    bits, floating = settings.get("bits", settings.get("num_bits")), False
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        weights = next(iter(groups.values())).get("weights") or {}
        bits, floating = weights.get("num_bits"), weights.get("type") == "float"
    if method == "bitsandbytes":
        bits = 4 if settings.get("load_in_4bit") else 8
    if bits == 8:
        return "fp8" if floating or "FP8" in str(settings.get("quant_algo", "")) else "int8"
    if bits == 4:
        return "int4"
    return "unknown"


def _has_lm_head(config: Mapping[str, Any], traits: _Family) -> bool:
    names = config.get("architectures")
    if not names:
        return not traits.encoder
    return not str(names[0]).endswith(_NO_HEAD)
