"""Metering: weighs the steps of one engine after they ran. All on the scheduler's thread but the meter itself.

A sampler thread appends windows to a deque; here they are taken from it, split over steps, and the ledgers settled:
all of it over a few steps at a time so that no scheduler step waits for many.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from llmco2_vllm.core.attribution import ALL, WINDOW_IN_STEPS, Activity, Attributor, WindowAccount
from llmco2_vllm.core.comparison import Comparison
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.core.recent import RecentGrowth
from llmco2_vllm.core.settlement import Journal, Settlement
from llmco2_vllm.core.steps import Step

# Steps that are settled behind one scheduler step. Fewer at once would be dearer: most of it is fetching cold memory.
SETTLED_AT_ONCE = 32
# Steps over which windows are split behind one scheduler step: a window holds hundreds. Each device has windows of its
# own, and with this much for each they are split in less than half the time in which the next ones come.
SPLIT_AT_ONCE, SPLIT_PER_DEVICE = 16, 4
# Scheduler steps between looks without a window.
LOOKS = 64
# Windows that are taken behind one scheduler step; after an hour without one there are thousands.
WINDOWS_AT_ONCE = 16
# Reports a snapshot tells of: five minutes.
REPORTS_TOLD = 64
# The recent coverage is that of the last one to two times so long.
COVERAGE_SECONDS = 60.0


class Listener(Protocol):
    """Who is told of what happens. Called on the scheduler's thread: one append, no more."""

    def account(self, account: WindowAccount) -> None:
        """A window was split."""

    def working(self, busy: bool, asleep: bool, now_seconds: float) -> None:
        """From now on there are requests, or there are none."""


class Deaf:
    """Listens to nothing."""

    def account(self, account: WindowAccount) -> None:
        """Not heard."""

    def working(self, busy: bool, asleep: bool, now_seconds: float) -> None:
        """Not heard."""


class HostEnergy:
    """Energy of CPUs and memory beside the devices, by a meter of its own; every engine of a host sees the same.

    joules: None until it was metered for the first time. fault: why it is not known at this moment, empty while it is.
    """

    def __init__(self, source: deque[MeterWindow], name: str, fault: Callable[[], str] = str) -> None:
        self.name, self._fault = name, fault
        self.joules: float | None = None
        self.unmetered_seconds = 0.0
        self._source = source

    def state(self) -> dict[str, Any]:
        """Cumulative since start; plain JSON values, without ``joules`` as long as they are not known."""
        while self._source:
            window = self._source.popleft()
            if window.energy_joules is None:
                self.unmetered_seconds += window.duration_seconds
            else:
                self.joules = (self.joules or 0.0) + window.energy_joules
        known = {} if self.joules is None else {"joules": self.joules}
        return {**known, "unmetered_seconds": self.unmetered_seconds, "source": self.name, "reason": self._fault()}


class Metering:
    """Takes windows from ``source`` (appended by another thread), accounts for them and settles the journal."""

    def __init__(
        self,
        attributor: Attributor,
        source: deque[MeterWindow],
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.attributor = attributor
        self.comparison = Comparison()
        self.journal = Journal()
        self.settlement = Settlement(self.journal)
        self._source = source
        self._listener = listener or Deaf()
        self._clock = clock
        # The output of a step's first open execution is back. Behind every scheduler step, hence not by way of us.
        self.closed = attributor.closed
        self._split_at_once = SPLIT_AT_ONCE + SPLIT_PER_DEVICE * attributor.devices
        self._looks = 0
        self._under_way = self._put_off = False
        self._busy = self._asleep = False
        # Of time, measured joules and estimated joules, for the coverage.
        self._recent = RecentGrowth(COVERAGE_SECONDS, clock(), 0.0, 0.0)

    def opened(self, step: Step) -> Step:
        """A step was scheduled."""
        self.journal.opened(step)
        self.attributor.opened(step)
        return step

    def repeated(self, step: Step, now_seconds: float) -> bool:
        """A further execution of the last step is scheduled; False where it must be a step of its own."""
        # Whoever has joined or left since would pay for the wrong executions.
        return self.journal.is_at(step) and self.attributor.repeated(step, now_seconds)

    def lost(self, step: Step) -> None:
        """No output will come for its first open execution."""
        self.attributor.lost(step)

    def tend(self) -> None:
        """Go on with the windows that have come, or else with settling: a bounded part of it behind every step."""
        self._looks -= 1
        if self._source:
            self._take(WINDOWS_AT_ONCE)
        elif not self._under_way and self._looks > 0:
            return
        # Also without a window, now and then: its meter may have fallen silent.
        self._looks = LOOKS
        waiting = self.attributor.waiting
        # Where more wait than one of each device, steps are longer than windows, and have the time.
        behind = max(0, waiting - self.attributor.devices)
        split = self._split(self._split_at_once + WINDOW_IN_STEPS * behind) if waiting else 0
        if split and not self._put_off:
            self._put_off = self._under_way = True
        else:
            self._put_off = False
            self._under_way = self._settle(SETTLED_AT_ONCE) > 0 or split > 0 or self.attributor.waiting > 0

    def tend_all(self) -> None:
        """The same without haste, where no step waits."""
        while self._source:
            self._take(WINDOWS_AT_ONCE)
            self._split(ALL)
        self._split(ALL)
        self._settle(ALL)

    def _take(self, most: int) -> None:
        for _ in range(min(most, len(self._source))):
            self.attributor.take(self._source.popleft())

    def _split(self, most: int) -> int:
        accounts = self.attributor.accounts(most)
        for account in accounts:
            self.comparison.add(account)
            self._listener.account(account)
        return len(accounts)

    def _settle(self, most: int) -> int:
        steps = self.attributor.settled(self._clock(), most)
        self.settlement.advance(steps, self.attributor.recent_ratio)
        return len(steps)

    def working(self, busy: bool) -> None:
        """There are requests from now on, or there are none."""
        if busy != self._busy:
            self._busy = busy
            self._listener.working(busy, self._asleep, self._clock())

    def switched(self, activity: Activity) -> None:
        """The engine falls asleep or wakes up."""
        self._asleep = activity is Activity.SLEEPING
        now = self._clock()
        self.attributor.switched(activity, now)
        self._listener.working(self._busy, self._asleep, now)

    def reset(self) -> None:
        """The ledgers are forgotten; energy goes on being counted."""
        self.attributor.forget_open(self._clock())

    def switch(self, on: bool) -> None:
        """The hook is turned off, or on again; in between nobody tells what the devices do."""
        self.reset()
        self.attributor.switched(Activity.AWAKE if on else Activity.UNKNOWN, self._clock())
        self.working(False)

    @property
    def residual_joules(self) -> float:
        """Metered energy less what requests, idle and unattributed came to: rounding, or a fault of ours."""
        totals, settled = self.attributor.totals, self.settlement
        requests = settled.prefill_joules + settled.decode_joules + self.attributor.unsettled_joules
        rest = totals.idle_joules + totals.sleeping_joules + totals.unattributed_joules
        return totals.metered_joules - requests - rest

    def _coverage_ratio(self) -> float | None:
        """Share of the energy of recently settled steps that windows cover, 0 to 1; None while none was settled."""
        settled = self.settlement
        joules = settled.prefill_joules + settled.decode_joules
        _, measured, estimated = self._recent.until(self._clock(), joules, settled.estimated_joules)
        return measured / (measured + estimated) if measured + estimated > 0.0 else None

    def state(self) -> dict[str, Any]:
        """Cumulative joules, learned idle power and the comparison with predictions; plain JSON values."""
        totals, settled, comparison = self.attributor.totals, self.settlement, self.comparison
        return {
            "metered_joules": totals.metered_joules,
            "attributed_joules": totals.attributed_joules,
            "prefill_joules": settled.prefill_joules,
            "decode_joules": settled.decode_joules,
            "idle_joules": totals.idle_joules,
            "sleeping_joules": totals.sleeping_joules,
            "unattributed_joules": totals.unattributed_joules,
            "residual_joules": self.residual_joules,
            "estimated_joules": settled.estimated_joules,
            "aborted_joules": settled.aborted_joules,
            "recomputed_joules": settled.recomputed_joules,
            "rejected_draft_joules": settled.rejected_draft_joules,
            "unmetered_seconds": totals.unmetered_seconds,
            "windows": totals.windows,
            "doubtful_windows": totals.doubtful_windows,
            "unmetered_windows": totals.unmetered_windows,
            "dropped_windows": totals.dropped_windows,
            "recent_ratio": self.attributor.recent_ratio,
            "coverage_ratio": self._coverage_ratio(),
            "idle_power_watts": {
                activity.value: self.attributor.idle_power_watts(activity)
                for activity in (Activity.AWAKE, Activity.SLEEPING)
                if self.attributor.idle_power_learned(activity)
            },
            "bias_ratio": {mix.value: bias.ratio for mix, bias in comparison.bias.items() if bias.windows},
            "reports": [[r.number, r.mix.value, r.error_ratio] for r in list(comparison.reports)[-REPORTS_TOLD:]],
        }
