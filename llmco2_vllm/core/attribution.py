"""From metered windows to joules per step: what was measured, over what ran in it (METERING section 5).

For each window w of a device, e_s the predicted energy of step s on it and f_ws the share of the step inside w::

    E_w = ratio_w * sum_s f_ws * e_s + idle_w + unattributed_w          idle_w = P_idle * gap_w

Over the steps of a window its dynamic energy goes by measured duration x predicted power, because time is measured on
every step and power is smooth (ARCHITECTURE decision 1, docs/adr/0009). Nothing is lost or counted twice:
``unattributed`` is what is left, of either sign, and is only ever large where the ratio leaves what the recent past
makes plausible. Idle is a line of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.core.scores import NORMAL_90
from llmco2_vllm.core.steps import Inside, Pace, Step, StepShare

# A window's ratio is bounded at this factor from the recent one (start value of METERING).
LARGEST_RATIO_CHANGE = 3.0
# Metered busy time before anything is called implausible, and the memory of the recent ratio.
WARM_UP_SECONDS = 5.0
RATIO_MEMORY_SECONDS = 60.0
IDLE_MEMORY_SECONDS = 60.0
# Clocks and queues settle after work; only then is the draw that of an idle device.
IDLE_AFTER_SECONDS = 1.0
# Steps no window has covered after this time are charged by prediction: the meter is late or gone.
LONGEST_WAIT_SECONDS = 5.0
# One standard deviation, relative: gain of a card's sensor (+-5 %, METERING section 1), and of the split of a window
# over its steps (benchmarks/attribution.py).
GAIN_DEVIATION = 0.03
SPLIT_DEVIATION = 0.05
LARGEST_DEVIATION = 1e9
# Executions in steady decode are one step to a meter up to here: no counter has edges nearer to each other (METERING
# section 1), and what a step costs the scheduler's thread is shared by short ones.
LONGEST_STEP_SECONDS = 0.02


class Activity(StrEnum):
    """State of an engine; idle power is learned for each."""

    AWAKE = "awake"
    SLEEPING = "sleeping"
    # The hook is off, or a batch without requests runs: what the device does is not told.
    UNKNOWN = "unknown"


# Energy in doubt for these reasons is energy all the same: less exact, not somebody else's.
LEARNABLE = frozenset((Doubt.NONE, Doubt.INTEGRATED_POWER))
# At most so many windows of a device wait for a step to close; the energy of older ones is nobody's.
MOST_WAITING = 4096
# What closing the account of a window takes, in steps looked at, where their number is bounded.
WINDOW_IN_STEPS = 16
ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class WindowAccount:
    """How the energy of one window was split. Joules of one device; energy = attributed + idle + unattributed.

    ratio: measured / predicted dynamic energy, None without work or without a measurement. trusted: fit to train on.
    prefill_joules: part of ``predicted_joules``.
    """

    window: MeterWindow
    parts: tuple[StepShare, ...]
    activity: Activity
    busy_seconds: float
    predicted_joules: float
    attributed_joules: float
    idle_joules: float
    unattributed_joules: float
    ratio: float | None
    trusted: bool
    prefill_joules: float


@dataclass(slots=True)
class MeteredTotals:
    """Cumulative joules of all devices since start; metered = attributed + idle + sleeping + unattributed.

    unmetered_windows, unmetered_seconds: of windows whose energy the meter did not know. dropped_windows: that waited
    for a step to close until there were too many; their energy is in unattributed.
    """

    metered_joules: float = 0.0
    attributed_joules: float = 0.0
    idle_joules: float = 0.0
    sleeping_joules: float = 0.0
    unattributed_joules: float = 0.0
    unmetered_seconds: float = 0.0
    windows: int = 0
    doubtful_windows: int = 0
    unmetered_windows: int = 0
    dropped_windows: int = 0


class _Idle:
    """Idle power of one device by activity: a mean that forgets, beginning with the data sheet."""

    def __init__(self, prior_watts: float) -> None:
        self.watts = dict.fromkeys(Activity, prior_watts)
        self.learned = dict.fromkeys(Activity, 0.0)

    def learn(self, activity: Activity, joules: float, seconds: float) -> None:
        known = min(self.learned[activity] + seconds, IDLE_MEMORY_SECONDS)
        self.learned[activity] = known
        self.watts[activity] += (joules / seconds - self.watts[activity]) * min(1.0, seconds / known)


class _Ratio:
    """Measured over predicted energy of the recent past; 1 until something was measured."""

    def __init__(self) -> None:
        self.value = 1.0
        self._measured = self._predicted = self._seconds = 0.0

    def plausible(self, ratio: float) -> float:
        """The ratio, or the nearest that is plausible."""
        if self._seconds < WARM_UP_SECONDS:
            return ratio
        return min(max(ratio, self.value / LARGEST_RATIO_CHANGE), self.value * LARGEST_RATIO_CHANGE)

    def learn(self, measured: float, predicted: float, seconds: float) -> None:
        keep = math.exp(-seconds / RATIO_MEMORY_SECONDS)
        self._measured = keep * self._measured + measured
        self._predicted = keep * self._predicted + predicted
        self._seconds += seconds
        if self._measured > 0.0:
            self.value = self._measured / self._predicted


class Attributor:
    """Splits windows over the steps that ran in them, device by device, on one thread.

    idle_power_watts: of each device by its data sheet. Work is shared equally by the devices: tensor-parallel ranks do
    the same, and a stage of a pipeline differs from the others by its embedding and head alone.
    """

    def __init__(self, idle_power_watts: Sequence[float]) -> None:
        self.totals = MeteredTotals()
        self.recent_ratio = 1.0
        self._idle = [_Idle(watts) for watts in idle_power_watts]
        self._ratios = [_Ratio() for _ in idle_power_watts]
        self._windows: list[deque[MeterWindow]] = [deque() for _ in idle_power_watts]
        self._inside: Inside | None = None  # the window that is being split
        self._frontier = [-math.inf for _ in idle_power_watts]
        self._places = [0 for _ in idle_power_watts]  # from which the next window of a device looks at steps
        self._last_end = self._last_closed = self._given_up = -math.inf
        self._steps: deque[Step] = deque()
        self._first = 0  # place of the first of them among all there ever were
        self._open: deque[Step] = deque()
        self._pace = Pace()
        self._activity = Activity.AWAKE
        self._changes: list[tuple[float, Activity]] = []

    @property
    def devices(self) -> int:
        """Devices of the engine."""
        return len(self._windows)

    def idle_power_watts(self, activity: Activity = Activity.AWAKE) -> float:
        """Idle power of all devices together, learned or by the data sheet."""
        return sum(idle.watts[activity] for idle in self._idle)

    def idle_power_learned(self, activity: Activity) -> bool:
        """Whether every device has taught its idle power."""
        return all(idle.learned[activity] > 0.0 for idle in self._idle)

    @property
    def unsettled_joules(self) -> float:
        """Measured joules of steps that are not settled yet."""
        for step in self._steps:
            step.weigh()
        return sum(step.measured_ratio * step.predicted_joules for step in self._steps)

    # -- steps ----------------------------------------------------------------------------

    def opened(self, step: Step) -> None:
        """A step was scheduled."""
        self._steps.append(step)
        self._open.append(step)

    def repeated(self, step: Step, now_seconds: float) -> bool:
        """A further execution of the last step is scheduled; False where it must be a step of its own."""
        # A window that is being split may lie over it.
        if step.sealed or self._inside is not None or now_seconds - step.scheduled_seconds >= LONGEST_STEP_SECONDS:
            return False
        if not step.open_executions:
            self._open.append(step)
        step.repeat()
        return True

    def closed(self, step: Step, begin_seconds: float, end_seconds: float) -> None:
        """The output of the first open execution of all is back; it is one of this step."""
        step.close(begin_seconds, end_seconds)
        if not step.open_executions:
            self._open.popleft()
        if end_seconds > self._last_closed:
            self._last_closed = end_seconds

    def lost(self, step: Step) -> None:
        """No output will come for the first open execution of all; it is one of this step."""
        # Where it would have begun: steps stay in the order of their begins, in which windows look at them.
        step.lose(max(step.scheduled_seconds, self._last_closed), 1)
        if not step.open_executions:
            self._open.popleft()

    def forget_open(self, now_seconds: float) -> None:
        """No output will come for the steps that are open."""
        for step in self._open:
            step.lose(now_seconds, step.open_executions)
        self._open.clear()

    def switched(self, activity: Activity, now_seconds: float) -> None:
        """The engine falls asleep or wakes up."""
        self._changes.append((now_seconds, activity))

    # -- windows --------------------------------------------------------------------------

    def take(self, window: MeterWindow) -> None:
        """A further window of a device; they come in order. One of a device that is not ours is left out."""
        if not 0 <= window.device < len(self._windows):
            self.totals.doubtful_windows += 1
            return
        queue = self._windows[window.device]
        queue.append(window)
        if len(queue) > MOST_WAITING:
            self._drop(queue.popleft())

    def _drop(self, window: MeterWindow) -> None:
        self.totals.dropped_windows += 1
        self.totals.unmetered_seconds += window.duration_seconds * (window.energy_joules is None)
        self._nobodys(window.energy_joules or 0.0)

    def _nobodys(self, joules: float) -> None:
        self.totals.metered_joules += joules
        self.totals.unattributed_joules += joules

    @property
    def waiting(self) -> int:
        """How many windows are not split."""
        return (self._inside is not None) + sum(map(len, self._windows))

    def accounts(self, most: int = ALL) -> list[WindowAccount]:
        """Split windows all of whose steps are closed, and go on with one begun before, over at most so many steps."""
        found = []
        while most >= WINDOW_IN_STEPS and (inside := self._inside or self._next()) is not None:
            self._inside, before = inside, len(inside.parts)
            done = inside.look(self._steps, self._first, most)
            most -= len(inside.parts) - before + WINDOW_IN_STEPS
            if not done or most < 0:
                break
            self._inside = None
            found.append(self._account(inside))
        return found

    def _next(self) -> Inside | None:
        waits = math.inf
        if self._open:
            # An open step cannot begin before the last one that closed has ended.
            step = self._open[0]
            waits = step.begin_seconds if step.begun else max(step.scheduled_seconds, self._last_closed)
        for device, queue in enumerate(self._windows):
            if queue and queue[0].end_seconds <= waits:
                window = self._without_given_up(queue.popleft())
                # One that comes behind a later one looks at all there are.
                place = self._places[device] if window.begin_seconds >= self._frontier[device] else 0
                return Inside(window, place, self._pace)
        return None

    def settled(self, now_seconds: float, most: int = ALL) -> list[Step]:
        """At most so many steps no further window can touch, in order; what no window covers is left to prediction."""
        found: list[Step] = []
        frontier = min(self._frontier)
        patience = min((now_seconds - LONGEST_WAIT_SECONDS, *(q[0].begin_seconds for q in self._windows if q)))
        reached = max(frontier, patience)
        if self._inside is not None:
            reached = min(frontier, self._inside.window.begin_seconds)  # it may touch any step behind
        while self._steps and len(found) < most:
            step = self._steps[0]
            if step.end_seconds > reached or step.begin_seconds == reached:  # without length, it lies behind the edge
                break
            self._steps.popleft()
            self._first += 1
            step.sealed = True
            step.weigh()
            self._last_end = max(self._last_end, step.end_seconds)
            found.append(step)
            if step.end_seconds > frontier:
                self._given_up = max(self._given_up, step.end_seconds)
        return found

    def _account(self, inside: Inside) -> WindowAccount:
        window, parts, busy = inside.window, inside.parts, inside.busy_seconds
        activity, steady = self._activity_in(window)
        self._frontier[window.device] = max(self._frontier[window.device], window.end_seconds)
        self._places[window.device] = inside.next_place
        predicted = inside.predicted_joules / len(self._windows)
        known = window.energy_joules is not None and window.doubt is not Doubt.SHARED
        joules = window.energy_joules or 0.0
        idle = attributed = 0.0
        ratio = None
        if known and parts:
            gap = max(0.0, window.duration_seconds - busy)
            idle = min(self._idle[window.device].watts[activity] * gap, max(joules, 0.0))
            ratio = (joules - idle) / predicted if predicted > 0.0 else None
        elif known and activity is not Activity.UNKNOWN:
            idle = joules
            self._learn_idle(window, activity, steady)
        believed = True
        if ratio is not None:
            used = self._plausible(window, ratio, predicted, busy)
            believed, attributed = used == ratio, used * predicted
            self._spread(inside, attributed, believed)
        trusted = steady and known and window.doubt in LEARNABLE and believed
        rest = joules - idle - attributed
        prefill = inside.prefill_joules / len(self._windows)
        account = WindowAccount(
            window, tuple(parts), activity, busy, predicted, attributed, idle, rest, ratio, trusted, prefill
        )
        self._book(account)
        return account

    def _plausible(self, window: MeterWindow, ratio: float, predicted: float, busy: float) -> float:
        """The ratio of a window, or the nearest one that the recent past makes plausible, which it moves."""
        ratios = self._ratios[window.device]
        used = ratios.plausible(max(ratio, 0.0))
        if window.doubt in LEARNABLE:
            ratios.learn(used * predicted, predicted, busy)
            self.recent_ratio = sum(ratio.value for ratio in self._ratios) / len(self._ratios)
        return used

    def _without_given_up(self, window: MeterWindow) -> MeterWindow:
        """A late window less the time whose steps were left to prediction: that energy is nobody's by now."""
        late = min(self._given_up, window.end_seconds) - window.begin_seconds
        if late <= 0.0 or window.energy_joules is None:
            return window
        joules = window.energy_joules * late / window.duration_seconds
        self._nobodys(joules)
        return window._replace(
            begin_seconds=window.begin_seconds + late,
            energy_joules=window.energy_joules - joules,
            doubt=Doubt.GAP if window.doubt is Doubt.NONE else window.doubt,
        )

    def _learn_idle(self, window: MeterWindow, activity: Activity, steady: bool) -> None:
        """A window without steps teaches idle power once the device has settled."""
        ends = (step.end_seconds for step in self._steps if step.end_seconds <= window.end_seconds)
        quiet = window.begin_seconds - max(ends, default=self._last_end) >= IDLE_AFTER_SECONDS
        asleep = activity is Activity.SLEEPING and window.doubt is Doubt.SLEEPING
        if steady and quiet and (asleep or window.doubt in LEARNABLE):
            self._idle[window.device].learn(activity, window.energy_joules or 0.0, window.duration_seconds)

    def _spread(self, inside: Inside, joules: float, believed: bool) -> None:
        """Give the steps of a window their part of its dynamic energy; its interval is as wide where it was bounded."""
        window, split = inside.window, inside.split
        relative = window.sigma_joules / window.energy_joules if window.energy_joules else 0.0
        # Bounded: an infinite share of next to nothing is not a number.
        deviation = math.hypot(min(relative, LARGEST_DEVIATION), GAIN_DEVIATION, SPLIT_DEVIATION)
        split.ratio = joules / inside.paced_joules if inside.paced_joules > 0.0 else 0.0
        split.half_width_ratio = NORMAL_90 * deviation if believed else 1.0
        split.covered_ratio = 1.0 / len(self._windows)

    def _book(self, account: WindowAccount) -> None:
        totals = self.totals
        totals.windows += 1
        totals.doubtful_windows += not account.trusted
        totals.unmetered_windows += account.window.energy_joules is None
        totals.unmetered_seconds += account.window.duration_seconds * (account.window.energy_joules is None)
        totals.metered_joules += account.window.energy_joules or 0.0
        totals.attributed_joules += account.attributed_joules
        totals.unattributed_joules += account.unattributed_joules
        if account.activity is Activity.SLEEPING:
            totals.sleeping_joules += account.idle_joules
        else:
            totals.idle_joules += account.idle_joules

    def _activity_in(self, window: MeterWindow) -> tuple[Activity, bool]:
        """(activity in a window, whether it lasts from begin to end). Unknown as soon as it is so for a moment."""
        while self._changes and self._changes[0][0] <= min(self._frontier):
            self._activity = self._changes.pop(0)[1]
        activity, within = self._activity, []
        for at, to in self._changes:
            if at <= window.begin_seconds:
                activity = to
            elif at < window.end_seconds:
                within.append(to)
        if Activity.UNKNOWN in within:
            activity = Activity.UNKNOWN
        return activity, not within and activity is not Activity.UNKNOWN
