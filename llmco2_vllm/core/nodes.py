"""Kernels as nodes of a graph: work as coefficients by driver, and how the common ones are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec, Precision

Terms = Mapping[str, float]

# What a kernel's work may be proportional to.
#   step, sampled       1 in a step with tokens, with sampled rows: weights are streamed once
#   tokens              both phases; *_tokens one phase
#   *_pairs, *_kv       (query, key) pairs and cached tokens read; window_* of sliding-window layers
#   samples             rows of the LM head
#   experts             expected distinct experts of a layer that get a token
#   *_sequences         requests of a phase: each has a recurrent state
#   *_step              1 in a step with tokens of the phase: weights that one phase alone uses
DRIVERS = (
    "step",
    "tokens",
    "prefill_tokens",
    "decode_tokens",
    "prefill_pairs",
    "decode_pairs",
    "prefill_kv",
    "decode_kv",
    "window_prefill_pairs",
    "window_decode_pairs",
    "window_prefill_kv",
    "window_decode_kv",
    "sampled",
    "samples",
    "experts",
    "prefill_sequences",
    "decode_sequences",
    "prefill_step",
    "decode_step",
)


class Payer(StrEnum):
    """Which driver's requests pay for a kernel (ARCHITECTURE decision 5)."""

    TOKENS = "tokens"
    PREFILL_PAIRS = "prefill_pairs"
    DECODE_PAIRS = "decode_pairs"
    SAMPLES = "samples"


class KernelKind(StrEnum):
    """Kernels of a kind reach the same share of a ceiling."""

    LINEAR = "linear"
    EXPERT = "expert"
    ATTENTION = "attention"
    STATE_SPACE = "state_space"
    ELEMENTWISE = "elementwise"
    COLLECTIVE = "collective"


@dataclass(frozen=True)
class Kernel:
    """One node: work of one execution on one rank, as coefficients by driver; ``repeat`` executions per step.

    flops; weight_bytes, activation_bytes, kv_bytes (keys, values and recurrent states) through memory;
    network_bytes sent by the rank.
    rows, columns: of the weight matrix on this rank (of one expert for grouped products), 0 without one.
    dtype: of the products.
    """

    name: str
    kind: KernelKind
    repeat: int
    payer: Payer = Payer.TOKENS
    flops: Terms = field(default_factory=dict)
    weight_bytes: Terms = field(default_factory=dict)
    activation_bytes: Terms = field(default_factory=dict)
    kv_bytes: Terms = field(default_factory=dict)
    network_bytes: Terms = field(default_factory=dict)
    rows: float = 0.0
    columns: float = 0.0
    dtype: str = "bf16"


def linear(name: str, repeat: int, shape: tuple[float, float], precision: Precision, model: ModelSpec) -> Kernel:
    """Tokens times a weight matrix of ``shape`` (rows, columns): 2 FLOPs per weight and token, streamed once."""
    rows, columns = shape
    return Kernel(
        name,
        KernelKind.LINEAR,
        repeat,
        flops={"tokens": 2 * rows * columns},
        weight_bytes={"step": rows * columns * precision.weight_bytes},
        activation_bytes={"tokens": (rows + columns) * model.activation_bytes},
        rows=rows,
        columns=columns,
        dtype=precision.dtype,
    )


def elementwise(name: str, repeat: int, width: float, model: ModelSpec) -> Kernel:
    """One read and one write of ``width`` values per token, a few FLOPs each."""
    return Kernel(
        name,
        KernelKind.ELEMENTWISE,
        repeat,
        flops={"tokens": 4 * width},
        activation_bytes={"tokens": 2 * width * model.activation_bytes},
        dtype=model.activation_dtype,
    )


def gated_activation(name: str, repeat: int, width: float, model: ModelSpec) -> Kernel:
    """``width`` values per token after the up projections: every matrix's output is read, the product written once."""
    ups = model.mlp_matrices - 1
    return Kernel(
        name,
        KernelKind.ELEMENTWISE,
        repeat,
        flops={"tokens": 4 * ups * width},
        activation_bytes={"tokens": (ups + 1) * width * model.activation_bytes},
        dtype=model.activation_dtype,
    )


def all_reduce(name: str, repeat: int, model: ModelSpec, topology: Topology) -> Kernel:
    """Ring all-reduce of the hidden state: each rank sends 2 (n - 1) / n of it (Patarasuk and Yuan, 2009)."""
    ranks = topology.tensor_parallel
    sent = 2 * (ranks - 1) / ranks * model.hidden * model.activation_bytes
    repeat = repeat if ranks > 1 else 0
    dtype = model.activation_dtype
    return Kernel(name, KernelKind.COLLECTIVE, repeat, network_bytes={"tokens": sent}, dtype=dtype)
