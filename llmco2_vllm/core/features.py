"""From a kernel graph to arrays: what the network sees of a step. The same code serves and trains.

Per kernel: the least time by each ceiling (memory and network Roofline, LLMCO2, arXiv:2410.02950), its kind,
precision and shape, the device, and what part of its work is prefill. Work is linear in the graph's drivers, so
a step costs one small matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.kernels import DRIVERS, Kernel, KernelGraph, KernelKind, Payer, build_graph, ceiling_seconds
from llmco2_vllm.core.model import ModelSpec

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FEATURES_VERSION = "2"


class NodeKind(IntEnum):
    """Kernels of a kind start from the same efficiency. Attention is apart by phase, the LM head from its layers."""

    LINEAR = 0
    EXPERT = 1
    DECODE_ATTENTION = 2
    PREFILL_ATTENTION = 3
    ELEMENTWISE = 4
    COLLECTIVE = 5
    LM_HEAD = 6
    STATE_SPACE = 7


class NodePrecision(IntEnum):
    """How a kernel's weights are stored. BLOCK: 8 bits with a scale per block of weights; FOUR_BIT: any of them."""

    PLAIN = 0
    EIGHT_BIT = 1
    BLOCK = 2
    FOUR_BIT = 3


# Columns of the static and of the dynamic part of a node's features.
STATIC_FEATURES = (
    *(f"kind_{kind.name.lower()}" for kind in NodeKind),
    *(f"precision_{precision.name.lower()}" for precision in NodePrecision),
    "rows",
    "columns",
    "local_experts",
    "ranks",
    "peak_flops",
    "bandwidth",
    "power_limit",
)
DYNAMIC_FEATURES = ("compute_time", "memory_time", "network_time", "prefill_share", "imbalance")
# Under a hundredth of a microsecond nothing is told apart.
_FLOOR_SECONDS = 1e-8
# From ``StepFeatures.inputs`` to features of order one: 10 us is the middle of the scale of times.
INPUT_SCALE = np.array([0.4, 0.4, 0.4, 1.0, 1.0])
INPUT_SHIFT = np.array([4.6, 4.6, 4.6, 0.0, 0.0])
# Chosen on ML.ENERGY v3 (docs/adr/0007): 1, 0.7 and 0.45 left 16.7, 15.9 and 15.3 % error on unseen architectures.
ROUTING_EVENNESS = 0.5
_EXPERTS = DRIVERS.index("experts")


class StepFeatures(NamedTuple):
    """One step. seconds: least time of ONE execution by compute, memory, network ceiling, shape (3, kernels).

    inputs: what varies of the node features, before ``INPUT_SCALE`` and ``INPUT_SHIFT``, in the order of
    ``DYNAMIC_FEATURES``: logs of the seconds, part of a kernel's work that is prefill, imbalance of kernels over
    experts; shape (5, kernels). imbalance: how much longer than the mean the fullest expert rank works, relative.
    present: 1 for kernels with work, else 0, shape (kernels,).
    """

    seconds: FloatArray
    inputs: FloatArray
    imbalance: float
    present: FloatArray


@dataclass(frozen=True, eq=False)
class GraphFeatures:
    """Everything of a deployment that does not change from step to step."""

    graph: KernelGraph
    device: DeviceSpec
    topology: Topology
    model: ModelSpec
    era: str = ""

    @classmethod
    def of(cls, model: ModelSpec, device: DeviceSpec, topology: Topology, era: str = "") -> GraphFeatures:
        """Features of the kernel graph of ``model``. era: the year of an engine older than today's."""
        return cls(build_graph(model, topology), device, topology, model, era)

    @property
    def host(self) -> str:
        """Name of the row of a bundle's device table: the device, and the era of an older engine."""
        return f"{self.device.name}@{self.era}" if self.era else self.device.name

    @cached_property
    def repeats(self) -> FloatArray:
        """Executions per step, shape (kernels,)."""
        return np.array([float(kernel.repeat) for kernel in self.graph.kernels])

    @cached_property
    def kinds(self) -> IntArray:
        """NodeKind of each kernel, shape (kernels,)."""
        return np.array([node_kind(kernel) for kernel in self.graph.kernels])

    @cached_property
    def precisions(self) -> IntArray:
        """NodePrecision of each kernel, shape (kernels,)."""
        return np.array([node_precision(kernel, self.model) for kernel in self.graph.kernels])

    @cached_property
    def payers(self) -> IntArray:
        """Position in ``Payer`` of who pays for each kernel, shape (kernels,)."""
        order = list(Payer)
        return np.array([order.index(kernel.payer) for kernel in self.graph.kernels])

    @cached_property
    def local_experts(self) -> FloatArray:
        """Experts on one rank for kernels over experts, else 0, shape (kernels,)."""
        local = self.graph.experts / self._expert_ranks
        return np.where(self.kinds == NodeKind.EXPERT, local, 0.0)

    @cached_property
    def edges(self) -> IntArray:
        """Data flow as (producer, consumer) positions, shape (2, edges)."""
        place = {kernel.name: index for index, kernel in enumerate(self.graph.kernels)}
        pairs = [(place[source], place[target]) for source, target in self.graph.edges]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2).T

    @cached_property
    def neighbours(self) -> FloatArray:
        """Mean over producers and mean over consumers as matrices, shape (2, kernels, kernels)."""
        count = len(self.graph.kernels)
        flow = np.zeros((2, count, count))
        sources, targets = self.edges
        flow[0, targets, sources] = flow[1, sources, targets] = 1.0
        degrees: FloatArray = np.maximum(flow.sum(axis=2, keepdims=True), 1.0)
        return flow / degrees

    @cached_property
    def static(self) -> FloatArray:
        """Constant part of the node features, shape (kernels, len(STATIC_FEATURES)); each of order one."""
        rows = []
        for kernel, kind, precision, experts in zip(
            self.graph.kernels, self.kinds, self.precisions, self.local_experts, strict=True
        ):
            row = [0.0] * (len(NodeKind) + len(NodePrecision))
            row[kind] = row[len(NodeKind) + precision] = 1.0
            row += [_width(kernel.rows), _width(kernel.columns), math.log2(1.0 + experts) / 4.0]
            row += [math.log2(self.topology.engine_devices) / 3.0, *_device_features(self.device, kernel)]
            rows.append(row)
        return np.array(rows)

    @cached_property
    def work(self) -> FloatArray:
        """Seconds of one execution at each ceiling, by driver, shape (3 x kernels, drivers)."""
        return np.vstack(ceiling_seconds(self.graph, self.device)) / np.tile(self.repeats, 3)[:, None]

    @property
    def _expert_ranks(self) -> int:
        """Ranks over which whole experts are spread; 1 where every rank has a slice of each."""
        return self.topology.expert_ranks if self.topology.expert_parallel else 1

    @cached_property
    def _step_rows(self) -> FloatArray:
        """Seconds, what their logs are taken of, prefill share and imbalance as one linear map, so that a step is one
        product; shape (8 x kernels, drivers + 4). Further columns: 1, prefill share of tokens and samples, imbalance.
        """
        count, drivers = self.work.shape[0] // 3, self.work.shape[1]
        rows = np.zeros((8, count, drivers + 4))
        rows[:3, :, :drivers] = rows[3:6, :, :drivers] = self.work.reshape(3, count, drivers)
        rows[3:6, :, drivers] = _FLOOR_SECONDS
        order = list(Payer)
        for payer, column in (
            (Payer.TOKENS, drivers + 1),
            (Payer.PREFILL_PAIRS, DRIVERS.index("prefill_step")),
            (Payer.SAMPLES, drivers + 2),
        ):
            rows[6, :, column] = self.payers == order.index(payer)
        rows[7, :, drivers + 3] = self.is_expert
        return rows.reshape(8 * count, drivers + 4)

    def step(self, batch: BatchShape) -> StepFeatures:
        """Features of the step that computes ``batch`` (of one data-parallel rank)."""
        drivers = self.graph.drivers(batch)
        imbalance = 0.0
        if active := drivers[_EXPERTS]:
            active = drivers[_EXPERTS] = popular(active, self.graph.experts)
            imbalance = self._expert_imbalance(active)
        prefill, decode, _ = batch
        prefill_tokens, decode_tokens = prefill[1], decode[1]
        samples = prefill[4] + decode[4]
        token_share = prefill_tokens / (prefill_tokens + decode_tokens) if prefill_tokens else 0.0
        drivers += [1.0, token_share, prefill[4] / (samples or 1.0) if prefill_tokens else 0.0, imbalance]
        # ``dot`` rather than ``@``: half the time at these sizes.
        rows = self._step_rows.dot(np.array(drivers, dtype=np.float64)).reshape(8, -1)
        inputs = rows[3:]
        logs = inputs[:3]
        np.log(logs, logs)
        present = self._present(prefill_tokens > 0, decode_tokens > 0, samples > 0)
        return StepFeatures(rows[:3], inputs, imbalance, present)

    def _present(self, prefill: bool, decode: bool, sampled: bool) -> FloatArray:
        """1 for kernels that have work in such a step, else 0, shape (kernels,)."""
        key = (prefill, decode, sampled)
        if key not in self._masks:
            on = PhaseShape(1, 1, 1, 1, 1)
            on = on._replace(samples=int(sampled))
            batch = BatchShape(on if prefill else PhaseShape(), on if decode else PhaseShape())
            drivers = self.graph.drivers(batch)
            self._masks[key] = (self.work @ np.array(drivers)).reshape(3, -1).any(axis=0) * 1.0
        return self._masks[key]

    @cached_property
    def _masks(self) -> dict[tuple[bool, bool, bool], FloatArray]:
        return {}

    def dynamic(self, step: StepFeatures) -> FloatArray:
        """Varying part of the node features, shape (kernels, len(DYNAMIC_FEATURES))."""
        columns: FloatArray = step.inputs.T * INPUT_SCALE + INPUT_SHIFT
        return columns

    @cached_property
    def is_expert(self) -> FloatArray:
        """1 for kernels over routed experts, else 0, shape (kernels,)."""
        return np.where(self.kinds == NodeKind.EXPERT, 1.0, 0.0)

    def _expert_imbalance(self, active: float) -> float:
        """Expected excess of the fullest of n ranks over the mean: sqrt(2 ln n) standard deviations, relative.

        ``active`` experts of a layer get a token; on one rank they are binomial. The maximum of n normal variables
        exceeds their mean by at most sqrt(2 ln n) standard deviations (e.g. Boucheron et al., Concentration
        Inequalities, section 2.5).
        """
        ranks = self._expert_ranks
        if not active or ranks == 1:
            return 0.0
        mean = active / ranks
        idle_share = max(0.0, 1.0 - active / self.graph.experts)
        return math.sqrt(2.0 * math.log(ranks) * mean * idle_share) / mean


def popular(active: float, experts: int) -> float:
    """Distinct experts expected when routing is skewed, from those expected of uniform routing.

    Popular experts share tokens, so T tokens reach as many distinct ones as ``ROUTING_EVENNESS`` x T would evenly:
    E (1 - (1 - k/E)^(s T)) = E (1 - (1 - active/E)^s).
    """
    return experts * (1.0 - (1.0 - active / experts) ** ROUTING_EVENNESS) if experts else 0.0


def node_kind(kernel: Kernel) -> NodeKind:
    """Kind of a kernel as the network tells them apart."""
    if kernel.name == "lm_head":
        return NodeKind.LM_HEAD
    if kernel.kind is KernelKind.ATTENTION:
        return NodeKind.PREFILL_ATTENTION if kernel.name.startswith("prefill") else NodeKind.DECODE_ATTENTION
    return {
        KernelKind.LINEAR: NodeKind.LINEAR,
        KernelKind.EXPERT: NodeKind.EXPERT,
        KernelKind.ELEMENTWISE: NodeKind.ELEMENTWISE,
        KernelKind.COLLECTIVE: NodeKind.COLLECTIVE,
        KernelKind.STATE_SPACE: NodeKind.STATE_SPACE,
    }[kernel.kind]


def node_precision(kernel: Kernel, model: ModelSpec) -> NodePrecision:
    """Precision of a kernel's weights, from their bytes and the dtype of its products."""
    if kernel.name == "lm_head" or kernel.kind not in (KernelKind.LINEAR, KernelKind.EXPERT):
        return NodePrecision.PLAIN
    stored = model.weight_bytes
    if kernel.kind is KernelKind.LINEAR:
        stored = sum(kernel.weight_bytes.values()) / (kernel.rows * kernel.columns)
    if kernel.dtype == "fp4" or stored < 0.75:
        return NodePrecision.FOUR_BIT
    if kernel.dtype in ("fp8", "int8"):
        return NodePrecision.BLOCK if model.block_quantised else NodePrecision.EIGHT_BIT
    return NodePrecision.PLAIN


def _width(value: float) -> float:
    return math.log2(1.0 + value) / 8.0


def _device_features(device: DeviceSpec, kernel: Kernel) -> tuple[float, float, float]:
    """Peak of the kernel's dtype, bandwidth, power limit, in doublings of an H100's (989 TFLOP/s, 3.35 TB/s, 700 W)."""
    return (
        math.log2(device.peak_flops(kernel.dtype) / 989e12),
        math.log2(device.memory_bandwidth_bytes_per_second / 3.35e12),
        math.log2(device.power_limit_watts / 700.0),
    )
