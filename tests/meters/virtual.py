"""A sampler in virtual time: its poll_once() is called when it asks to be, early or late by a seeded amount."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.meters.base import Meter
from llmco2_vllm.meters.sampler import EdgeSampler, Timing
from llmco2_vllm.testing import FakeClock

START_SECONDS = 1000.0
# A look takes no less than this.
CALL_SECONDS = 3e-5


class Bench:
    """A fake clock, meters on it, and the sampler over them."""

    def __init__(self, late_seconds: float = 0.0002, seed: int = 0) -> None:
        self.clock = FakeClock(START_SECONDS)
        self.suspended = FakeClock()
        self.meters: list[Any] = []
        self._random = random.Random(seed)
        self._late = late_seconds
        self._sampler: EdgeSampler | None = None

    def add(self, meter: Meter) -> Any:
        self.meters.append(meter)
        return meter

    def use(self, open_meters: Callable[[], Sequence[Meter]] | None = None, **options: Any) -> EdgeSampler:
        timing = Timing(self.clock, self.clock.advance, self.suspended)
        self._sampler = EdgeSampler(open_meters or (lambda: self.meters), timing, **options)
        return self._sampler

    @property
    def sampler(self) -> EdgeSampler:
        return self._sampler or self.use()

    def run(self, seconds: float) -> list[MeterWindow]:
        """The windows of all devices that close in the next ``seconds``."""
        end = self.clock() + seconds
        while self.clock() < end:
            due = self.sampler.poll_once()
            late = self._random.expovariate(1 / self._late) if self._late else 0.0
            self.clock.now_seconds = max(self.clock() + CALL_SECONDS, min(due, end) + late)
        taken = list(self.sampler.windows)
        self.sampler.windows.clear()
        return taken

    @property
    def state(self) -> dict[str, Any]:
        """Figures of the first device."""
        return dict(self.sampler.state()["devices"][0])


def tiled(windows: Sequence[MeterWindow]) -> bool:
    """Each window begins where the one before ends, and has a length."""
    return all(a.end_seconds == b.begin_seconds for a, b in pairwise(windows)) and all(
        window.duration_seconds > 0 for window in windows
    )


class Steps:
    """Energy of steps of random power, as METERING section 3 simulates them: 9 ms decode, 25 ms mixed."""

    def __init__(self, seconds: float, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        count = int(seconds / 0.008)
        mixed = generator.random(count) < 0.12
        lengths = np.where(mixed, 0.025, 0.0093) * generator.lognormal(0, 0.1, count)
        joules = np.where(mixed, 19.0, 3.7) * generator.normal(1, 0.05, count)
        self.times = START_SECONDS - 1.0 + np.concatenate([[0], np.cumsum(lengths)])
        self.totals = 1e6 + np.concatenate([[0], np.cumsum(joules)])

    def __call__(self, time_seconds: float) -> float:
        return float(np.interp(time_seconds, self.times, self.totals))
