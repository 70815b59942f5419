"""GnnPredictor: prices a step with the trained network, behind the same protocol as the Roofline predictor."""

from __future__ import annotations

import math

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import NO_RATES, Estimate, Rates
from llmco2_vllm.core.features import GraphFeatures, NodePrecision
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.kernels import KernelGraph
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.forward import Network

_NOTHING = Estimate(0.0, 0.0, NO_RATES, NO_RATES, 0.0, 1.0, 1.0, True)


class GnnPredictor:
    """Predictor of one engine. Energy is step time x power of all its devices; a step's joules go to the kernels by
    their time, and the time no kernel explains (host, gaps) to the tokens, as streamed weights do."""

    def __init__(self, model: ModelSpec, device: DeviceSpec, topology: Topology, bundle: Bundle) -> None:
        features = GraphFeatures.of(model, device, topology)
        self._network = Network(bundle.arrays, bundle.devices, features, bundle.offsets)
        self._name = f"{bundle.version}-{device.name}".replace(",", "-")
        self._intervals = bundle.intervals
        self._known = self._network.known_device and not model.generic and regime_key(model) in bundle.seen
        self._idle = device.idle_power_watts
        self._span = device.power_limit_watts - device.idle_power_watts
        self._devices = float(topology.engine_devices)

    @property
    def name(self) -> str:
        """Method, version and device, for example ``gnn/1-h100-sxm``."""
        return self._name

    @property
    def graph(self) -> KernelGraph:
        """The kernels of a step."""
        return self._network.features.graph

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy of all devices of the engine and duration of ``batch``; see the Predictor protocol."""
        if batch.tokens <= 0:
            return _NOTHING
        step = self._network.step(batch)
        watts = self._devices * (self._idle + self._span * step.power)
        duration = step.total
        if (offset := self._network.offset) is not None:
            log_time, log_power = offset(batch.prefill.sequences + batch.decode.sequences)
            duration *= math.exp(log_time)
            watts *= math.exp(log_power)
        seconds = step.by_payer
        scale = watts * duration / max(step.total, sum(seconds))
        joules = [scale * value for value in seconds]
        joules[0] += watts * duration - sum(joules)
        return self._split(batch, joules, duration)

    def _split(self, batch: BatchShape, joules: list[float], duration: float) -> Estimate:
        prefill, decode, encoder_tokens = batch
        tokens, samples = prefill.tokens + decode.tokens, prefill.samples + decode.samples
        per_token, per_sample = joules[0] / tokens, joules[3] / samples if samples else 0.0
        if not samples:
            per_token += joules[3] / tokens
        prefill_rates = decode_rates = NO_RATES
        prefill_joules = decode_joules = 0.0
        if prefill.tokens:
            prefill_rates = Rates(per_token, joules[1] / prefill.pairs, per_sample)
            prefill_joules = prefill.tokens * per_token + joules[1] + prefill.samples * per_sample
        if decode.tokens:
            decode_rates = Rates(per_token, joules[2] / decode.pairs, per_sample)
            decode_joules = decode.tokens * per_token + joules[2] + decode.samples * per_sample
        known = self._known and not encoder_tokens
        regime = ("mixed" if prefill.tokens else "decode") if known else "unknown"
        low, high = self._intervals[regime]
        return Estimate(prefill_joules, decode_joules, prefill_rates, decode_rates, duration, low, high, known)


def regime_key(model: ModelSpec) -> str:
    """What kind of layers and weights a model has: the network knows only the kinds it was trained on."""
    mixer = "latent" if model.latent else "state-space" if model.state_space else "attention"
    block = "experts" if model.moe_layers else "dense"
    return f"{mixer}/{block}/{_precision(model).name.lower()}"


def _precision(model: ModelSpec) -> NodePrecision:
    if model.weight_bytes < 0.75:
        return NodePrecision.FOUR_BIT
    if model.compute_dtype in ("fp8", "int8"):
        return NodePrecision.BLOCK if model.block_quantised else NodePrecision.EIGHT_BIT
    return NodePrecision.PLAIN
