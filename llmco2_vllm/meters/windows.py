"""From readings of one device to windows that tile its time, whatever happens (METERING sections 4 and 6)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np

from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.meters.activity import EngineActivity, LagLearner
from llmco2_vllm.meters.base import DeviceIdentity, Reading
from llmco2_vllm.meters.edges import WINDOW_SECONDS, Edge, Pace
from llmco2_vllm.meters.trial import TRIAL_SECONDS, Trial

RING_WINDOWS = 4096
POWER_POLL_SECONDS = 0.05
# How often the power fields are published (METERING section 1), for the error of an integral over them.
POWER_PERIOD_SECONDS = 0.1
BLIND_SECONDS = 1.0
FROZEN_TICKS = 5
GAP_TICKS = 10
UNLEARNT_TICK_SECONDS = 0.4
# A device that draws over half of our busy power while our engine has been idle for a second works for someone else.
TENANT_SHARE = 0.5
MEMORY = 32


@dataclass(frozen=True)
class WindowRules:
    """What a window is.

    window_seconds: shortest window from edge to edge.
    part_time_variation: coefficient of variation of a part-time sensor about the mean of a tick
        (c_d of METERING section 3); 0 for a counter that sees all of the time.
    """

    window_seconds: float = WINDOW_SECONDS
    part_time_variation: float = 0.0


class Boundary(NamedTuple):
    """End of a window in the ring: when, joules since the start, sigma of the time, whether the window was metered."""

    time_seconds: float
    total_joules: float
    sigma_seconds: float
    known: bool


class DeviceTrack:
    """State of one device between readings. Lives on the sampler thread; ``windows`` is drained by another."""

    def __init__(
        self,
        device: int,
        identity: DeviceIdentity,
        windows: deque[MeterWindow],
        activity: EngineActivity,
        rules: WindowRules,
    ) -> None:
        self.device, self.identity = device, identity
        self.faults: Counter[Doubt] = Counter()
        self.source = "none"
        self.power_watts: float | None = None
        self.ring: deque[Boundary] = deque(maxlen=RING_WINDOWS)
        self.lag = LagLearner(activity)
        self.pace = Pace(identity.tick_seconds, rules.window_seconds)
        self._windows, self._activity, self._rules = windows, activity, rules
        self._total_joules = 0.0
        self._shift = 0.0  # the lag that the windows so far were shifted by
        self._idle_watts: deque[float] = deque(maxlen=MEMORY)
        self._busy_watts: deque[float] = deque(maxlen=MEMORY)
        self._watts: deque[float] = deque(maxlen=MEMORY)
        # The counter froze: not believed until it has stood its trial, or the device is opened anew.
        self._trial: Trial | None = None
        self._freezes = 0
        self._reopened = False
        self._last: Reading | None = None
        # The open window: since when, counter value there, sigma of that time, integrated joules, what is wrong.
        self._since: float | None = None
        self._base: float | None = None
        self._sigma = 0.0
        self._slice = self._integrated_until = 0.0
        self._blind = Doubt.NONE
        self._doubt = Doubt.NONE
        self._value: float | None = None
        self._value_since = 0.0
        self.due = float("-inf")

    def observe(self, reading: Reading) -> None:
        """Take in a reading; closes a window when it is time."""
        last, self._last = self._last, reading
        self.power_watts = reading.power_watts
        now = reading.time_seconds
        if last is not None and now - last.time_seconds > self._gap_seconds:
            self._suspect(Doubt.GAP)
        if self._trial is not None and self._trial.passed(reading):
            self._trial, self._blind = None, self._blind or Doubt.FROZEN
        if reading.energy_joules is not None and self._trial is None:
            self._count(now, reading.energy_joules)
            self.due = self.pace.due
        elif reading.power_watts is not None and isfinite(reading.power_watts):
            self._integrate(last, now, reading.power_watts)
            self.due = now + POWER_POLL_SECONDS
        else:
            self.blind(now, Doubt.NOT_SUPPORTED if self._trial is None else Doubt.FROZEN)
            self.due = now + BLIND_SECONDS

    def blind(self, now: float, doubt: Doubt) -> None:
        """Nothing is known from the last boundary to ``now``, nor until the next edge."""
        if self.source != "none" or self._blind is not doubt:
            self.faults[doubt] += 1
        self.source, self._base, self._last, self._blind = "none", None, None, doubt
        self.power_watts = None
        self.pace.restart()
        self.lag.forget_edges()
        if self._since is None:
            self._since, self._sigma = now, 0.0
        elif now - self._since >= self._rules.window_seconds:
            self._close(Edge(now, 0.0), None, doubt)

    @property
    def blind_doubt(self) -> Doubt:
        """Why the energy of the open window is not known; ``NONE`` while it is, and before the first reading."""
        return self._blind

    def reopened(self, identity: DeviceIdentity) -> None:
        """The device was opened anew: its counter is believed again and may have started anew."""
        self._trial, self._reopened = None, True
        self.identify(identity)

    def identify(self, identity: DeviceIdentity) -> None:
        """What the device is as of the next reading; what an energy of another scope is added to begins there."""
        changed = identity.scope != self.identity.scope
        self.identity = identity
        if changed:
            self.faults[Doubt.SCOPE_CHANGED] += 1
            self._base, self._blind = None, Doubt.SCOPE_CHANGED
            self.pace.restart()

    def suspended(self) -> None:
        """The host slept: time stood still while energy may have gone on."""
        self._suspect(Doubt.CLOCK_SUSPENDED)
        self.pace.restart()

    def _suspect(self, doubt: Doubt) -> None:
        self.faults[doubt] += 1
        if self._since is not None and self._doubt is not Doubt.CLOCK_SUSPENDED:
            self._doubt = doubt

    @property
    def _gap_seconds(self) -> float:
        if self.source != "counter":
            return GAP_TICKS * POWER_PERIOD_SECONDS
        tick = self.pace.tick_seconds or UNLEARNT_TICK_SECONDS
        return GAP_TICKS * (tick if self.pace.line else self._rules.window_seconds)

    # The counter.

    def _count(self, now: float, joules: float) -> None:
        if self.source != "counter":
            self._leave_power()
            self.source = "counter"
        changed = self._value is not None and joules != self._value
        if self._value is None or changed:
            fell = self._base is not None and self._value is not None and joules < self._value
            self._value, self._value_since = joules, now
            if fell:
                self._fell(now, joules)
                return
        self._reopened = False
        edge = self.pace.saw(now, changed)
        if self._base is None:
            self._base_at_edge(edge, joules)
        elif edge is not None and self._since is not None:
            self.lag.edge(edge.time_seconds, joules)
            if edge.time_seconds - self._since >= 0.95 * self._rules.window_seconds:
                self._close(edge, joules - self._base, self._doubt)
                self._base = joules
        elif not changed:
            self._check_frozen(now)

    def _base_at_edge(self, edge: Edge | None, joules: float) -> None:
        """The first edge after nothing was known: what came before is closed without energy."""
        if edge is None:
            return
        if self._since is None:
            self._since, self._sigma = edge.time_seconds, edge.sigma_seconds
            self._remember(edge, True)
        else:
            self._close(edge, None, self._blind)
        self._base, self._blind, self._doubt = joules, Doubt.NONE, Doubt.NONE
        self.lag.edge(edge.time_seconds, joules)

    def _fell(self, now: float, joules: float) -> None:
        doubt = Doubt.DRIVER_RELOADED if self._reopened else Doubt.COUNTER_DECREASED
        self.faults[doubt] += 1
        self._close(Edge(now, 0.0), None, doubt)
        self._base = joules
        self.pace.restart()
        self.pace.saw(now, False)
        self.lag.forget_edges()

    def _check_frozen(self, now: float) -> None:
        longest = FROZEN_TICKS * max(self.pace.tick_seconds or UNLEARNT_TICK_SECONDS, POWER_POLL_SECONDS)
        if now - self._value_since > longest and self._activity.is_busy(self._value_since, now):
            self.blind(now, Doubt.FROZEN)
            # The more often it froze, the longer it has to count: one that keeps freezing is rarely believed.
            self._freezes += 1
            seen = (*self._idle_watts, *self._busy_watts)
            self._trial = Trial(TRIAL_SECONDS * self._freezes, longest, (min(seen), max(seen)) if seen else None)

    # Integrated power.

    def _integrate(self, last: Reading | None, now: float, watts: float) -> None:
        if self.source != "power":
            if self.source == "counter":
                self.faults[Doubt.NOT_SUPPORTED] += 1
                self._close(Edge(now, 0.0), None, Doubt.NOT_SUPPORTED)
            elif self._since is not None:
                self._close(Edge(now, 0.0), None, self._blind or Doubt.NOT_SUPPORTED)
            self.source, self._base, self._value, self._slice = "power", None, None, 0.0
            self._since, self._sigma, self._doubt, self._blind = now, 0.0, Doubt.NONE, Doubt.NONE
            self._remember(Edge(now, 0.0), True)
        elif last is not None and last.power_watts is not None:
            self._slice += (last.power_watts + watts) / 2 * (now - last.time_seconds)
        self._watts.append(watts)
        self._integrated_until = now
        if self._since is not None and now - self._since >= self._rules.window_seconds:
            self._close_slice(now)

    def _close_slice(self, now: float) -> None:
        gap = self._doubt is Doubt.GAP  # nobody looked: an integral over it would be a guess
        self._close(Edge(now, 0.0), None if gap else self._slice, self._doubt or Doubt.INTEGRATED_POWER)
        self._slice = 0.0

    def _leave_power(self) -> None:
        """From the last reading of power to the first edge nothing is known."""
        if self.source == "power":
            self._close(Edge(self._integrated_until, 0.0), self._slice, Doubt.INTEGRATED_POWER)
            self._blind = self._blind or Doubt.NOT_SUPPORTED
        self._base = self._value = None
        self._slice = 0.0
        self.pace.restart()

    # Windows.

    def _close(self, edge: Edge, joules: float | None, doubt: Doubt) -> None:
        """Emit the window from the last boundary to ``edge``, and begin the next one there."""
        assert self._since is not None
        begin, end = self._since, edge.time_seconds
        if end <= begin:
            return
        shift, doubt = self._shifted(begin, end, doubt)
        if joules is not None and doubt in (Doubt.NONE, Doubt.INTEGRATED_POWER):
            doubt = self._doubt_of_others(begin, end, joules) or doubt
        sigma = self._sigma_joules(end - begin, joules, edge.sigma_seconds)
        self._windows.append(MeterWindow(self.device, begin - self._shift, end - shift, joules, sigma, doubt))
        self._total_joules += joules or 0.0
        self._shift, self._since, self._sigma, self._doubt = shift, end, edge.sigma_seconds, Doubt.NONE
        self._remember(edge, joules is not None)

    def _remember(self, edge: Edge, known: bool) -> None:
        self.ring.append(Boundary(edge.time_seconds - self._shift, self._total_joules, edge.sigma_seconds, known))

    def _shifted(self, begin: float, end: float, doubt: Doubt) -> tuple[float, Doubt]:
        """The shift of the window's end. Taken over from the learner once the window is long enough for it."""
        lag = self.lag.lag_seconds
        if lag is None or abs(lag - self._shift) < 1e-3 or end - lag <= begin - self._shift:
            return self._shift, doubt
        return lag, doubt or Doubt.LAG_LEARNT

    def _sigma_joules(self, seconds: float, joules: float | None, edge_sigma: float) -> float:
        """METERING section 3; a window over power readings errs as the mean of its few readings does."""
        if joules is None:
            return 0.0
        if self.source == "power":
            mean = float(np.mean(self._watts))
            variation = float(np.std(self._watts)) / mean if mean > 0 else 0.0
            return joules * variation * sqrt(POWER_PERIOD_SECONDS / seconds)
        timing = joules / seconds * sqrt(self._sigma**2 + edge_sigma**2)
        tick = self.pace.tick_seconds or 0.0
        part_time = self._rules.part_time_variation * joules * sqrt(tick / seconds)
        return sqrt(timing**2 + part_time**2)

    def _doubt_of_others(self, begin: float, end: float, joules: float) -> Doubt:
        """Doubt that comes from who used the device: MIG, sleeping, other tenants."""
        begin, end, watts = begin - self._shift, end - self._shift, joules / (end - begin)
        doubt = Doubt.NONE
        if self.identity.shared:
            doubt = Doubt.SHARED
        elif self._activity.slept(begin, end):
            doubt = Doubt.SLEEPING
        elif self._activity.is_busy(begin, end):
            self._busy_watts.append(watts)
        elif self._activity.is_busy(begin - 1.0, end) is False:
            least = min(self._idle_watts, default=watts)
            busy = float(np.mean(self._busy_watts)) if self._busy_watts else 0.0
            if busy > 1.5 * least and watts > least + TENANT_SHARE * (busy - least):
                doubt = Doubt.SHARED
            else:
                self._idle_watts.append(watts)
        if doubt:
            self.faults[doubt] += 1
        return doubt


def energy_between(ring: list[Boundary], begin_seconds: float, end_seconds: float) -> tuple[float, float] | None:
    """(joules, standard deviation) of a device in a span, None where it was not metered all the time.

    Within a window power is taken as even. What that misses is the variation of power between neighbouring
    windows, as a bridge: ``sigma = c E sqrt(f (1 - f))`` at the fraction f of a window.
    """
    if end_seconds < begin_seconds:
        raise ValueError(f"end_seconds={end_seconds} lies before begin_seconds={begin_seconds}")
    if len(ring) < 2 or begin_seconds < ring[0].time_seconds or end_seconds > ring[-1].time_seconds:
        return None
    first, last = _window_of(ring, begin_seconds), _window_of(ring, end_seconds)
    if not all(boundary.known for boundary in ring[first : last + 1]):
        return None
    before, after = _total_at(ring, first, begin_seconds), _total_at(ring, last, end_seconds)
    return after[0] - before[0], sqrt(before[1] + after[1])


def _window_of(ring: list[Boundary], at: float) -> int:
    """Index of the boundary that ends the window in which ``at`` lies."""
    return min(max(bisect_left(ring, at, key=lambda boundary: boundary.time_seconds), 1), len(ring) - 1)


def _total_at(ring: list[Boundary], i: int, at: float) -> tuple[float, float]:
    """Joules up to ``at`` in the window that ends at boundary ``i``, and their variance in J^2."""
    left, right = ring[i - 1], ring[i]
    seconds, joules = right.time_seconds - left.time_seconds, right.total_joules - left.total_joules
    fraction = (at - left.time_seconds) / seconds
    watts = [
        (b.total_joules - a.total_joules) / (b.time_seconds - a.time_seconds)
        for a, b in pairwise(ring[max(0, i - 2) : i + 2])
    ]
    timing = joules / seconds * (left.sigma_seconds * (1 - fraction) + right.sigma_seconds * fraction)
    bridge = float(np.std(watts)) * seconds * sqrt(max(fraction * (1 - fraction), 0.0))
    return left.total_joules + fraction * joules, timing**2 + bridge**2
