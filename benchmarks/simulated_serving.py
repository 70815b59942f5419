"""vLLM's scheduling of a trace on a simulated card (simulated_card.py), and what each request truly took.

Truth of a request in a step: its share of each kernel, by what drives it. Products of weights: by tokens. Attention
of a prompt: its arithmetic by (query, key) pairs, its reads by keys read. Attention of decoding: by keys read. LM
head: by rows sampled. Time of the host for each sequence: by sequences. What nobody drives alone, streamed weights and
launch gaps, is shared equally by the tokens present. That last sentence is a convention, not physics; ``Shared`` has
the other one, equally by the requests present.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated_card import Driver, Physics, StepTruth
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.training.traffic import Served

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Before the first request and after the last: the meter finds its edges, and the last window closes.
QUIET_SECONDS = 5.0
HOST_SECONDS = 2e-4


class Shared(StrEnum):
    """Among whom what nobody drives alone is shared equally."""

    TOKENS = "tokens present"
    REQUESTS = "requests present"


class Entry(NamedTuple):
    """One request's part of a step. context: tokens in its cache before; samples: rows to the LM head."""

    step: int
    request: int
    prefill: int
    decode: int
    context: int
    samples: int


@dataclass(frozen=True)
class Serving:
    """What was served, and what it truly took.

    prompt, output: tokens of each request, shape (requests,). scheduled, begin, end, seen: seconds of each step, when
    it was scheduled, ran, and its output was back; joules: shape (steps, len(Driver)). entries: shape (n, 6).
    """

    physics: Physics
    prompt: IntArray
    output: IntArray
    scheduled: FloatArray
    begin: FloatArray
    end: FloatArray
    seen: FloatArray
    joules: FloatArray
    entries: IntArray

    def truth(self, shared: Shared = Shared.TOKENS) -> FloatArray:
        """Joules of each request by phase, prefill then decode; shape (2, requests)."""
        step, request, prefill, decode, context, samples = self.entries.T
        pairs, keys = prefill * context + prefill * (prefill + 1) // 2, context + prefill + decode
        one = np.ones(len(step))
        by = {
            Driver.TOKENS: prefill + decode,
            Driver.SHARED: prefill + decode if shared is Shared.TOKENS else one,
            Driver.PREFILL_PAIRS: pairs,
            Driver.PREFILL_KEYS: np.where(prefill > 0, keys, 0),
            Driver.DECODE_KEYS: np.where(decode > 0, keys, 0),
            Driver.SAMPLES: samples,
            Driver.SEQUENCES: one,
        }
        own = np.zeros(len(step))
        for driver, amount in by.items():
            total = np.bincount(step, amount, len(self.begin))
            own += self.joules[step, driver] * amount / np.maximum(total[step], 1e-12)
        return np.array([np.bincount(request, own * (part > 0), len(self.prompt)) for part in (prefill, decode)])

    def energy(self, times: FloatArray) -> FloatArray:
        """True joules of the device up to ``times``, idle included."""
        idle = self.physics.idle_watts
        watts = self.joules.sum(axis=1) / (self.end - self.begin) - idle
        at = np.column_stack([self.begin, self.end]).ravel()
        above = np.column_stack([np.zeros(len(watts)), watts * (self.end - self.begin)]).ravel().cumsum()
        result: FloatArray = idle * times + np.interp(times, at, above)
        return result


class _Warmth:
    """Temperature and noise of a card from step to step."""

    def __init__(self, physics: Physics, seed: int) -> None:
        self._physics, self._draw = physics, np.random.default_rng([6, seed])
        self._leakage, self._noise = 1.0, np.zeros(len(Driver) + 1)
        self._kept = np.array([0.998] * len(Driver) + [0.9])
        self._spread = physics.noise * np.sqrt(1 - self._kept**2)

    def step(self, batch: BatchShape) -> StepTruth:
        """The next step. Leakage: 10 % more of the static power at the power limit than at rest, a minute late."""
        self._noise = self._kept * self._noise + self._spread * self._draw.normal(size=len(self._noise))
        truth = self._physics.step(batch, self._leakage, self._noise)
        load = sum(truth.joules) / truth.seconds / self._physics.device.power_limit_watts
        self._leakage += (0.95 + 0.1 * load - self._leakage) * min(1.0, truth.seconds / 60)
        return truth


@dataclass
class _Running:
    request: int
    prompt: int
    output: int
    computed: int = 0
    made: int = 0


@dataclass
class Engine:
    """Continuous batching as vLLM 0.11 does it: the running first, prompts in chunks, then those that wait.

    Scheduling is asynchronous: step n + 1 is decided while step n runs, by lengths, not by what came out. A request
    is admitted when its whole length fits into ``kv_capacity_tokens``; nothing is preempted.
    """

    physics: Physics
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_capacity_tokens: int = 1 << 60
    seed: int = 0
    _running: list[_Running] = field(default_factory=list)
    _reserved: int = 0

    def serve(self, served: Served, advance: Callable[[], None] = lambda: None) -> Serving:
        """All requests of a trace to their end; ``advance`` is called for each that ends."""
        waiting = deque(
            _Running(i, max(1, int(p)), max(1, int(o)))
            for i, (p, o) in enumerate(zip(served.input_tokens, served.output_tokens, strict=True))
        )
        arrivals = QUIET_SECONDS + served.arrival_seconds - served.arrival_seconds[0]
        prompt, output = (np.array([getattr(r, name) for r in waiting]) for name in ("prompt", "output"))
        draw, warmth = np.random.default_rng([2, self.seed]), _Warmth(self.physics, self.seed)
        times: list[tuple[float, float, float, float]] = []
        joules, entries = list[list[float]](), list[Entry]()
        free = now = 0.0
        while waiting or self._running:
            if not self._running:
                now = max(now, float(arrivals[waiting[0].request]))
            parts = self._schedule(len(times), waiting, arrivals, now)
            entries += parts
            truth, begin = warmth.step(_shape(parts)), max(free, now)
            free = begin + truth.seconds
            times.append((now, begin, free, free + HOST_SECONDS + draw.exponential(HOST_SECONDS)))
            joules.append(truth.joules)
            for _ in range(self._retire()):
                advance()
            # The next step is decided when the output of the step before this one is back.
            before = times[-2][3] if len(times) > 1 else begin
            now = max(now, before) if self._running else times[-1][3]
        scheduled, begins, ends, seen = np.array(times).T
        return Serving(self.physics, prompt, output, scheduled, begins, ends, seen, np.array(joules), np.array(entries))

    def _schedule(self, step: int, waiting: deque[_Running], arrivals: FloatArray, now: float) -> list[Entry]:
        budget, parts = self.max_num_batched_tokens, list[Entry]()
        for one in self._running:
            if not budget:
                break
            budget -= self._take(step, one, budget, parts)
        while budget and waiting and len(self._running) < self.max_num_seqs:
            one = waiting[0]
            if arrivals[one.request] > now or self._reserved + one.prompt + one.output > self.kv_capacity_tokens:
                break
            self._running.append(waiting.popleft())
            self._reserved += one.prompt + one.output
            budget -= self._take(step, one, budget, parts)
        return parts

    @staticmethod
    def _take(step: int, one: _Running, budget: int, parts: list[Entry]) -> int:
        left = one.prompt - one.computed
        prefill = min(left, budget) if left > 0 else 0
        decode = int(left <= 0)
        samples = int(decode or prefill == left)
        parts.append(Entry(step, one.request, prefill, decode, one.computed, samples))
        one.computed += prefill + decode
        one.made += samples
        return prefill + decode

    def _retire(self) -> int:
        done = [one for one in self._running if one.made >= one.output]
        self._running = [one for one in self._running if one.made < one.output]
        self._reserved -= sum(one.prompt + one.output for one in done)
        return len(done)


def _shape(parts: list[Entry]) -> BatchShape:
    totals = [[0] * 5, [0] * 5]
    for _, _, prefill, decode, context, samples in parts:
        n = prefill or decode
        row = totals[0 if prefill else 1]
        row[0] += 1
        row[1] += n
        row[2] += n * context + n * (n + 1) // 2
        row[3] += context + n
        row[4] += samples
    return BatchShape(PhaseShape(*totals[0]), PhaseShape(*totals[1]))
