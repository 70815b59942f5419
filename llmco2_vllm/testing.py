"""Fakes that are shipped, for our tests and for those who build on the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import floor

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate, Rates
from llmco2_vllm.meters.base import DeviceIdentity, Reading, Vitals


@dataclass
class FakeClock:
    """A clock that stands still until it is told to go on."""

    now_seconds: float = 0.0

    def __call__(self) -> float:
        return self.now_seconds

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_seconds += seconds


_PREFILL = Rates(1.0, 0.001, 5.0)
_DECODE = Rates(2.0, 0.01, 7.0)


@dataclass(frozen=True)
class ConstantPredictor:
    """Joules by fixed rates, so that a test can price a batch by hand; one second per step."""

    prefill: Rates = _PREFILL
    decode: Rates = _DECODE
    lower_ratio: float = 0.5
    upper_ratio: float = 2.0
    in_distribution: bool = True

    @property
    def name(self) -> str:
        """Method and version."""
        return "constant/1"

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy by the fixed rates; a batch without tokens costs nothing."""
        return Estimate(
            self.prefill.joules(batch.prefill),
            self.decode.joules(batch.decode),
            self.prefill,
            self.decode,
            1.0 if batch.tokens else 0.0,
            self.lower_ratio,
            self.upper_ratio,
            self.in_distribution,
        )


FAKE_DEVICE = DeviceIdentity("GPU-fake", "Fake GPU", power_basis="instant power")


def steady_power(time_seconds: float) -> float:
    """Joules up to a time at 100 W."""
    return 100.0 * time_seconds


@dataclass
class FakeMeter:
    """A device whose counter is made from a script, in the time of ``clock``.

    energy: joules up to a time (seconds), ascending. tick_seconds, phase_seconds: when the counter publishes;
    lag_seconds: how old what it publishes is. duty: share of each tick that the sensor sees, its end.
    failures: errors to raise, one per reading, before readings go on. ``offset_joules`` may be set to let the
    counter jump, ``power_gain`` to let power disagree with it, ``frozen`` to hold its value, ``counting`` and
    ``powering`` turned off to let it lose a field.
    """

    clock: FakeClock
    energy: Callable[[float], float] = steady_power
    tick_seconds: float = 0.1
    phase_seconds: float = 0.0
    lag_seconds: float = 0.0
    duty: float = 1.0
    identity: DeviceIdentity = FAKE_DEVICE
    name: str = "fake"
    offset_joules: float = 0.0
    counting: bool = True
    powering: bool = True
    power_gain: float = 1.0
    frozen: bool = False
    failures: list[Exception] = field(default_factory=list)
    reopen_failures: list[Exception] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    reopened: int = 0
    closed: bool = False
    _published: float = 0.0

    def counter(self, time_seconds: float) -> float:
        """What the counter shows at a time."""
        ticks = floor((time_seconds - self.phase_seconds) / self.tick_seconds + 1e-9)
        if self.duty < 1.0:
            seen = self.duty * self.tick_seconds
            edges = (k * self.tick_seconds + self.phase_seconds - self.lag_seconds for k in range(1, ticks + 1))
            return sum(self.energy(edge) - self.energy(edge - seen) for edge in edges) / self.duty
        return self.energy(ticks * self.tick_seconds + self.phase_seconds - self.lag_seconds)

    def read(self) -> Reading:
        """The fields that are not turned off, or the next failure."""
        now = self.clock()
        self.calls.append(now)
        if self.failures:
            raise self.failures.pop(0)
        if not self.frozen:
            self._published = self.counter(now) + self.offset_joules
        watts = self.power_gain * (self.energy(now) - self.energy(now - 0.025)) / 0.025
        return Reading(now, self._published if self.counting else None, watts if self.powering else None)

    def vitals(self) -> Vitals:
        """A cool device."""
        self.calls += [self.clock()] * 2
        return Vitals(40.0, 1980.0)

    def reopen(self) -> None:
        """Back again, or the next failure to come back."""
        self.calls.append(self.clock())
        if self.reopen_failures:
            raise self.reopen_failures.pop(0)
        self.reopened += 1

    def close(self) -> None:
        """Closed."""
        self.closed = True
