"""KernelGraph: the kernels of one decoder pass on one tensor-parallel rank, as linear functions of a batch.

Every kernel's FLOPs and bytes are linear in a short driver vector built from a BatchShape, so a whole step is
one small matrix-vector product. Counts follow LLMCO2 (arXiv:2410.02950) and Pope et al., "Efficiently Scaling
Transformer Inference" (arXiv:2211.05102): a product with a weight matrix of w elements takes 2 w FLOPs per
token and streams the matrix once per step, whatever phases share the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec

FloatArray = NDArray[np.float64]
Terms = Mapping[str, float]

# What a kernel's work may be proportional to.
#   step, sampled       1 in a step with tokens, with sampled rows: weights are streamed once
#   tokens              both phases; *_tokens one phase
#   *_pairs, *_kv       (query, key) pairs and cached tokens read; window_* of sliding-window layers
#   samples             rows of the LM head
#   experts             expected distinct experts of a layer that get a token
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
    ELEMENTWISE = "elementwise"
    COLLECTIVE = "collective"


@dataclass(frozen=True)
class Kernel:
    """One node: work of one execution on one rank, as coefficients by driver; ``repeat`` executions per step.

    flops; weight_bytes, activation_bytes, kv_bytes through memory; network_bytes sent by the rank.
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


@dataclass(frozen=True)
class KernelGraph:
    """Kernels of a step, the data flow between them, and what the driver vector needs of the model.

    edges: (producer, consumer) by kernel name; repeated layers are drawn once.
    window: tokens a sliding-window layer sees. experts, experts_per_token: of a layer, 0 for a dense model.
    expert_batches: data-parallel ranks whose tokens meet at the experts.
    """

    kernels: tuple[Kernel, ...]
    edges: tuple[tuple[str, str], ...]
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_batches: int = 1

    @cached_property
    def _miss_ratio(self) -> float:
        """Chance that one token leaves one given expert alone."""
        return 1.0 - self.experts_per_token / self.experts if self.experts else 1.0

    def drivers(self, batch: BatchShape) -> list[float]:
        """The driver vector, in the order of ``DRIVERS``; all zero for a batch without tokens."""
        prefill, decode, _ = batch
        _, prefill_tokens, prefill_pairs, prefill_kv, prefill_samples = prefill
        _, decode_tokens, decode_pairs, decode_kv, decode_samples = decode
        tokens = prefill_tokens + decode_tokens
        samples = prefill_samples + decode_samples
        experts = 0.0
        if self.experts:
            experts = self.experts * (1.0 - self._miss_ratio ** (tokens * self.expert_batches))
        window_prefill: tuple[float, float] = (0.0, 0.0)
        window_decode: tuple[float, float] = (0.0, 0.0)
        if self.window is not None:
            window_prefill = windowed_reads(prefill, self.window)
            window_decode = windowed_reads(decode, self.window)
        return [
            1.0 if tokens else 0.0,
            tokens,
            prefill_tokens,
            decode_tokens,
            prefill_pairs,
            decode_pairs,
            prefill_kv,
            decode_kv,
            window_prefill[0],
            window_decode[0],
            window_prefill[1],
            window_decode[1],
            1.0 if samples else 0.0,
            samples,
            experts,
        ]

    def coefficients(self, quantity: str) -> FloatArray:
        """Coefficients of a quantity for a whole step (repeats included), shape (kernels, drivers).

        quantity: a field of Kernel, ``flops`` or one of the ``*_bytes``.
        """
        rows = np.zeros((len(self.kernels), len(DRIVERS)))
        for row, kernel in zip(rows, self.kernels, strict=True):
            for driver, value in getattr(kernel, quantity).items():
                row[DRIVERS.index(driver)] += value * kernel.repeat
        return rows

    def memory_coefficients(self) -> FloatArray:
        """All bytes through memory, shape (kernels, drivers)."""
        return sum((self.coefficients(f"{kind}_bytes") for kind in ("weight", "activation", "kv")), np.zeros(()))


def windowed_reads(phase: PhaseShape, window: int) -> tuple[float, float]:
    """(pairs, cached tokens read) of a sliding-window layer, from the totals of a phase.

    A token sees at most ``window`` keys. Totals bound it from above: exact when the requests of the phase
    have alike contexts.
    """
    sequences, tokens, pairs, kv_tokens, _ = phase
    return min(pairs, tokens * window), min(kv_tokens, sequences * window + tokens)


def build_graph(model: ModelSpec, topology: Topology) -> KernelGraph:
    """The kernels of a step of ``model``, work per tensor-parallel rank along all pipeline stages."""
    parts = [_embedding(model), *_attention_block(model, topology), *_mlp_block(model, topology)]
    if model.moe_layers:
        parts += _expert_block(model, topology)
    parts += [*_head(model, topology), *_transfers(model, topology)]
    kernels = tuple(kernel for kernel in parts if kernel.repeat)
    return KernelGraph(
        kernels=kernels,
        edges=_edges({kernel.name for kernel in kernels}),
        window=model.sliding_window if model.sliding_layers else None,
        experts=model.experts if model.moe_layers else 0,
        experts_per_token=model.experts_per_token,
        expert_batches=topology.data_parallel if topology.expert_parallel else 1,
    )


def _linear(name: str, repeat: int, rows: float, columns: float, model: ModelSpec) -> Kernel:
    """Tokens times a weight matrix of rows x columns."""
    return Kernel(
        name,
        KernelKind.LINEAR,
        repeat,
        flops={"tokens": 2 * rows * columns},
        weight_bytes={"step": rows * columns * model.weight_bytes},
        activation_bytes={"tokens": (rows + columns) * model.activation_bytes},
    )


def _elementwise(name: str, repeat: int, width: float, model: ModelSpec) -> Kernel:
    """One read and one write of ``width`` values per token, a few FLOPs each."""
    return Kernel(
        name,
        KernelKind.ELEMENTWISE,
        repeat,
        flops={"tokens": 4 * width},
        activation_bytes={"tokens": 2 * width * model.activation_bytes},
    )


def _all_reduce(name: str, repeat: int, model: ModelSpec, topology: Topology) -> Kernel:
    """Ring all-reduce of the hidden state: each rank sends 2 (n - 1) / n of it (Patarasuk and Yuan, 2009)."""
    ranks = topology.tensor_parallel
    sent = 2 * (ranks - 1) / ranks * model.hidden * model.activation_bytes
    return Kernel(name, KernelKind.COLLECTIVE, repeat if ranks > 1 else 0, network_bytes={"tokens": sent})


def _embedding(model: ModelSpec) -> Kernel:
    moved = 2 * model.hidden * model.activation_bytes
    return Kernel("embedding", KernelKind.ELEMENTWISE, 1, activation_bytes={"tokens": moved})


def _attention(phase: str, window: bool, model: ModelSpec, topology: Topology) -> Kernel:
    """Scores and weighted values: 4 FLOPs per pair and query channel; keys and values read once per request."""
    heads = model.q_width / topology.tensor_parallel
    prefix = "window_" if window else ""
    return Kernel(
        f"{phase}_attention_{'sliding' if window else 'full'}",
        KernelKind.ATTENTION,
        model.sliding_layers if window else model.layers - model.sliding_layers,
        payer=Payer(f"{phase}_pairs"),
        flops={f"{prefix}{phase}_pairs": 4 * heads},
        activation_bytes={f"{phase}_tokens": 2 * heads * model.activation_bytes},
        kv_bytes={f"{prefix}{phase}_kv": 2 * _kv_width(model, topology) * model.kv_bytes},
    )


def _kv_width(model: ModelSpec, topology: Topology) -> float:
    """Key channels on one rank; key heads are replicated once there are more ranks than heads."""
    return max(1.0, model.kv_heads / topology.tensor_parallel) * model.head_dim


def _attention_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    q, kv = model.q_width / topology.tensor_parallel, _kv_width(model, topology)
    rope = Kernel(
        "rope_and_kv_write",
        KernelKind.ELEMENTWISE,
        model.layers,
        flops={"tokens": 6 * (q + kv)},
        activation_bytes={"tokens": 2 * (q + kv) * model.activation_bytes},
        kv_bytes={"tokens": 2 * kv * model.kv_bytes},
    )
    attention = [
        _attention(phase, window, model, topology) for phase in ("prefill", "decode") for window in (False, True)
    ]
    return [
        _elementwise("input_norm", model.layers, model.hidden, model),
        _linear("qkv_projection", model.layers, model.hidden, q + 2 * kv, model),
        rope,
        *attention,
        _linear("output_projection", model.layers, q, model.hidden, model),
        _all_reduce("attention_all_reduce", model.layers, model, topology),
        _elementwise("post_norm", model.layers, model.hidden, model),
    ]


def _mlp_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    dense = model.layers - model.moe_layers
    width = model.intermediate / topology.tensor_parallel
    ups = model.mlp_matrices - 1
    return [
        _linear("gate_up_projection", dense, model.hidden, ups * width, model),
        _elementwise("activation", dense, ups * width, model),
        _linear("down_projection", dense, width, model.hidden, model),
        _all_reduce("mlp_all_reduce", model.layers, model, topology),
    ]


def _grouped(name: str, rows: float, columns: float, model: ModelSpec, topology: Topology) -> Kernel:
    """Grouped product of the routed tokens with the experts of one rank.

    Only experts that get a token are streamed: E (1 - (1 - k/E)^T) are expected of T tokens with k of E each.
    """
    shards = topology.expert_ranks
    batches = topology.data_parallel if topology.expert_parallel else 1
    routed = model.experts_per_token * batches / shards
    return Kernel(
        name,
        KernelKind.EXPERT,
        model.moe_layers,
        flops={"tokens": 2 * rows * columns * routed},
        weight_bytes={"experts": rows * columns * model.weight_bytes / shards},
        activation_bytes={"tokens": (rows + columns) * routed * model.activation_bytes},
    )


def _expert_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    layers, ups = model.moe_layers, model.mlp_matrices - 1
    shared = model.shared_intermediate / topology.tensor_parallel
    sent = topology.data_parallel > 1 and topology.expert_parallel
    routed_bytes = 2 * model.experts_per_token * model.hidden * model.activation_bytes
    return [
        _linear("router", layers, model.hidden, model.experts, model),
        _grouped("expert_gate_up", model.hidden, ups * model.moe_intermediate, model, topology),
        _grouped("expert_down", model.moe_intermediate, model.hidden, model, topology),
        _linear("shared_gate_up", layers if shared else 0, model.hidden, ups * shared, model),
        _linear("shared_down", layers if shared else 0, shared, model.hidden, model),
        Kernel(
            "expert_all_to_all",
            KernelKind.COLLECTIVE,
            layers if sent else 0,
            network_bytes={"tokens": routed_bytes / topology.tensor_parallel},
        ),
    ]


def _head(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """Final norm, LM head and sampler; a pooling model has only the norm."""
    norm = _elementwise("final_norm", 1, model.hidden, model)
    if not model.has_lm_head:
        return [norm]
    vocab = model.vocab / topology.tensor_parallel
    size = model.activation_bytes
    head = Kernel(
        "lm_head",
        KernelKind.LINEAR,
        1,
        payer=Payer.SAMPLES,
        flops={"samples": 2 * model.hidden * vocab},
        weight_bytes={"sampled": model.hidden * vocab * size},
        activation_bytes={"samples": (model.hidden + vocab) * size},
    )
    # Logits are widened to 32 bits, read and written once more by the softmax.
    sampler = Kernel(
        "sampler",
        KernelKind.ELEMENTWISE,
        1,
        payer=Payer.SAMPLES,
        flops={"samples": 4 * model.vocab},
        activation_bytes={"samples": 3 * 4 * model.vocab},
    )
    return [norm, head, sampler]


def _transfers(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """The hidden state handed from one pipeline stage to the next."""
    moved = model.hidden * model.activation_bytes
    name, repeat = "stage_transfer", topology.pipeline_parallel - 1
    return [Kernel(name, KernelKind.COLLECTIVE, repeat, network_bytes={"tokens": moved})]


_FLOW: tuple[tuple[str, ...], ...] = (
    ("embedding",),
    ("input_norm",),
    ("qkv_projection",),
    ("rope_and_kv_write",),
    ("prefill_attention_full", "decode_attention_full", "prefill_attention_sliding", "decode_attention_sliding"),
    ("output_projection",),
    ("attention_all_reduce",),
    ("post_norm",),
    ("gate_up_projection", "router", "shared_gate_up"),
    ("expert_all_to_all",),
    ("activation", "expert_gate_up", "shared_down"),
    ("down_projection", "expert_down"),
    ("mlp_all_reduce",),
    ("stage_transfer",),
    ("final_norm",),
    ("lm_head",),
    ("sampler",),
)


def _edges(present: set[str]) -> tuple[tuple[str, str], ...]:
    """Data flow between neighbouring stages of ``_FLOW``, stages without a kernel left out."""
    stages = [[name for name in stage if name in present] for stage in _FLOW]
    stages = [stage for stage in stages if stage]
    return tuple((source, target) for one, two in pairwise(stages) for source in one for target in two)
