"""Kernels of a Mamba-2 layer on one tensor-parallel rank.

Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060): prefill is a scan over chunks of tokens (section 6), decode
updates one state per sequence. Heads are split over ranks; groups are replicated once ranks outnumber them.
"""

from __future__ import annotations

from typing import NamedTuple

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.mixers import StateSpace
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.core.nodes import Kernel, KernelKind, all_reduce, elementwise, linear

# Per value of the state and token: decay, add the input, weigh it, read out and sum.
_UPDATE_FLOPS = 5
# States between chunks are kept in 32 bits.
_SCAN_STATE_BYTES = 4.0


class _Share(NamedTuple):
    """Channels of one rank: of the heads, of the maps B and C together, and the number of heads."""

    inner: float
    maps: float
    heads: float

    @property
    def mixed(self) -> float:
        """Channels of the convolution: inputs, B and C."""
        return self.inner + self.maps


def state_space_kernels(model: ModelSpec, space: StateSpace, topology: Topology) -> list[Kernel]:
    """From the normed hidden state to the layer's output."""
    ranks, layers = topology.tensor_parallel, model.state_space_layers
    maps = 2 * max(1.0, space.groups / ranks) * space.state
    share = _Share(space.inner / ranks, maps, space.heads / ranks)
    precision = model.linear_precision
    # In: gate, inputs, B, C, and a time step per head.
    entry = (model.hidden, share.inner + share.mixed + share.heads)
    return [
        linear("state_space_in_projection", layers, entry, precision, model),
        _convolution(model, space, share),
        _scan(model, space, share),
        _update(model, space, share),
        elementwise("state_space_norm", layers, share.inner, model),
        linear("state_space_out_projection", layers, (share.inner, model.hidden), precision, model),
        all_reduce("state_space_all_reduce", layers, model, topology),
    ]


def _convolution(model: ModelSpec, space: StateSpace, share: _Share) -> Kernel:
    """Causal convolution of each channel; the last ``kernel - 1`` inputs of a sequence are read and written."""
    kept = 2 * share.mixed * (space.kernel - 1) * model.activation_bytes
    return Kernel(
        "state_space_convolution",
        KernelKind.ELEMENTWISE,
        model.state_space_layers,
        flops={"tokens": 2 * space.kernel * share.mixed},
        weight_bytes={"step": space.kernel * share.mixed * model.activation_bytes},
        activation_bytes={"tokens": 2 * share.mixed * model.activation_bytes},
        kv_bytes={"prefill_sequences": kept, "decode_sequences": kept},
        dtype=model.activation_dtype,
    )


def _streams(model: ModelSpec, share: _Share) -> float:
    """Bytes per token: inputs and outputs of the heads, B and C, time steps."""
    return (2 * share.inner + share.maps + share.heads) * model.activation_bytes


def _state_traffic(space: StateSpace, share: _Share) -> float:
    """Bytes per sequence and step: the state is read and written once."""
    return 2 * share.inner * space.state * space.state_bytes


def _scan(model: ModelSpec, space: StateSpace, share: _Share) -> Kernel:
    """Chunks of Q tokens: scores C B (2 Q N per group) and their products (2 Q P per head) within a chunk, states
    into and out of it (4 N P per head)."""
    groups = share.maps / (2 * space.state)
    inside = 2 * space.chunk * (groups * space.state + share.inner)
    between = 4 * space.state * share.inner
    states = 2 * share.inner * space.state * _SCAN_STATE_BYTES / space.chunk
    return Kernel(
        "prefill_state_space_scan",
        KernelKind.STATE_SPACE,
        model.state_space_layers,
        flops={"prefill_tokens": inside + between},
        activation_bytes={"prefill_tokens": _streams(model, share) + states},
        kv_bytes={"prefill_sequences": _state_traffic(space, share)},
        dtype=model.activation_dtype,
    )


def _update(model: ModelSpec, space: StateSpace, share: _Share) -> Kernel:
    return Kernel(
        "decode_state_space_update",
        KernelKind.STATE_SPACE,
        model.state_space_layers,
        flops={"decode_tokens": _UPDATE_FLOPS * share.inner * space.state},
        activation_bytes={"decode_tokens": _streams(model, share)},
        kv_bytes={"decode_sequences": _state_traffic(space, share)},
        dtype=model.activation_dtype,
    )
