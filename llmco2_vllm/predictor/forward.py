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
from llmco2_vllm.core.features import INPUT_SCALE, INPUT_SHIFT, GraphFeatures, StepFeatures
from llmco2_vllm.core.kernels import Payer
from llmco2_vllm.predictor.offsets import Offsets

FloatArray = NDArray[np.float64]

BOUND = math.log(3.0)
DEFAULT_DEVICE = "default"
# Smooth maximum of the ceilings, and of device and host time: a power mean of this order.
ORDER = 4.0
_TINY_SECONDS = 1e-12
_TINY_SHARE = 1e-4
_ONES = np.ones(3)

Parameters = Mapping[str, FloatArray]


class StepTime(NamedTuple):
    """One step. kernels: seconds of each kernel, repeats included, shape (kernels,). total: the step, seconds.

    power: share of the span from idle to the power limit that each device draws, on average.
    by_payer: seconds of the kernels by who pays for them, in the order of ``Payer``.
    """

    kernels: FloatArray
    total: float
    power: float
    by_payer: list[float]


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


class Layer(NamedTuple):
    """max(x + c, 0) = max(x, -c) + c: a layer only compares, and what is left of c is in the constants behind it.

    weights: of what comes in. floor: -c, shape (hidden, kernels).
    """

    weights: FloatArray
    floor: FloatArray


class Network:
    """A trained network bound to the graph of one deployment; everything constant is computed once.

    At 16 kernels a step takes as long as its calls of numpy are many. So constants have the full shape (a broadcast or
    a scalar doubles the time of a call), sums over rows are products with ones, and ``dot`` stands for ``@``.
    """

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
        # All arrays of a step have kernels along their last axis.
        self._repeats, shape = features.repeats, (3, len(features.repeats))
        # A node's own state, its producers' and its consumers', shape (3 x kernels, kernels).
        self._mixing = np.vstack([np.eye(shape[1]), *(side.T for side in features.neighbours)])
        self._input, state = _input_layer(p, features)
        self._rounds = []
        for name in ("first", "second"):
            layer, state = self._round(p[name], p[f"{name}_bias"], state)
            self._rounds.append(layer)
        self._decode, self._decode_rest = _readout(p["decode_readout"], state)
        self._decode_rest[2] += p["draw"][kinds, precisions]
        self._more, self._more_rest = _readout(p["prefill_readout"] - p["decode_readout"], state)
        compute, memory = (np.exp(-p[name][kinds, precisions]) for name in ("log_compute", "log_memory"))
        # Of all repeats of a kernel, as everything below in seconds.
        self._rates = np.stack([compute, memory, np.full(len(kinds), np.exp(-p["log_link"]))]) * self._repeats
        self._tiny = np.full(shape, _TINY_SECONDS) * self._repeats
        self._latency = np.exp(p["log_latency"][kinds, precisions]) * self._repeats
        self._experts = features.local_experts * np.exp(p["log_expert_latency"][precisions]) * self._repeats
        self._fullest = float(np.exp(p["log_imbalance"])) * features.is_expert * np.array([[1.0], [1.0], [0.0]])
        self._bound = np.full((2, shape[1]), BOUND)
        self._payers = np.zeros((len(Payer), shape[1]))
        self._payers[features.payers, np.arange(shape[1])] = 1.0
        self.host = _host(p, row, features)
        self.power = PowerHead(*(float(v) for v in p["power"][row]))

    def step(self, batch: BatchShape, extra_host_seconds: float = 0.0) -> StepTime:
        """Time and power of a step; zero for a batch without tokens."""
        if batch.tokens <= 0:
            return StepTime(np.zeros(len(self._repeats)), 0.0, 0.0, [0.0] * len(Payer))
        found = self.features.step(batch)
        outputs = self._outputs(found, batch.prefill.tokens > 0)
        kernels = self._kernel_seconds(found, outputs)
        by_payer = self._payers.dot(kernels).tolist()
        device = sum(by_payer)
        total = self._total(device, batch, extra_host_seconds)
        return StepTime(kernels, total, self._power(found, outputs, (kernels, device, total)), by_payer)

    def _round(self, weights: FloatArray, bias: FloatArray, state: FloatArray) -> tuple[Layer, FloatArray]:
        """A round of message passing, and the constant part of its state behind it.

        Rows of the weights: for each output what it takes of a node, its producers and its consumers, one after the
        other, so that the product is, in another shape, the left side of that with ``_mixing``.
        """
        hidden = len(state)
        parts = np.ascontiguousarray(weights.reshape(3, hidden, hidden).transpose(2, 0, 1).reshape(3 * hidden, hidden))
        constant = self._mixed(parts, state) + bias[:, None]
        return Layer(parts, -constant), constant

    def _mixed(self, parts: FloatArray, hidden: FloatArray) -> FloatArray:
        mixed: FloatArray = parts.dot(hidden).reshape(len(hidden), -1).dot(self._mixing)
        return mixed

    def _outputs(self, found: StepFeatures, prefill: bool) -> FloatArray:
        """Readouts, shape (3, kernels): log corrections of time and latency before bounding, and the draw."""
        weights, floor = self._input
        hidden = np.maximum(weights.dot(found.inputs), floor)
        for weights, floor in self._rounds:
            hidden = np.maximum(self._mixed(weights, hidden), floor)
        outputs: FloatArray = self._decode.dot(hidden)
        outputs += self._decode_rest
        if prefill:
            more = self._more.dot(hidden)
            more += self._more_rest
            more *= found.inputs[3]
            outputs += more
        return outputs

    def _kernel_seconds(self, found: StepFeatures, outputs: FloatArray) -> FloatArray:
        ceilings = found.seconds * self._rates
        if found.imbalance:
            ceilings *= 1.0 + self._fullest * found.imbalance
        ceilings += self._tiny
        ceilings *= ceilings
        ceilings *= ceilings
        seconds: FloatArray = np.sqrt(np.sqrt(_ONES.dot(ceilings)))
        factors = np.tanh(outputs[:2])
        factors *= self._bound
        time, latency = np.exp(factors, factors)
        seconds *= time
        seconds += self._latency * latency
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
        compute, memory, _ = found.seconds.dot(self._repeats).tolist()
        compute, memory = compute / total, memory / total
        gap = max(0.0, 1.0 - device / total)
        head = self.power
        own = float(kernels.dot(outputs[2])) / total
        level = head.constant + head.compute * compute + head.root * math.sqrt(compute + _TINY_SHARE)
        level += head.memory * memory + head.gap * gap + own
        return float(1.0 / (1.0 + math.exp(-4.0 * (level - 0.5))))


def _input_layer(p: Parameters, features: GraphFeatures) -> tuple[Layer, FloatArray]:
    """The layer of a node's own features, and the constant part of the state behind it."""
    split = features.static.shape[1]
    weights = p["input"][split:].T
    constant = (features.static @ p["input"][:split] + p["input_bias"]).T + (weights @ INPUT_SHIFT)[:, None]
    return Layer(np.ascontiguousarray(weights * INPUT_SCALE), -constant), constant


def _readout(weights: FloatArray, state: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weights of a readout, and what it makes of the constant part of the state, shape (3, kernels)."""
    rows = np.ascontiguousarray(weights.T)
    return rows, rows @ state


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
