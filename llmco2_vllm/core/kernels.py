"""KernelGraph: the kernels of one decoder pass on one tensor-parallel rank, as linear functions of a batch.

Every kernel's FLOPs and bytes are linear in a short driver vector built from a BatchShape, so a whole step is
one small matrix-vector product. Counts follow LLMCO2 (arXiv:2410.02950) and Pope et al., "Efficiently Scaling
Transformer Inference" (arXiv:2211.05102): a product with a weight matrix of w elements takes 2 w FLOPs per
token and streams the matrix once per step, whatever phases share the step. docs/adr/0006 compares them with vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.flow import data_flow
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.latent_kernels import latent_attention_kernels
from llmco2_vllm.core.model import ModelSpec, Precision
from llmco2_vllm.core.nodes import (
    DRIVERS,
    Kernel,
    KernelKind,
    Payer,
    Terms,
    all_reduce,
    elementwise,
    gated_activation,
    linear,
)
from llmco2_vllm.core.state_space_kernels import state_space_kernels

__all__ = [
    "DRIVERS",
    "Kernel",
    "KernelGraph",
    "KernelKind",
    "Payer",
    "Terms",
    "build_graph",
    "windowed_reads",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class KernelGraph:
    """Kernels of a step, the data flow between them, and what the driver vector needs of the model.

    edges: (producer, consumer) by kernel name; repeated layers are drawn once.
    window: tokens a sliding-window layer sees; chunked: it sees its own chunk of that many.
    experts, experts_per_token: of a layer, 0 for a dense model.
    expert_batches: data-parallel ranks whose tokens meet at the experts.
    """

    kernels: tuple[Kernel, ...]
    edges: tuple[tuple[str, str], ...]
    window: int | None = None
    chunked: bool = False
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
        prefill_sequences, prefill_tokens, prefill_pairs, prefill_kv, prefill_samples = prefill
        decode_sequences, decode_tokens, decode_pairs, decode_kv, decode_samples = decode
        tokens = prefill_tokens + decode_tokens
        samples = prefill_samples + decode_samples
        experts = 0.0
        if self.experts:
            experts = self.experts * (1.0 - self._miss_ratio ** (tokens * self.expert_batches))
        window_prefill: tuple[float, float] = (0.0, 0.0)
        window_decode: tuple[float, float] = (0.0, 0.0)
        if self.window is not None:
            window_prefill = windowed_reads(prefill, self.window, self.chunked)
            window_decode = windowed_reads(decode, self.window, self.chunked)
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
            prefill_sequences,
            decode_sequences,
            1.0 if prefill_tokens else 0.0,
            1.0 if decode_tokens else 0.0,
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


def ceiling_seconds(graph: KernelGraph, device: DeviceSpec) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of each kernel at the compute, memory and network ceiling of the data sheet, by driver, repeats included.

    Each of shape (kernels, drivers). A device without a known link moves its collectives through memory.
    """
    peaks = np.array([[device.peak_flops(kernel.dtype)] for kernel in graph.kernels])
    link = device.link_bytes_per_second or device.memory_bandwidth_bytes_per_second
    return (
        graph.coefficients("flops") / peaks,
        graph.memory_coefficients() / device.memory_bandwidth_bytes_per_second,
        graph.coefficients("network_bytes") / link,
    )


def windowed_reads(phase: PhaseShape, window: int, chunked: bool = False) -> tuple[float, float]:
    """(pairs, cached tokens read) of a layer that attends locally, from the totals of a phase.

    A token sees at most ``window`` keys. Totals bound it from above: exact when the requests of the phase
    have alike contexts. Within chunks of w tokens (Llama 4) a token sees (w + 1) / 2 keys on average, and n tokens
    in a row at most n (w + 1) / 2 + r (w - r) / 2 with r = n mod w; the last part is at most w^2 / 8.
    """
    sequences, tokens, pairs, kv_tokens, _ = phase
    seen: float = min(pairs, tokens * window)
    if chunked:
        seen = min(seen, tokens * (window + 1) / 2 + sequences * window * window / 8)
    return seen, min(kv_tokens, sequences * window + tokens)


def build_graph(model: ModelSpec, topology: Topology) -> KernelGraph:
    """The kernels of a step of ``model``, work per tensor-parallel rank along all pipeline stages.

    Data-parallel ranks repeat everything but the experts on batches of their own; the batch is that of one rank.
    """
    parts = [_embedding(model), *_mixer_block(model, topology), *_mlp_block(model, topology)]
    if model.moe_layers:
        parts += _expert_block(model, topology)
    parts += [*_head(model, topology), *_transfers(model, topology)]
    kernels = tuple(kernel for kernel in parts if kernel.repeat)
    return KernelGraph(
        kernels=kernels,
        edges=data_flow({kernel.name for kernel in kernels}),
        window=model.sliding_window if model.sliding_layers else None,
        chunked=model.chunked_window,
        experts=model.experts if model.moe_layers else 0,
        experts_per_token=model.experts_per_token,
        expert_batches=topology.data_parallel,
    )


def _embedding(model: ModelSpec) -> Kernel:
    moved = 2 * model.hidden * model.activation_bytes
    dtype = model.activation_dtype
    return Kernel("embedding", KernelKind.ELEMENTWISE, 1, activation_bytes={"tokens": moved}, dtype=dtype)


def _attention(phase: str, window: bool, model: ModelSpec, topology: Topology) -> Kernel:
    """Scores and weighted values: 4 FLOPs per pair and query channel; keys and values read once per request."""
    heads = model.q_width / topology.tensor_parallel
    prefix = "window_" if window else ""
    return Kernel(
        f"{phase}_attention_{'sliding' if window else 'full'}",
        KernelKind.ATTENTION,
        model.sliding_layers if window else model.attention_layers - model.sliding_layers,
        payer=Payer(f"{phase}_pairs"),
        flops={f"{prefix}{phase}_pairs": 4 * heads},
        activation_bytes={f"{phase}_tokens": 2 * heads * model.activation_bytes},
        kv_bytes={f"{prefix}{phase}_kv": 2 * _kv_width(model, topology) * model.kv_bytes},
        dtype=model.activation_dtype,
    )


def _kv_width(model: ModelSpec, topology: Topology) -> float:
    """Key channels on one rank; key heads are replicated once there are more ranks than heads."""
    return max(1.0, model.kv_heads / topology.tensor_parallel) * model.head_dim


def _attention_kernels(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """Plain attention, grouped queries included, from the normed hidden state to the heads' values."""
    q, kv = model.q_width / topology.tensor_parallel, _kv_width(model, topology)
    layers = model.attention_layers
    rope = Kernel(
        "rope_and_kv_write",
        KernelKind.ELEMENTWISE,
        layers,
        flops={"tokens": 6 * (q + kv)},
        activation_bytes={"tokens": 2 * (q + kv) * model.activation_bytes},
        kv_bytes={"tokens": 2 * kv * model.kv_bytes},
        dtype=model.activation_dtype,
    )
    attention = [
        _attention(phase, window, model, topology) for phase in ("prefill", "decode") for window in (False, True)
    ]
    return [
        linear("qkv_projection", layers, (model.hidden, q + 2 * kv), model.attention_precision, model),
        rope,
        *attention,
    ]


def _mixer_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """Token mixers with the norms around them: attention, plain or latent, and state space."""
    layers, values = model.attention_layers, model.q_width / topology.tensor_parallel
    if model.latent:
        attention = latent_attention_kernels(model, model.latent, topology)
        values = model.heads * model.latent.value_dim / topology.tensor_parallel
    else:
        attention = _attention_kernels(model, topology)
    space = state_space_kernels(model, model.state_space, topology) if model.state_space else []
    return [
        elementwise("input_norm", layers + model.state_space_layers, model.hidden, model),
        *attention,
        linear("output_projection", layers, (values, model.hidden), model.attention_precision, model),
        all_reduce("attention_all_reduce", layers, model, topology),
        *space,
        elementwise("post_norm", model.mlp_layers, model.hidden, model),
    ]


def _mlp_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    dense, precision = model.mlp_layers - model.moe_layers, model.linear_precision
    width = model.intermediate / topology.tensor_parallel
    ups = model.mlp_matrices - 1
    return [
        linear("gate_up_projection", dense, (model.hidden, ups * width), precision, model),
        gated_activation("activation", dense, width, model),
        linear("down_projection", dense, (width, model.hidden), precision, model),
        all_reduce("mlp_all_reduce", model.mlp_layers, model, topology),
    ]


def _grouped(name: str, rows: float, columns: float, model: ModelSpec, topology: Topology) -> Kernel:
    """Grouped product of the routed tokens with matrices of rows x columns, the experts on one rank.

    Only experts that get a token are streamed: E (1 - (1 - k/E)^T) are expected of T tokens with k of E each.
    Expert-parallel ranks hold whole experts and get a share of the tokens; else every rank gets all of them.
    """
    ranks = topology.expert_ranks if topology.expert_parallel else 1
    routed = model.experts_per_token * topology.data_parallel / ranks
    return Kernel(
        name,
        KernelKind.EXPERT,
        model.moe_layers,
        flops={"tokens": 2 * rows * columns * routed},
        weight_bytes={"experts": rows * columns * model.weight_bytes / ranks},
        activation_bytes={"tokens": (rows + columns) * routed * model.activation_bytes},
        rows=rows,
        columns=columns,
        dtype=model.compute_dtype,
    )


def _expert_block(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """Router, routed and shared experts. Without expert parallelism the experts' width is split over all ranks of
    all data-parallel engines, which then gather each other's tokens (vLLM, FusedMoEParallelConfig)."""
    layers, ups, precision = model.moe_layers, model.mlp_matrices - 1, model.linear_precision
    shared, batches = model.shared_intermediate / topology.tensor_parallel, topology.data_parallel
    width: float = model.moe_intermediate
    sent = 2 * model.experts_per_token * model.hidden * model.activation_bytes / topology.tensor_parallel
    if not topology.expert_parallel:
        width /= topology.tensor_parallel * batches
        sent = 2 * (batches - 1) * model.hidden * model.activation_bytes
    # Engines keep the router unquantised, and its choice of experts is what a step is most sensitive to.
    router = Precision(model.activation_bytes, model.activation_dtype)
    routed = model.experts_per_token * batches / (topology.expert_ranks if topology.expert_parallel else 1)
    return [
        linear("router", layers, (model.hidden, model.experts), router, model),
        _grouped("expert_gate_up", model.hidden, ups * width, model, topology),
        gated_activation("expert_activation", layers, routed * width, model),
        _grouped("expert_down", width, model.hidden, model, topology),
        linear("shared_gate_up", layers if shared else 0, (model.hidden, ups * shared), precision, model),
        gated_activation("shared_activation", layers if shared else 0, shared, model),
        linear("shared_down", layers if shared else 0, (shared, model.hidden), precision, model),
        Kernel(
            "expert_all_to_all",
            KernelKind.COLLECTIVE,
            layers if batches > 1 else 0,
            network_bytes={"tokens": sent},
            dtype=model.activation_dtype,
        ),
    ]


def _head(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """Final norm, LM head and sampler; a pooling model has only the norm."""
    norm = elementwise("final_norm", 1, model.hidden, model)
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
        rows=model.hidden,
        columns=vocab,
        dtype=model.activation_dtype,
    )
    # Logits are widened to 32 bits, read and written once more by the softmax.
    sampler = Kernel(
        "sampler",
        KernelKind.ELEMENTWISE,
        1,
        payer=Payer.SAMPLES,
        flops={"samples": 4 * model.vocab},
        activation_bytes={"samples": 3 * 4 * model.vocab},
        dtype=model.activation_dtype,
    )
    return [norm, head, sampler]


def _transfers(model: ModelSpec, topology: Topology) -> list[Kernel]:
    """The hidden state handed from one pipeline stage to the next."""
    moved = model.hidden * model.activation_bytes
    name, repeat = "stage_transfer", topology.pipeline_parallel - 1
    dtype = model.activation_dtype
    return [Kernel(name, KernelKind.COLLECTIVE, repeat, network_bytes={"tokens": moved}, dtype=dtype)]
