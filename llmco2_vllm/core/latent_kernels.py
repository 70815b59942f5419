"""Kernels of multi-head latent attention (MLA) on one tensor-parallel rank.

DeepSeek-V2 (arXiv:2405.04434), as vLLM computes it (``mla_attention.py``): prefill expands keys and values of the
whole context and attends per head; decode folds the expansion into query and output and attends to the latent.
The latent has no heads: it is cached and read whole on every rank.
"""

from __future__ import annotations

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.mixers import LatentAttention
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.core.nodes import Kernel, KernelKind, Payer, elementwise, linear


def latent_attention_kernels(model: ModelSpec, latent: LatentAttention, topology: Topology) -> list[Kernel]:
    """From the normed hidden state to the heads' values, without the output projection."""
    heads = model.heads / topology.tensor_parallel
    return [
        *_projections(model, latent, heads),
        _rope_and_kv_write(model, latent, heads),
        _expansion(model, latent, heads),
        _prefill_attention(model, latent, heads),
        _absorption("query_absorption", latent.nope_dim, model, latent, heads),
        _decode_attention(model, latent, heads),
        _absorption("value_absorption", latent.value_dim, model, latent, heads),
    ]


def _projections(model: ModelSpec, latent: LatentAttention, heads: float) -> list[Kernel]:
    """q_a and kv_a are replicated on every rank, q_b is split by heads."""
    layers, precision = model.attention_layers, model.attention_precision
    query = heads * (latent.nope_dim + latent.rope_dim)
    rank = latent.query_rank
    if rank:
        queries = [
            linear("q_a_projection", layers, (model.hidden, rank), precision, model),
            linear("q_b_projection", layers, (rank, query), precision, model),
        ]
    else:
        queries = [linear("q_projection", layers, (model.hidden, query), precision, model)]
    return [
        *queries,
        linear("kv_a_projection", layers, (model.hidden, latent.cache_width), precision, model),
        elementwise("latent_norm", layers, rank + latent.latent_rank, model),
    ]


def _rope_and_kv_write(model: ModelSpec, latent: LatentAttention, heads: float) -> Kernel:
    """Rotates the rope channels of the queries and of the one shared key; writes the latent and that key."""
    turned = (heads + 1) * latent.rope_dim
    return Kernel(
        "rope_and_kv_write",
        KernelKind.ELEMENTWISE,
        model.attention_layers,
        flops={"tokens": 6 * turned},
        activation_bytes={"tokens": (2 * turned + latent.latent_rank) * model.activation_bytes},
        kv_bytes={"tokens": latent.cache_width * model.kv_bytes},
        dtype=model.activation_dtype,
    )


def _expansion(model: ModelSpec, latent: LatentAttention, heads: float) -> Kernel:
    """kv_b: keys and values of every head from the latents of the context and of the new tokens alike."""
    rows, columns = latent.latent_rank, heads * (latent.nope_dim + latent.value_dim)
    precision = model.attention_precision
    return Kernel(
        "kv_b_projection",
        KernelKind.LINEAR,
        model.attention_layers,
        payer=Payer.PREFILL_PAIRS,
        flops={"prefill_kv": 2 * rows * columns},
        weight_bytes={"prefill_step": rows * columns * precision.weight_bytes},
        activation_bytes={"prefill_kv": columns * model.activation_bytes},
        kv_bytes={"prefill_kv": latent.cache_width * model.kv_bytes},
        rows=rows,
        columns=columns,
        dtype=precision.dtype,
    )


def _prefill_attention(model: ModelSpec, latent: LatentAttention, heads: float) -> Kernel:
    """Per head: scores over nope + rope channels, then values; expanded keys and values are read once."""
    query, value = latent.nope_dim + latent.rope_dim, latent.value_dim
    size = model.activation_bytes
    return Kernel(
        "prefill_attention_latent",
        KernelKind.ATTENTION,
        model.attention_layers,
        payer=Payer.PREFILL_PAIRS,
        flops={"prefill_pairs": 2 * heads * (query + value)},
        activation_bytes={
            "prefill_tokens": heads * (query + value) * size,
            "prefill_kv": heads * (query + value) * size,
        },
        dtype=model.activation_dtype,
    )


def _absorption(name: str, width: int, model: ModelSpec, latent: LatentAttention, heads: float) -> Kernel:
    """Half of kv_b, folded into the query or the output of decode; kept in the activations' dtype by vLLM."""
    columns, size = heads * width, model.activation_bytes
    return Kernel(
        name,
        KernelKind.LINEAR,
        model.attention_layers,
        flops={"decode_tokens": 2 * latent.latent_rank * columns},
        weight_bytes={"decode_step": latent.latent_rank * columns * size},
        activation_bytes={"decode_tokens": (columns + heads * latent.latent_rank) * size},
        rows=latent.latent_rank,
        columns=columns,
        dtype=model.activation_dtype,
    )


def _decode_attention(model: ModelSpec, latent: LatentAttention, heads: float) -> Kernel:
    """All heads attend to one latent key of rank + rope channels, and its first rank channels are the value."""
    key, value = latent.cache_width, latent.latent_rank
    return Kernel(
        "decode_attention_latent",
        KernelKind.ATTENTION,
        model.attention_layers,
        payer=Payer.DECODE_PAIRS,
        flops={"decode_pairs": 2 * heads * (key + value)},
        activation_bytes={"decode_tokens": heads * (key + value) * model.activation_bytes},
        kv_bytes={"decode_kv": key * model.kv_bytes},
        dtype=model.activation_dtype,
    )
