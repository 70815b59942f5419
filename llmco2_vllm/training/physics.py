"""What a mean step computes, moves and sends, in seconds at the peaks of its devices: inputs of the baselines.

Nothing here looks at a target of an observation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.kernels import KernelGraph, KernelKind, build_graph
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.observation import Observation

FloatArray = NDArray[np.float64]
KINDS = tuple(KernelKind)
ERAS = ("2023", "2024", "2025")
# Below a nanosecond nothing is there; keeps logarithms finite.
_FLOOR = 1e-9


class Work(NamedTuple):
    """Work of one step on one rank, by kernel kind (order of ``KINDS``), each of shape (kinds,).

    compute, memory, network, roofline: seconds at full peak; the last sums the longest of the three by kernel.
    """

    compute: FloatArray
    memory: FloatArray
    network: FloatArray
    roofline: FloatArray


class _Layout(NamedTuple):
    graph: KernelGraph
    flops: FloatArray
    moved: FloatArray
    sent: FloatArray
    kinds: NDArray[np.int64]


@lru_cache(maxsize=1024)
def _layout(model: ModelSpec, topology: Topology) -> _Layout:
    graph = build_graph(model, topology)
    kinds = np.array([KINDS.index(kernel.kind) for kernel in graph.kernels])
    flops, sent = graph.coefficients("flops"), graph.coefficients("network_bytes")
    return _Layout(graph, flops, graph.memory_coefficients(), sent, kinds)


def step_work(model: ModelSpec, device: DeviceSpec, topology: Topology, batch: BatchShape) -> Work:
    """Work of one step of one engine."""
    layout = _layout(model, topology)
    drivers = np.array(layout.graph.drivers(batch))
    peaks = np.array([device.peak_flops(kernel.dtype) for kernel in layout.graph.kernels])
    flops, moved, sent = layout.flops @ drivers, layout.moved @ drivers, layout.sent @ drivers
    bandwidth = device.memory_bandwidth_bytes_per_second
    compute, memory = flops / peaks, moved / bandwidth
    network = sent / (device.link_bytes_per_second or bandwidth)
    roofline = np.maximum(np.maximum(compute, memory), network)
    columns = (compute, memory, network, roofline)
    return Work(*(np.bincount(layout.kinds, column, len(KINDS)).astype(np.float64) for column in columns))


def mean_work(observation: Observation) -> Work:
    """Work of the mean step: the mix of an observation's steps, weighted by their shares."""
    model, device, topology = observation.model, observation.device, observation.topology
    parts = [(share, step_work(model, device, topology, batch)) for share, batch in observation.step_mix]
    return Work(
        *(
            sum((share * part[field] for share, part in parts), np.zeros(len(KINDS)))
            for field in range(len(Work._fields))
        )
    )


def launches(observation: Observation) -> tuple[float, float]:
    """(kernels, collectives) executed in a step of one engine."""
    kernels = _layout(observation.model, observation.topology).graph.kernels
    collectives = sum(kernel.repeat for kernel in kernels if kernel.kind is KernelKind.COLLECTIVE)
    return float(sum(kernel.repeat for kernel in kernels)), float(collectives)


def mean_tokens(observation: Observation) -> tuple[float, float]:
    """(prefill tokens, decode tokens) of the mean step of one engine."""
    mix = observation.step_mix
    return sum(s * b.prefill.tokens for s, b in mix), sum(s * b.decode.tokens for s, b in mix)


FEATURE_NAMES = (
    "log_roofline_seconds",
    "log_decode_roofline_seconds",
    "log_prefill_roofline_seconds",
    "log_compute_seconds",
    "log_memory_seconds",
    "log_prefill_tokens",
    "log_decode_tokens",
    "log_context_tokens",
    "log_kernels",
    "log_devices",
    "log_memory_bandwidth",
    "log_power_limit",
    "log_bytes_per_weight",
    "share_of_steps_with_prefill",
    "memory_bound_ratio",
    "experts_used_ratio",
    "expert_parallel",
    "data_parallel",
    "block_quantised",
    "eight_bit_products",
    "multimodal",
    "era",
)


def physics_features(observation: Observation) -> FloatArray:
    """Inputs of the tree baselines, shape (len(FEATURE_NAMES),): logarithms of seconds, tokens and peaks, and flags.

    Sizes of the model and work by kernel kind are left out: among a dozen architectures trees tell each one by
    them, and are then worse on one they have not seen.
    """
    o, work = observation, mean_work(observation)
    decode = o.decode_batch.decode
    logs = (
        work.roofline.sum(),
        step_work(o.model, o.device, o.topology, o.decode_batch).roofline.sum(),
        step_work(o.model, o.device, o.topology, o.prefill_batch).roofline.sum(),
        work.compute.sum(),
        work.memory.sum(),
        *mean_tokens(o),
        decode.kv_tokens / max(1.0, decode.sequences),
        launches(o)[0],
        o.devices,
        o.device.memory_bandwidth_bytes_per_second,
        o.device.power_limit_watts,
        o.model.weight_bytes,
    )
    flags = (
        sum(share for share, batch in o.step_mix if batch.prefill.tokens),
        work.memory.sum() / (work.memory.sum() + work.compute.sum()),
        o.model.experts_per_token / o.model.experts if o.model.moe_layers else 1.0,
        o.topology.expert_parallel,
        o.topology.data_parallel,
        o.block_quantised,
        o.model.compute_dtype == "fp8",
        o.multimodal,
        ERAS.index(o.era),
    )
    return np.concatenate([np.log(np.maximum(_FLOOR, logs)), np.array(flags, dtype=np.float64)])
