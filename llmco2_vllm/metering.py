"""Metering: weighs the steps of one engine after they ran. All on the scheduler's thread but the meter itself.

A sampler thread appends windows to a deque; here they are taken from it, split over steps, and the ledgers settled, a
few steps at a time so that no scheduler step waits for many.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from llmco2_vllm.core.attribution import Activity, Attributor, Step, WindowAccount
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.core.settlement import Journal, Paid, Settlement

# Steps that are settled behind one scheduler step; more arrive per window than this times the steps in it only while
# nobody waits for them.
STEPS_AT_ONCE = 4
OnAccount = Callable[[WindowAccount], None]


class Metering:
    """Takes windows from ``source`` (appended by another thread), accounts for them and settles the journal.

    on_account: told of every window that was split, for comparison and samples.
    """

    def __init__(
        self,
        attributor: Attributor,
        source: deque[MeterWindow],
        on_account: OnAccount = lambda account: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.attributor = attributor
        self.journal: Journal = deque()
        self.settlement = Settlement(self.journal)
        self._source = source
        self._on_account = on_account
        self._clock = clock
        self._settled: deque[Step] = deque()

    def opened(self, step: Step, paid: Sequence[Paid] = ()) -> Step:
        """A step was scheduled, and these requests were charged in it outside the running sums."""
        step.paid = paid
        self.journal.append(step)
        self.attributor.opened(step)
        return step

    def closed(self, step: Step, begin_seconds: float, end_seconds: float) -> None:
        """Its output is back."""
        self.attributor.closed(step, begin_seconds, end_seconds)

    def tend(self, most: int = STEPS_AT_ONCE) -> None:
        """Account for the windows that have come, and settle at most so many steps."""
        source, attributor = self._source, self.attributor
        if source:
            while source:
                attributor.take(source.popleft())
            for account in attributor.accounts():
                self._on_account(account)
        if not self._settled:
            self._settled.extend(attributor.settled(self._clock()))
        count = min(most, len(self._settled))
        if count:
            steps = [self._settled.popleft() for _ in range(count)]
            self.settlement.advance(steps, attributor.recent_ratio)

    def tend_all(self) -> None:
        """The same without haste, where no step waits."""
        self.tend(1 << 30)
        self.tend(1 << 30)
        self.settlement.advance((), self.attributor.recent_ratio)

    def switched(self, activity: Activity) -> None:
        """The engine falls asleep or wakes up."""
        self.attributor.switched(activity, self._clock())

    def reset(self, now_seconds: float) -> None:
        """The ledgers are forgotten; energy goes on being counted."""
        self.attributor.forget_open(now_seconds)
