"""The network's forward pass in numpy, on one fixed graph; the hot path of the learned predictor.

Per kernel k of a step, with its least times c, m, n by ceiling (s) and imbalance i:

    t_k = f_k ((c (1 + a i) / e_c)^4 + (m (1 + a i) / e_m)^4 + (n / e_n)^4)^(1/4) + g_k l + x E_local
    f_k = 3^tanh(o_k1), g_k = 3^tanh(o_k2)

Efficiencies e and latency l are those of the kernel's kind and precision; o_k comes from two rounds of message
passing over the data flow and a readout for prefill and one for decode, mixed by the kernel's prefill share. So a
kernel's time is a bounded correction of its Roofline time (ARCHITECTURE decision 1). ``training/network.py`` is the
same function in torch; tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.features import GraphFeatures, StepFeatures
from llmco2_vllm.predictor.offsets import Offsets

FloatArray = NDArray[np.float64]

BOUND = math.log(3.0)
DEFAULT_DEVICE = "default"
# Smooth maximum of the ceilings, and of device and host time: a power mean of this order.
ORDER = 4.0
_TINY_SECONDS = 1e-12
_TINY_SHARE = 1e-4

Parameters = Mapping[str, FloatArray]


class StepTime(NamedTuple):
    """One step. kernels: seconds of each kernel, repeats included, shape (kernels,). total: the step, seconds.

    power: share of the span from idle to the power limit that each device draws, on average.
    """

    kernels: FloatArray
    total: float
    power: float


@dataclass(frozen=True)
class HostTime:
    """Host time of a step, s: fixed + per_request x requests^growth + per_prefill x prompts.

    overlap: share of it that does not hide behind the device.
    """

    fixed: float
    per_request: float
    growth: float
    per_prefill: float
    overlap: float


@dataclass(frozen=True)
class PowerHead:
    """Logit-linear power share: constant, compute, its root, memory, gaps; the kernels' own terms come on top."""

    constant: float
    compute: float
    root: float
    memory: float
    gap: float


class Network:
    """A trained network bound to the graph of one deployment; everything constant is computed once."""

    def __init__(
        self, parameters: Parameters, devices: tuple[str, ...], features: GraphFeatures, offsets: Offsets | None = None
    ) -> None:
        p = parameters
        self.offset = None
        if offsets is not None:
            self.offset = offsets.bound(features.model, features.device.name, features.topology)
        self.features = features
        self.known_device = features.host in devices
        row = devices.index(features.host if self.known_device else DEFAULT_DEVICE)
        kinds, precisions = features.kinds, features.precisions
        split, hidden = features.static.shape[1], p["input"].shape[1]
        # All arrays of a step have kernels along their last axis.
        self._static = np.ascontiguousarray((features.static @ p["input"][:split] + p["input_bias"]).T)
        self._from_logs = np.ascontiguousarray(p["input"][split : split + 3].T)
        self._from_share = p["input"][split + 3][:, None]
        self._from_imbalance = p["input"][split + 4][:, None] * features.is_expert
        self._rounds = [self._round(p[name], p[f"{name}_bias"], hidden) for name in ("first", "second")]
        self._producers, self._consumers = (np.ascontiguousarray(side.T) for side in features.neighbours)
        self._decode = np.ascontiguousarray(p["decode_readout"].T)
        self._prefill_more = np.ascontiguousarray((p["prefill_readout"] - p["decode_readout"]).T)
        compute, memory = (np.exp(-p[name][kinds, precisions]) for name in ("log_compute", "log_memory"))
        self._rates = np.stack([compute, memory, np.full(len(kinds), np.exp(-p["log_link"]))])
        self._fullest = float(np.exp(p["log_imbalance"])) * features.is_expert * np.array([[1.0], [1.0], [0.0]])
        self._latency = np.exp(p["log_latency"][kinds, precisions])
        self._experts = features.local_experts * np.exp(p["log_expert_latency"][precisions])
        self._draw = p["draw"][kinds, precisions]
        self._repeats = features.repeats
        self.host = _host(p, row, features)
        self.power = PowerHead(*(float(v) for v in p["power"][row]))

    def step(self, batch: BatchShape, extra_host_seconds: float = 0.0) -> StepTime:
        """Time and power of a step; zero for a batch without tokens."""
        if batch.tokens <= 0:
            return StepTime(np.zeros(len(self._repeats)), 0.0, 0.0)
        found = self.features.step(batch)
        outputs = self._outputs(found, batch.prefill.tokens > 0)
        kernels = self._kernel_seconds(found, outputs) * self._repeats
        device = float(kernels.sum())
        total = self._total(device, batch, extra_host_seconds)
        return StepTime(kernels, total, self._power(found, outputs, (kernels, device, total)))

    @staticmethod
    def _round(weights: FloatArray, bias: FloatArray, hidden: int) -> tuple[FloatArray, FloatArray]:
        """One product for a node's own state and what its producers and consumers take of it."""
        parts = weights.reshape(3, hidden, hidden).transpose(0, 2, 1).reshape(3 * hidden, hidden)
        return np.ascontiguousarray(parts), bias[:, None]

    def _outputs(self, found: StepFeatures, prefill: bool) -> FloatArray:
        """Readouts, shape (3, kernels): log corrections of time and latency before bounding, and of the draw."""
        hidden = self._static + self._from_logs @ found.logs
        if prefill:
            hidden += self._from_share * found.share
        if found.imbalance:
            hidden += self._from_imbalance * found.imbalance
        np.maximum(hidden, 0.0, out=hidden)
        width = len(hidden)
        for weights, bias in self._rounds:
            parts = weights @ hidden
            hidden = parts[:width] + bias
            hidden += parts[width : 2 * width] @ self._producers
            hidden += parts[2 * width :] @ self._consumers
            np.maximum(hidden, 0.0, out=hidden)
        outputs: FloatArray = self._decode @ hidden
        if prefill:
            outputs += found.share * (self._prefill_more @ hidden)
        return outputs

    def _kernel_seconds(self, found: StepFeatures, outputs: FloatArray) -> FloatArray:
        ceilings = found.seconds * self._rates
        if found.imbalance:
            ceilings *= 1.0 + self._fullest * found.imbalance
        ceilings += _TINY_SECONDS
        ceilings *= ceilings
        ceilings *= ceilings
        roofline = np.sqrt(np.sqrt(ceilings[0] + ceilings[1] + ceilings[2]))
        factors = np.tanh(outputs[:2])
        factors *= BOUND
        factors = np.exp(factors, out=factors)
        seconds: FloatArray = roofline * factors[0]
        seconds += self._latency * factors[1]
        seconds += self._experts
        seconds *= found.present
        return seconds

    def _total(self, device: float, batch: BatchShape, extra_host_seconds: float) -> float:
        host = self.host
        requests = batch.prefill.sequences + batch.decode.sequences
        work = host.fixed + host.per_request * requests**host.growth + extra_host_seconds
        hidden = (device**ORDER + work**ORDER) ** (1.0 / ORDER)
        together = hidden + host.overlap * (device + work - hidden)
        return float(together + host.per_prefill * batch.prefill.sequences)

    def _power(self, found: StepFeatures, outputs: FloatArray, times: tuple[FloatArray, float, float]) -> float:
        kernels, device, total = times
        compute, memory, _ = (found.seconds @ self._repeats).tolist()
        compute, memory = compute / total, memory / total
        gap = max(0.0, 1.0 - device / total)
        head = self.power
        own = float(kernels @ (self._draw + outputs[2])) / total
        level = head.constant + head.compute * compute + head.root * math.sqrt(compute + _TINY_SHARE)
        level += head.memory * memory + head.gap * gap + own
        return float(1.0 / (1.0 + math.exp(-4.0 * (level - 0.5))))


def _host(p: Parameters, row: int, features: GraphFeatures) -> HostTime:
    per_prefill = float(np.exp(p["log_per_prefill"]))
    if features.topology.data_parallel > 1:
        per_prefill *= float(np.exp(p["log_prefill_stall"]))
    return HostTime(
        fixed=float(np.exp(p["log_host"][row])),
        per_request=float(np.exp(p["log_per_request"][row])),
        growth=float(p["growth"]),
        per_prefill=per_prefill,
        overlap=float(1.0 / (1.0 + np.exp(-p["overlap"]))),
    )
