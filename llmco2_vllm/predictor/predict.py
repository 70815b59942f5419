"""RooflinePredictor: prices a step from first principles and a dozen fitted numbers.

Time of a kernel is its Roofline time with achieved ceilings; the step adds host and launch overhead. Energy is
time x power: idle and a static share while the step runs, plus shares in proportion to the use of the compute
peak and of the memory bandwidth, never above the power limit.
Every term is linear in the batch or the largest of such terms, hence energy never falls when a batch grows and
two batches together never take more than apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import NO_RATES, Estimate, Rates
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.kernels import KernelGraph, KernelKind, Payer, build_graph, ceiling_seconds
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.calibration import Coefficients, KindCalibration, RooflineCalibration

FloatArray = NDArray[np.float64]
# Non-zero (driver index, coefficient) of a linear form.
Terms = tuple[tuple[int, float], ...]
_NOTHING = Estimate(0.0, 0.0, NO_RATES, NO_RATES, 0.0, 1.0, 1.0, True)


class RooflinePredictor:
    """Predictor of one engine: a model on ``topology.engine_devices`` devices of one kind.

    Under pipeline parallelism the stages work on different steps at a time: a step is charged its own use of
    every stage, and ``duration_seconds`` is its way through all of them.
    """

    def __init__(
        self, model: ModelSpec, device: DeviceSpec, topology: Topology, calibration: RooflineCalibration
    ) -> None:
        self._kind: KindCalibration = calibration.kinds[device.kind]
        self._name = f"{calibration.version}-{device.name}".replace(",", "-")
        self.graph: KernelGraph = build_graph(model, topology)
        self._in_distribution = device.name in self._kind.calibrated_devices and not model.generic
        coefficients = self._kind.coefficients
        span = device.power_limit_watts - device.idle_power_watts
        self._static_watts = device.idle_power_watts + coefficients.static_power_ratio * span
        self._headroom_watts = device.power_limit_watts - self._static_watts
        self._limit_watts = device.power_limit_watts
        self._ranks = float(topology.tensor_parallel)
        self._step_overhead, self._sequence_overhead = overhead_seconds(self.graph, coefficients)
        work = work_matrix(self.graph, device, coefficients)
        self._kernels = _kernel_terms(self.graph, work)
        self._own = _own_terms(self.graph, work)

    @property
    def name(self) -> str:
        """Method, version and device, for example ``roofline/1-h100-sxm``."""
        return self._name

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy of all devices of the engine and duration of ``batch``; see the Predictor protocol."""
        prefill, decode, _ = batch
        if prefill.tokens + decode.tokens <= 0:
            return _NOTHING
        x = self.graph.drivers(batch)
        # Python numbers: twenty kernels of a few terms. Warm, arrays are as quick; but the scheduler
        # has worked for milliseconds since the last call, and array code then starts cold.
        seconds = [0.0] * len(Payer)
        for payer, bounds in self._kernels:
            longest = 0.0
            for terms in bounds:
                time = 0.0
                for driver, value in terms:
                    time += value * x[driver]
                if time > longest:
                    longest = time
            seconds[payer] += longest
        own = [sum([value * x[driver] for driver, value in terms]) for terms in self._own]
        seconds[0] += self._step_overhead + self._sequence_overhead * (prefill.sequences + decode.sequences)
        duration, own_joules = sum(seconds), sum(own)
        scale = self._ranks
        # At the power limit the clock gives way: the same work takes longer, at the limit.
        if own_joules > self._headroom_watts * duration:
            stretched = own_joules / self._headroom_watts
            scale *= self._limit_watts * stretched / (self._static_watts * duration + own_joules)
            duration = stretched
        static = scale * self._static_watts
        # In the order of Payer: tokens, prefill pairs, decode pairs, samples.
        joules = (
            static * seconds[0] + scale * own[0],
            static * seconds[1] + scale * own[1],
            static * seconds[2] + scale * own[2],
            static * seconds[3] + scale * own[3],
        )
        return self._split(batch, joules, duration)

    def _split(self, batch: BatchShape, joules: tuple[float, float, float, float], duration: float) -> Estimate:
        """Joules by payer as rates of the phases; the phase totals are rebuilt from the rates, so they agree."""
        prefill, decode, encoder_tokens = batch
        _, prefill_tokens, prefill_pairs, _, prefill_samples = prefill
        _, decode_tokens, decode_pairs, _, decode_samples = decode
        tokens, samples = prefill_tokens + decode_tokens, prefill_samples + decode_samples
        per_token = joules[0] / tokens
        per_sample = joules[3] / samples if samples else 0.0
        prefill_joules = decode_joules = 0.0
        prefill_rates = decode_rates = NO_RATES
        if prefill_tokens:
            per_pair = joules[1] / prefill_pairs
            prefill_rates = Rates(per_token, per_pair, per_sample)
            prefill_joules = prefill_tokens * per_token + prefill_pairs * per_pair + prefill_samples * per_sample
        if decode_tokens:
            per_pair = joules[2] / decode_pairs
            decode_rates = Rates(per_token, per_pair, per_sample)
            decode_joules = decode_tokens * per_token + decode_pairs * per_pair + decode_samples * per_sample
        known = self._in_distribution and not encoder_tokens
        kind = self._kind
        low, high = (kind.decode if 2 * decode_tokens >= tokens else kind.prefill) if known else kind.unknown
        return Estimate(prefill_joules, decode_joules, prefill_rates, decode_rates, duration, low, high, known)


def efficiencies(kind: KernelKind, coefficients: Coefficients) -> tuple[float, float, float]:
    """Achieved shares of the (compute, memory, link) ceilings of kernels of a kind."""
    factor = {
        KernelKind.ATTENTION: coefficients.attention_efficiency,
        KernelKind.EXPERT: coefficients.expert_efficiency,
    }.get(kind, 1.0)
    compute, memory = coefficients.compute_efficiency * factor, coefficients.bandwidth_efficiency * factor
    return compute, memory, coefficients.link_efficiency


def overhead_seconds(graph: KernelGraph, coefficients: Coefficients) -> tuple[float, float]:
    """Host and launch time in seconds: of a step (its layers and collectives included), and of each request."""
    layers = max(kernel.repeat for kernel in graph.kernels)
    collectives = sum(kernel.repeat for kernel in graph.kernels if kernel.kind is KernelKind.COLLECTIVE)
    step = (
        coefficients.step_overhead_seconds
        + layers * coefficients.layer_overhead_seconds
        + collectives * coefficients.collective_overhead_seconds
    )
    return step, coefficients.sequence_overhead_seconds


def work_matrix(graph: KernelGraph, device: DeviceSpec, coefficients: Coefficients) -> FloatArray:
    """Seconds of each kernel by compute, memory and network ceiling, then its joules of use, by driver.

    Shape (4 x kernels, drivers); repeats are included, one tensor-parallel rank.
    """
    share = np.array([efficiencies(kernel.kind, coefficients) for kernel in graph.kernels])
    compute, memory, network = ceiling_seconds(graph, device)
    span = device.power_limit_watts - device.idle_power_watts
    joules = span * (coefficients.compute_power_ratio * compute + coefficients.memory_power_ratio * memory)
    seconds = [compute / share[:, :1], memory / share[:, 1:2], network / share[:, 2:3]]
    return np.vstack([*seconds, joules])


def _kernel_terms(graph: KernelGraph, work: FloatArray) -> list[tuple[int, tuple[Terms, ...]]]:
    """Per kernel the position of its payer and, per ceiling that binds at all, the terms of its time."""
    bounds = work.reshape(4, len(graph.kernels), -1)[:3]
    payers = list(Payer)
    return [
        (payers.index(kernel.payer), tuple(terms for bound in bounds if (terms := _terms(bound[row]))))
        for row, kernel in enumerate(graph.kernels)
    ]


def _own_terms(graph: KernelGraph, work: FloatArray) -> list[Terms]:
    """Per payer the terms of the joules its kernels draw by their use of the ceilings."""
    joules = work.reshape(4, len(graph.kernels), -1)[3]
    return [_terms(joules[[kernel.payer is payer for kernel in graph.kernels]].sum(axis=0)) for payer in Payer]


def _terms(row: FloatArray) -> Terms:
    return tuple((int(driver), float(row[driver])) for driver in np.flatnonzero(row))
