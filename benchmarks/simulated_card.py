"""A simulated GPU whose joules are known by what drives them. For benchmarks/attribution.py.

The physics is not that of our predictors. A step is a few kernels; each takes a smooth maximum of its compute time
(padded to tiles, slow where tokens are few) and its memory time, and draws a static power while it runs, joules per
FLOP and joules per byte. Above the power limit the clock gives way, and with it the voltage. Leakage follows the
temperature, which follows the power; every kernel and every step carries noise that remembers (AR(1)). All constants
are drawn anew for each seed, within what is plausible of an H100; none was fitted to a predictor of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import ceil, exp
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import NO_RATES, Estimate, Rates
from llmco2_vllm.core.hardware import DeviceSpec
from llmco2_vllm.core.model import ModelSpec

FloatArray = NDArray[np.float64]
# The clock gives way in steps of about a 256th.
CLOCK_HALVINGS = 8


class Driver(IntEnum):
    """What a kernel's joules grow with. SHARED: with nothing; streamed weights and launch gaps."""

    TOKENS = 0
    SHARED = 1
    PREFILL_PAIRS = 2
    PREFILL_KEYS = 3
    DECODE_KEYS = 4
    SAMPLES = 5
    SEQUENCES = 6


class Kernel(NamedTuple):
    """Seconds at full clock by compute and by memory, dynamic joules of either, and who drives the two."""

    compute_seconds: float
    memory_seconds: float
    compute_joules: float
    memory_joules: float
    compute_driver: Driver
    memory_driver: Driver


class StepTruth(NamedTuple):
    """joules: by Driver, shape (len(Driver),)."""

    joules: list[float]
    seconds: float


@dataclass(frozen=True)
class Physics:
    """Constants of one simulated card. Efficiencies are shares of the data sheet's peaks."""

    model: ModelSpec
    device: DeviceSpec
    linear_efficiency: float
    expert_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    gather_efficiency: float
    few_tokens: float
    tile: int
    sharpness: float
    launch_seconds: float
    sequence_seconds: float
    idle_watts: float
    static_watts: float
    joules_per_flop: float
    joules_per_byte: float
    evenness: float
    clock_exponent: float
    noise: float

    @classmethod
    def drawn(cls, model: ModelSpec, device: DeviceSpec, seed: int) -> Physics:
        """A card: its constants drawn within what is plausible of an H100."""
        draw = np.random.default_rng([1, seed])
        between = draw.uniform
        return cls(
            model,
            device,
            linear_efficiency=between(0.60, 0.78),
            expert_efficiency=between(0.35, 0.60),
            attention_efficiency=between(0.40, 0.65),
            bandwidth_efficiency=between(0.80, 0.93),
            gather_efficiency=between(0.55, 0.85),
            few_tokens=between(20, 100),
            tile=int(draw.choice([64, 128])),
            sharpness=between(2.5, 6.0),
            launch_seconds=between(4e-4, 2e-3),
            sequence_seconds=between(4e-6, 2e-5),
            idle_watts=between(70, 110),
            static_watts=between(140, 220),
            joules_per_flop=between(0.55e-12, 0.85e-12),
            joules_per_byte=between(75e-12, 120e-12),
            evenness=between(0.5, 0.9),
            clock_exponent=between(1.2, 2.0),
            noise=0.03,
        )

    def _kernel(self, driver: Driver, flops: float, moved: float, shares: tuple[float, float]) -> Kernel:
        """FLOPs and bytes at shares of the peaks; without ``SHARED`` bytes, both are driven by the same."""
        peak, bandwidth = self.device.peak_flops("bf16"), self.device.memory_bandwidth_bytes_per_second
        return Kernel(
            flops / peak / shares[0],
            moved / bandwidth / shares[1],
            flops * self.joules_per_flop,
            moved * self.joules_per_byte,
            driver,
            {Driver.TOKENS: Driver.SHARED, Driver.PREFILL_PAIRS: Driver.PREFILL_KEYS}.get(driver, driver),
        )

    def kernels(self, batch: BatchShape) -> list[Kernel]:
        """The work of a step, all layers together."""
        model, tokens = self.model, batch.tokens
        prefill, decode, _ = batch
        found = []
        padded = ceil(tokens / self.tile) * self.tile
        slow = padded / (padded + self.few_tokens)
        projections = model.hidden * (2 * model.q_width + 2 * model.kv_width)
        dense = model.layers * projections + (model.layers - model.moe_layers) * 3 * model.hidden * model.intermediate
        share = (self.linear_efficiency * slow, self.bandwidth_efficiency)
        found.append(self._kernel(Driver.TOKENS, 2 * dense * padded, 2.0 * dense, share))
        if model.moe_layers:
            found.append(self._experts(tokens))
        # Hidden states between kernels: some two dozen reads and writes in a layer, driven by the tokens alone.
        values = 24 * 2 * model.hidden * model.layers * tokens
        activations = self._kernel(Driver.TOKENS, values, values, (1.0, self.bandwidth_efficiency))
        found.append(activations._replace(memory_driver=Driver.TOKENS))
        pairs, keys = 4 * model.q_width * model.layers, 4 * model.kv_width * model.layers
        attention = (self.attention_efficiency, self.gather_efficiency)
        if prefill.tokens:
            work = pairs * prefill.pairs, keys * prefill.kv_tokens
            found.append(self._kernel(Driver.PREFILL_PAIRS, *work, attention))
        if decode.tokens:
            work = pairs * decode.pairs, keys * decode.kv_tokens
            found.append(self._kernel(Driver.DECODE_KEYS, *work, attention))
        if samples := prefill.samples + decode.samples:
            head = model.hidden * model.vocab
            work = 2 * head * ceil(samples / 16) * 16, 2 * head + 16 * model.vocab * samples
            found.append(self._kernel(Driver.SAMPLES, *work, (self.linear_efficiency, self.bandwidth_efficiency)))
        return found

    def _experts(self, tokens: int) -> Kernel:
        """Grouped products: experts that get a token are streamed, and their tokens padded to tiles of 16."""
        model = self.model
        expert = 3 * model.hidden * model.moe_intermediate * model.moe_layers
        missed = (1 - model.experts_per_token / model.experts) ** (tokens * self.evenness)
        active = model.experts * (1 - missed)
        rows = active * ceil(tokens * model.experts_per_token / active / 16) * 16
        share = (self.expert_efficiency, self.bandwidth_efficiency)
        return self._kernel(Driver.TOKENS, 2 * expert * rows, 2 * expert * active, share)

    def step(self, batch: BatchShape, leakage: float = 1.0, noise: FloatArray | None = None) -> StepTruth:
        """Joules by driver and seconds of a step. noise: logarithms, of the kernels by Driver and of the step, last."""
        kernels = self.kernels(batch)
        host = self.launch_seconds + self.sequence_seconds * (batch.prefill.sequences + batch.decode.sequences)
        static = self.static_watts * leakage
        low, clock, high = 0.3, 1.0, 1.0
        for _ in range(CLOCK_HALVINGS):
            times = [self._seconds(kernel, clock) for kernel in kernels]
            slower = clock**self.clock_exponent
            dynamic = sum(slower * kernel.compute_joules + kernel.memory_joules for kernel in kernels)
            seconds = sum(times) + host
            hot = dynamic + static * seconds > self.device.power_limit_watts * seconds
            if not hot and clock == 1.0:
                break
            low, high = (low, clock) if hot else (clock, high)
            clock = (low + high) / 2
        joules = [0.0] * len(Driver)
        for kernel, time in zip(kernels, times, strict=True):
            compute = (kernel.compute_seconds / clock) ** self.sharpness
            part = compute / (compute + kernel.memory_seconds**self.sharpness)
            joules[kernel.compute_driver] += slower * kernel.compute_joules + static * time * part
            joules[kernel.memory_driver] += kernel.memory_joules + static * time * (1 - part)
        joules[Driver.SHARED] += static * self.launch_seconds
        joules[Driver.SEQUENCES] += static * (host - self.launch_seconds)
        if noise is not None:
            joules = [value * exp(noise[i] + noise[-1]) for i, value in enumerate(joules)]
            seconds *= exp(noise[-1] / 2)  # half of a step's noise is time, half power
        return StepTruth(joules, seconds)

    def _seconds(self, kernel: Kernel, clock: float) -> float:
        compute = (kernel.compute_seconds / clock) ** self.sharpness
        return float((compute + kernel.memory_seconds**self.sharpness) ** (1 / self.sharpness))


@dataclass(frozen=True)
class PerfectPredictor:
    """Knows the physics but its noise and temperature: what is left is the error of meter, windows and rates."""

    physics: Physics
    name: str = "perfect/1"

    def estimate(self, batch: BatchShape) -> Estimate:
        """The truth of a step as rates."""
        prefill, decode, _ = batch
        if not batch.tokens:
            return Estimate(0.0, 0.0, NO_RATES, NO_RATES, 0.0, 1.0, 1.0, True)
        joules, seconds = self.physics.step(batch)
        samples = prefill.samples + decode.samples
        by_token = (joules[Driver.TOKENS] + joules[Driver.SHARED] + joules[Driver.SEQUENCES]) / batch.tokens
        by_sample = joules[Driver.SAMPLES] / samples if samples else 0.0
        by_pair = (joules[Driver.PREFILL_PAIRS] + joules[Driver.PREFILL_KEYS]) / max(1, prefill.pairs)
        first = Rates(by_token, by_pair, by_sample) if prefill.tokens else NO_RATES
        then = Rates(by_token, joules[Driver.DECODE_KEYS] / decode.pairs, by_sample) if decode.tokens else NO_RATES
        return Estimate(first.joules(prefill), then.joules(decode), first, then, seconds, 0.9, 1.1, True)
