"""Dtypes of a model from its Hugging Face config: activations, weights, products, KV cache, recurrent state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_DTYPES = {
    "bfloat16": ("bf16", 2.0),
    "float16": ("fp16", 2.0),
    "half": ("fp16", 2.0),
    "float32": ("fp32", 4.0),
    "float": ("fp32", 4.0),
}
# Bytes per weight and the dtype products are computed in (None: weights are widened, activations decide).
# mxfp4 adds one scale byte per 32 weights (OCP Microscaling Formats v1.0), nvfp4 one per 16 (NVIDIA Blackwell
# Architecture Technical Brief); gptq and awq one 16-bit scale per group of 128, and small zero points.
_QUANTISED: Mapping[str, tuple[float, str | None]] = {
    "fp8": (1.0, "fp8"),
    "fbgemm_fp8": (1.0, "fp8"),
    "mxfp4": (0.5 + 1 / 32, None),
    "nvfp4": (0.5 + 1 / 16, "fp4"),
    "int8": (1.0, "int8"),
    "int4": (0.5 + 2 / 128, None),
}
_KV_BYTES = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
_NOT_QUANTISED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")


def read_precision(config: Mapping[str, Any], quantised: Any, kv_cache_dtype: str) -> dict[str, Any]:
    """Fields of ModelSpec that follow from dtypes. ``quantised``: the outer ``quantization_config``, if any.

    Raises ValueError that names an impossible dtype.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"model config: dtype={name!r} is not possible; allowed: {', '.join(sorted(_DTYPES))}")
    dtype, size = _DTYPES[name]
    weight_bytes, compute, attention = size, dtype, None
    settings = quantised if quantised is not None else config.get("quantization_config")
    method = _quantisation(settings)
    if method is not None and method in _QUANTISED:
        weight_bytes, products = _QUANTISED[method]
        compute = products or dtype
        attention = size if _attention_is_left_out(settings) else None
    return {
        "generic": method == "unknown",
        "activation_dtype": dtype,
        "compute_dtype": compute,
        "weight_bytes": weight_bytes,
        "attention_weight_bytes": attention,
        "block_quantised": isinstance(settings, Mapping) and bool(settings.get("weight_block_size")),
        "activation_bytes": size,
        "kv_bytes": _KV_BYTES.get(kv_cache_dtype, size),
    }


def state_bytes(config: Mapping[str, Any]) -> float:
    """Bytes per value of a recurrent state: ``mamba_ssm_cache_dtype``, 32 bits where the config says nothing.

    Source: NemotronHConfig of Hugging Face Transformers; vLLM serves the state in that dtype.
    """
    name = str(config.get("mamba_ssm_cache_dtype") or "float32").removeprefix("torch.")
    return _DTYPES.get(name, ("fp32", 4.0))[1]


def _quantisation(settings: Any) -> str | None:
    """Key of ``_QUANTISED``, None for weights stored in the model's dtype, ``unknown`` for a method not listed."""
    if not isinstance(settings, Mapping):
        return None
    method = str(settings.get("quant_method", "")).lower()
    if method is not None and method in _QUANTISED:
        return method
    algorithm = str(settings.get("quant_algo", "")).upper()
    bits, floating = settings.get("bits", settings.get("num_bits")), "FP" in algorithm
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        weights = next(iter(groups.values())).get("weights") or {}
        bits, floating = weights.get("num_bits"), weights.get("type") == "float"
    if method == "bitsandbytes":
        bits = 4 if settings.get("load_in_4bit") else 8
    if bits is None and algorithm in ("FP8", "NVFP4"):
        bits = 8 if algorithm == "FP8" else 4
    if bits == 8:
        return "fp8" if floating else "int8"
    if bits == 4:
        return "nvfp4" if floating else "int4"
    return "unknown"


def _attention_is_left_out(settings: Any) -> bool:
    """Whether the attention projections of most layers are listed as not quantised.

    Lists hold patterns (``model.layers.*.self_attn``, ``re:.*self_attn.*``) or one name per layer.
    """
    names = [str(name) for key in _NOT_QUANTISED for name in _listed(settings.get(key)) if "attn" in str(name)]
    numbered = {match[1] for name in names if (match := re.search(r"layers\.(\d+)\.", name))}
    return any(not re.search(r"layers\.\d+\.", name) for name in names) or len(numbered) > 4


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else ()
