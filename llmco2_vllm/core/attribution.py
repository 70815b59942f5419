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
from typing import NamedTuple

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate
from llmco2_vllm.core.metering import Doubt, MeterWindow

# A window whose ratio differs from the recent one by more than this is not believed (start value of METERING).
LARGEST_RATIO_CHANGE = 3.0
# Metered busy time before anything is called implausible, and the memory of the recent ratio.
WARM_UP_SECONDS = 5.0
RATIO_MEMORY_SECONDS = 60.0
IDLE_MEMORY_SECONDS = 60.0
# Clocks and queues settle after work; only then is the draw that of an idle device.
IDLE_AFTER_SECONDS = 1.0
# Steps no window has covered after this time are charged by prediction: the meter is late or gone.
LONGEST_WAIT_SECONDS = 5.0
NORMAL_90 = 1.6449
# One standard deviation, relative: gain of a card's sensor (+-5 %, METERING section 1), and of the split of a window
# over its steps (benchmarks/attribution.py).
GAIN_DEVIATION = 0.03
SPLIT_DEVIATION = 0.05
# A step may be this much slower or faster than predicted, against those around it; beyond, its time is not believed.
LARGEST_PACE_CHANGE = 4.0
PACE_MEMORY_STEPS = 200


class Activity(StrEnum):
    """State of an engine; idle power is learned for each."""

    AWAKE = "awake"
    SLEEPING = "sleeping"


class Step:
    """One step of the schedule, open until its output is back; then what the meters said of it.

    predicted_joules: of all devices, at the rates of ``estimate``, which in steady decode may be that of an earlier
    step (docs/adr/0002), ``later`` steps ago. paid: what single requests were charged in it, for settlement.
    measured_ratio: measured joules per predicted joule, over the part of the step that windows cover.
    half_width_ratio: of the 90 % interval of the same. covered_ratio: 0 to 1.
    pace_ratio: its duration over the predicted one, against the recent past.
    """

    __slots__ = (
        "_later",
        "_shape",
        "begin_seconds",
        "covered_ratio",
        "end_seconds",
        "estimate",
        "half_width_ratio",
        "measured_ratio",
        "pace_ratio",
        "paid",
        "predicted_joules",
        "prefill_joules",
        "scheduled_seconds",
    )

    def __init__(self, scheduled_seconds: float, estimate: Estimate, shape: BatchShape, later: int = 0) -> None:
        self.scheduled_seconds = self.begin_seconds = scheduled_seconds
        self.end_seconds = math.inf
        self.estimate = estimate
        self._shape, self._later = shape, later
        self.prefill_joules = estimate.prefill.joules(shape.prefill)
        per_pair = estimate.decode.per_pair_joules
        decode_joules = estimate.decode.joules(shape.decode) + later * shape.decode.tokens * per_pair
        self.predicted_joules = self.prefill_joules + decode_joules
        self.paid: Sequence[object] = ()
        self.measured_ratio = self.half_width_ratio = self.covered_ratio = 0.0
        self.pace_ratio = 1.0

    @property
    def shape(self) -> BatchShape:
        """What the step computes: in steady decode that of a step before, with one token of context more for each."""
        prefill, decode, encoder_tokens = self._shape
        more = self._later * decode.tokens
        longer = decode._replace(pairs=decode.pairs + more, kv_tokens=decode.kv_tokens + more)
        return BatchShape(prefill, longer, encoder_tokens)

    def share_in(self, begin_seconds: float, end_seconds: float) -> float:
        """Share of the step's time in ``[begin, end)``; a step without length lies where it begins."""
        length = self.end_seconds - self.begin_seconds
        if length <= 0.0:
            return float(begin_seconds <= self.begin_seconds < end_seconds)
        overlap = min(self.end_seconds, end_seconds) - max(self.begin_seconds, begin_seconds)
        return max(0.0, overlap) / length


class StepShare(NamedTuple):
    """A step, and the share of it that lies in a window."""

    step: Step
    share: float


@dataclass(frozen=True, slots=True)
class WindowAccount:
    """How the energy of one window was split. Joules of one device; energy = attributed + idle + unattributed.

    ratio: measured / predicted dynamic energy, None without work or without a measurement. trusted: fit to train on.
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


@dataclass(slots=True)
class MeteredTotals:
    """Cumulative joules of all devices since start; metered = attributed + idle + sleeping + unattributed."""

    metered_joules: float = 0.0
    attributed_joules: float = 0.0
    idle_joules: float = 0.0
    sleeping_joules: float = 0.0
    unattributed_joules: float = 0.0
    unmetered_seconds: float = 0.0
    windows: int = 0
    doubtful_windows: int = 0

    @property
    def residual_joules(self) -> float:
        """What conservation is violated by: rounding."""
        parts = self.attributed_joules + self.idle_joules + self.sleeping_joules + self.unattributed_joules
        return self.metered_joules - parts


class _Idle:
    """Idle power of one device by activity: a mean that forgets, beginning with the data sheet."""

    def __init__(self, prior_watts: float) -> None:
        self.watts = dict.fromkeys(Activity, prior_watts)
        self._learned = dict.fromkeys(Activity, 0.0)

    def learn(self, activity: Activity, joules: float, seconds: float) -> None:
        known = min(self._learned[activity] + seconds, IDLE_MEMORY_SECONDS)
        self._learned[activity] = known
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
        self._idle = [_Idle(watts) for watts in idle_power_watts]
        self._ratios = [_Ratio() for _ in idle_power_watts]
        self._windows: list[deque[MeterWindow]] = [deque() for _ in idle_power_watts]
        self._frontier = [-math.inf for _ in idle_power_watts]
        self._last_end = -math.inf
        self._steps: deque[Step] = deque()
        self._open: deque[Step] = deque()
        self._pace = 0.0  # of the recent past: duration over predicted duration, 0 before any
        self._activity = Activity.AWAKE
        self._changes: list[tuple[float, Activity]] = []

    @property
    def recent_ratio(self) -> float:
        """Measured over predicted energy of the recent past, mean of the devices; 1 while unknown."""
        return sum(ratio.value for ratio in self._ratios) / len(self._ratios)

    def idle_power_watts(self, activity: Activity = Activity.AWAKE) -> float:
        """Learned idle power of all devices together."""
        return sum(idle.watts[activity] for idle in self._idle)

    # -- steps ----------------------------------------------------------------------------

    def opened(self, step: Step) -> None:
        """A step was scheduled."""
        self._steps.append(step)
        self._open.append(step)

    def closed(self, step: Step, begin_seconds: float, end_seconds: float) -> None:
        """Its output is back: it occupied ``[begin, end)``. Steps scheduled before it and still open were lost."""
        while self._open:
            first = self._open.popleft()
            if first is step:
                break
            first.begin_seconds = first.end_seconds = begin_seconds
        step.begin_seconds, step.end_seconds = begin_seconds, end_seconds
        predicted = step.estimate.duration_seconds
        if end_seconds > begin_seconds and predicted > 0.0:
            pace = (end_seconds - begin_seconds) / predicted
            self._pace = self._pace or pace
            relative = min(max(pace / self._pace, 1.0 / LARGEST_PACE_CHANGE), LARGEST_PACE_CHANGE)
            self._pace *= relative ** (1.0 / PACE_MEMORY_STEPS)
            step.pace_ratio = relative

    def forget_open(self, now_seconds: float) -> None:
        """No output will come for the steps that are open."""
        for step in self._open:
            step.begin_seconds = step.end_seconds = now_seconds
        self._open.clear()

    def switched(self, activity: Activity, now_seconds: float) -> None:
        """The engine falls asleep or wakes up."""
        self._changes.append((now_seconds, activity))

    # -- windows --------------------------------------------------------------------------

    def take(self, window: MeterWindow) -> None:
        """A further window of a device; they come in order."""
        self._windows[window.device].append(window)

    def accounts(self) -> list[WindowAccount]:
        """Split every window all of whose steps are closed."""
        found = []
        for queue in self._windows:
            while queue and not (self._open and self._open[0].scheduled_seconds < queue[0].end_seconds):
                found.append(self._account(queue.popleft()))
        return found

    def settled(self, now_seconds: float) -> list[Step]:
        """Steps no further window can touch, in order; what no window covers is left to prediction."""
        reached = max(min(self._frontier), now_seconds - LONGEST_WAIT_SECONDS)
        found = []
        while self._steps and self._steps[0].end_seconds <= reached:
            step = self._steps.popleft()
            self._last_end = max(self._last_end, step.end_seconds)
            found.append(step)
        return found

    def _account(self, window: MeterWindow) -> WindowAccount:
        activity, steady = self._activity_in(window)
        self._frontier[window.device] = window.end_seconds
        parts = tuple(self._parts(window))
        busy = sum(part.share * (part.step.end_seconds - part.step.begin_seconds) for part in parts)
        predicted = sum(part.share * part.step.predicted_joules for part in parts) / len(self._windows)
        if window.energy_joules is None:
            self.totals.unmetered_seconds += window.duration_seconds
            self.totals.doubtful_windows += 1
            return WindowAccount(window, parts, activity, busy, predicted, 0.0, 0.0, 0.0, None, False)
        idle = self._between(window, busy, activity) if parts else self._without_steps(window, activity, steady)
        dynamic = window.energy_joules - idle
        ratio = dynamic / predicted if predicted > 0.0 else None
        used = 0.0 if ratio is None else self._ratios[window.device].plausible(max(ratio, 0.0))
        trusted = steady and window.doubt is Doubt.NONE and ratio in (None, used)
        if ratio is not None and window.doubt is Doubt.NONE:
            self._ratios[window.device].learn(used * predicted, predicted, busy)
        attributed = used * predicted
        self._spread(window, parts, attributed)
        account = WindowAccount(
            window, parts, activity, busy, predicted, attributed, idle, dynamic - attributed, ratio, trusted
        )
        self._book(account)
        return account

    def _parts(self, window: MeterWindow) -> list[StepShare]:
        found = []
        begin, end = window.begin_seconds, window.end_seconds
        for step in self._steps:
            first, last = step.begin_seconds, step.end_seconds
            if first >= end:
                break
            share = 1.0 if begin <= first < last <= end else step.share_in(begin, end)
            if share > 0.0:
                found.append(StepShare(step, share))
        return found

    def _between(self, window: MeterWindow, busy: float, activity: Activity) -> float:
        """Idle energy of the gaps in a window with steps."""
        gap = max(0.0, window.duration_seconds - busy)
        return min(self._idle[window.device].watts[activity] * gap, max(window.energy_joules or 0.0, 0.0))

    def _without_steps(self, window: MeterWindow, activity: Activity, steady: bool) -> float:
        """A window without steps is idle entirely, and teaches idle power once the device has settled."""
        joules = window.energy_joules or 0.0
        ends = (step.end_seconds for step in self._steps if step.end_seconds <= window.end_seconds)
        quiet = window.begin_seconds - max(ends, default=self._last_end) >= IDLE_AFTER_SECONDS
        if steady and quiet and window.doubt is Doubt.NONE:
            self._idle[window.device].learn(activity, joules, window.duration_seconds)
        return joules

    def _spread(self, window: MeterWindow, parts: Sequence[StepShare], joules: float) -> None:
        """Give the steps of a window their part of its dynamic energy."""
        relative = window.sigma_joules / window.energy_joules if window.energy_joules else 0.0
        deviation = math.sqrt(relative * relative + GAIN_DEVIATION**2 + SPLIT_DEVIATION**2)
        weight = sum(share * step.predicted_joules * step.pace_ratio for step, share in parts)
        ratio = joules / weight if weight > 0.0 else 0.0
        for step, share in parts:
            part = ratio * share * step.pace_ratio
            step.measured_ratio += part
            step.half_width_ratio += NORMAL_90 * deviation * part
            step.covered_ratio += share / len(self._windows)

    def _book(self, account: WindowAccount) -> None:
        totals = self.totals
        totals.windows += 1
        totals.doubtful_windows += not account.trusted
        totals.metered_joules += account.window.energy_joules or 0.0
        totals.attributed_joules += account.attributed_joules
        totals.unattributed_joules += account.unattributed_joules
        if account.activity is Activity.SLEEPING:
            totals.sleeping_joules += account.idle_joules
        else:
            totals.idle_joules += account.idle_joules

    def _activity_in(self, window: MeterWindow) -> tuple[Activity, bool]:
        """(activity at the begin of a window, whether it lasts to its end)."""
        while self._changes and self._changes[0][0] <= min(self._frontier):
            self._activity = self._changes.pop(0)[1]
        activity = self._activity
        for at, to in self._changes:
            if at <= window.begin_seconds:
                activity = to
        return activity, not any(window.begin_seconds < at < window.end_seconds for at, _ in self._changes)
