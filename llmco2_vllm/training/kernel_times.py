"""Measured times of single kernels, as labels of the nodes of kernel graphs.

Vidur's profiles (``profiles.py``) time one kernel of one layer on one rank, eager, FP16. A few points along the
token axis of every (device, model, ranks) teach the network what a linear layer, a norm or an all-reduce reaches;
no more, because neighbouring points repeat each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.features import GraphFeatures
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.observation import Architecture
from llmco2_vllm.training.profiles import Records, read_kernels, read_network

FloatArray = NDArray[np.float64]
# Kernels of the profiles by those of the graph. Left out: rope (the graph's node also writes the cache), embedding
# and add (fused or hidden in today's engines).
KERNELS = {
    "attn_pre_proj": "qkv_projection",
    "attn_post_proj": "output_projection",
    "mlp_up_proj": "gate_up_projection",
    "mlp_act": "activation",
    "mlp_down_proj": "down_projection",
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_norm",
}
ALL_REDUCE = "attention_all_reduce"
# Devices of the profiles by the catalog. The A40 is not in it.
DEVICES = {"a100": "a100-80", "h100": "h100-sxm"}
CLUSTERS = {"a100_dgx": "a100-80", "h100_dgx": "h100-sxm"}
# Tokens whose times are used, or the nearest profiled ones.
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
_FP16_BYTES = 2


class Shape(NamedTuple):
    """Sizes of a layer that decide its kernels, whatever the number of layers."""

    hidden: int
    heads: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, architecture: Architecture) -> Shape:
        """The shape of an architecture's layers."""
        return cls(architecture.hidden, architecture.heads, architecture.kv_heads, architecture.width)


@dataclass(frozen=True, eq=False)
class KernelTimes:
    """Times of a step's kernels, one execution each. seconds: by kernel name."""

    shape: Shape
    features: GraphFeatures
    batch: BatchShape
    seconds: dict[str, float]

    @property
    def device(self) -> str:
        """Name of the device in the catalog."""
        return self.features.device.name


def read_kernel_times(kernels: Path, network: Path | None = None) -> list[KernelTimes]:
    """Labels from ``vidur_kernels.csv.gz`` and ``vidur_network.csv.gz``. Raises OSError, ValueError."""
    collectives = {} if network is None else _all_reduces(read_network(network))
    return list(_points(read_kernels(kernels), collectives))


def _points(records: Records, collectives: dict[tuple[str, int], FloatArray]) -> Iterator[KernelTimes]:
    records = records[np.isin(records["device"], list(DEVICES))]
    deployments = records[["device", "model", "tensor_parallel"]]
    for deployment in np.unique(deployments):
        rows = records[deployments == deployment]
        features = _features(rows[0])
        reduce = collectives.get((features.device.name, features.topology.tensor_parallel))
        for tokens in sorted({_nearest(rows["tokens"], wanted) for wanted in TOKENS}):
            seconds = _medians(rows[rows["tokens"] == tokens])
            if reduce is not None:
                size = tokens * features.model.hidden * _FP16_BYTES
                seconds[ALL_REDUCE] = float(np.exp(np.interp(np.log(size), *reduce)))
            pairs = tokens * (tokens + 1) // 2
            batch = BatchShape(PhaseShape(1, tokens, pairs, tokens, 1))
            yield KernelTimes(_shape(rows[0]), features, batch, seconds)


def _medians(rows: Records) -> dict[str, float]:
    return {
        ours: float(np.median(rows["duration_seconds"][rows["kernel"] == theirs]))
        for theirs, ours in KERNELS.items()
        if (rows["kernel"] == theirs).any()
    }


def _shape(row: np.void) -> Shape:
    return Shape(int(row["hidden"]), int(row["heads"]), int(row["kv_heads"]), int(row["intermediate"]))


def _features(row: np.void) -> GraphFeatures:
    hidden, heads, kv_heads, width = _shape(row)
    model = ModelSpec(
        layers=1,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=width,
        vocab=int(row["vocab"]),
        gated_mlp=bool(row["gated_mlp"]),
        activation_dtype="fp16",
        compute_dtype="fp16",
    )
    device = device_by_name(DEVICES[str(row["device"])])
    return GraphFeatures.of(model, device, Topology(int(row["tensor_parallel"])))


def _all_reduces(records: Records) -> dict[tuple[str, int], FloatArray]:
    """By (device, ranks): logs of sizes and of median seconds, shape (2, sizes), sizes ascending."""
    found = {}
    for cluster, device in CLUSTERS.items():
        for ranks in (2, 4, 8):
            chosen = (records["cluster"] == cluster) & (records["collective"] == "all_reduce")
            rows = records[chosen & (records["ranks"] == ranks)]
            if len(rows):
                sizes = np.unique(rows["size_bytes"])
                medians = [np.median(rows["duration_seconds"][rows["size_bytes"] == size]) for size in sizes]
                found[device, ranks] = np.log(np.array([sizes.astype(np.float64), medians], dtype=np.float64))
    return found


def _nearest(values: NDArray[np.int64], wanted: int) -> int:
    return int(values[np.argmin(np.abs(np.log(values / wanted)))])


def without(times: Sequence[KernelTimes], shapes: set[Shape], devices: set[str]) -> list[bool]:
    """Which labels tell nothing of layers of these ``shapes`` nor of these ``devices``."""
    return [item.shape not in shapes and item.device not in devices for item in times]
