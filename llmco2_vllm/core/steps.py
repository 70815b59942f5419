"""Executed steps: what each was predicted to take, when it ran, and what meters said of it."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate
from llmco2_vllm.core.metering import MeterWindow


class Split:
    """What one window gives the steps in it; nothing until all of them are known, and then to all at once.

    ratio: joules per joule predicted at the pace of the step. half_width_ratio: of the 90 % interval, relative.
    covered_ratio: how much of the energy of what lies in the window it accounts for, one over the devices.
    """

    __slots__ = ("covered_ratio", "half_width_ratio", "ratio")

    def __init__(self) -> None:
        self.ratio = self.half_width_ratio = self.covered_ratio = 0.0


# A step may be this much slower or faster than predicted, against those around it; beyond, its time is not believed.
LARGEST_PACE_CHANGE = 4.0
PACE_MEMORY_STEPS = 200


class Pace:
    """Duration over predicted duration of the recent past."""

    __slots__ = ("_ratio",)

    def __init__(self) -> None:
        self._ratio = 0.0  # 0 before any step

    def of(self, step: Step) -> float:
        """That of a step against the recent past, which it moves; 1 where it has no time."""
        executions = step.executions
        predicted = executions * step.estimate.duration_seconds
        if step.busy_seconds <= 0.0 or predicted <= 0.0:
            return 1.0
        ratio = step.busy_seconds / predicted
        self._ratio = self._ratio or ratio
        relative = min(max(ratio / self._ratio, 1.0 / LARGEST_PACE_CHANGE), LARGEST_PACE_CHANGE)
        self._ratio *= relative ** (executions / PACE_MEMORY_STEPS)
        return relative


class Mark:
    """The moment behind a step, kept by whoever joins or leaves there or pays by itself in it.

    All but recomputed_joules is nothing until the step is settled.
    ratios: value (measured, and predicted times the recent ratio where no window was), estimated part of it and half
    width of its 90 % interval, each per joule the step was predicted to take. recomputed_joules: predicted, of tokens
    computed again in it. sums: running sums over so many settled ``steps``, for each of these quantities and for what
    was predicted those of a + b * step and of b, as in ``ledgers.DecodeSums``; None until then.
    """

    __slots__ = ("ratios", "recomputed_joules", "steps", "sums")

    def __init__(self) -> None:
        self.ratios = (0.0, 0.0, 0.0)
        self.recomputed_joules = 0.0
        self.steps = 0
        self.sums: tuple[float, float, float, float, float, float, float, float] | None = None


class Step:
    """One step of the schedule, open until its output is back; then what the meters said of it.

    In steady decode it may stand for several executions that follow each other, as ``repeat`` adds them: a meter sees
    them as one, and so does every request in them. executions: how many; open_executions: whose output is not back.
    sealed: no further one may be added. busy_seconds: of those whose output is back, which begin at ``begin_seconds``
    and end at ``end_seconds``, infinite while one is open.
    predicted_joules: of all devices, at the rates of ``estimate``, which in steady decode may be that of an earlier
    step (docs/adr/0002), ``later`` steps ago. mark: that of the moment behind it, where somebody needs one.
    measured_ratio: measured joules per predicted joule, over the part of the step that windows cover.
    half_width_ratio: of the 90 % interval of the same. covered_ratio: 0 to 1. All three by ``weigh``.
    pace_ratio: its duration over the predicted one, against the recent past; known once it is sealed.
    splits: of the windows it lies in, with the share of it that does.
    """

    __slots__ = (
        "_closed",
        "_growth_joules",
        "_last_seconds",
        "_later",
        "_next_joules",
        "_shape",
        "begin_seconds",
        "busy_seconds",
        "covered_ratio",
        "end_seconds",
        "estimate",
        "executions",
        "half_width_ratio",
        "lost",
        "mark",
        "measured_ratio",
        "open_executions",
        "pace_ratio",
        "predicted_joules",
        "prefill_joules",
        "scheduled_seconds",
        "sealed",
        "splits",
    )

    def __init__(self, scheduled_seconds: float, estimate: Estimate, shape: BatchShape, later: int = 0) -> None:
        self.scheduled_seconds = self.begin_seconds = scheduled_seconds
        self.end_seconds = math.inf
        self.busy_seconds = 0.0
        self.executions = self.open_executions = 1
        self._closed, self._last_seconds = 0, scheduled_seconds
        self.estimate = estimate
        self._shape, self._later = shape, later
        # Written out: this is behind every scheduler step.
        prefill, (_, tokens, pairs, _, samples), _ = shape
        per_token, per_pair, per_sample = estimate.decode
        self._growth_joules = growth = tokens * per_pair
        decode_joules = tokens * per_token + pairs * per_pair + samples * per_sample + later * growth
        self._next_joules = decode_joules + growth
        self.prefill_joules = estimate.prefill.joules(prefill) if prefill[1] else 0.0
        self.predicted_joules = self.prefill_joules + decode_joules
        self.mark: Mark | None = None
        self.splits: tuple[tuple[Split, float], ...] = ()
        self.measured_ratio = self.half_width_ratio = self.covered_ratio = 0.0
        self.pace_ratio = 1.0
        self.lost = self.sealed = False

    def repeat(self) -> None:
        """The same requests decode one token more each."""
        self.executions += 1
        self.open_executions += 1
        self.end_seconds = math.inf
        self.predicted_joules += self._next_joules
        self._next_joules += self._growth_joules

    def close(self, begin_seconds: float, end_seconds: float) -> None:
        """The output of its first open execution is back: that one occupied ``[begin, end)``."""
        if not self._closed:
            self.begin_seconds = begin_seconds
        self._closed += 1
        self._last_seconds = end_seconds
        self.busy_seconds += end_seconds - begin_seconds
        self.open_executions -= 1
        if not self.open_executions:
            self.end_seconds = end_seconds

    @property
    def begun(self) -> bool:
        """Whether it is known when its first execution began."""
        return self._closed > 0

    def lose(self, now_seconds: float, executions: int) -> None:
        """No output will come for so many of those that are open.

        They are paid with the others; where there is none, when it ran is not known, so no window pays for it.
        """
        self.sealed = True
        self.open_executions -= executions
        if not self.open_executions:
            self.end_seconds = self._last_seconds
            if not self._closed:
                self.begin_seconds = self.end_seconds = now_seconds
                self.lost = True

    def weigh(self) -> None:
        """Add up what the windows said so far."""
        measured = half_width = covered = 0.0
        pace = self.pace_ratio
        for split, share in self.splits:
            part = split.ratio * share * pace
            measured += part
            half_width += split.half_width_ratio * part
            covered += split.covered_ratio * share
        # Shares add up to one but for rounding.
        self.measured_ratio, self.half_width_ratio, self.covered_ratio = measured, half_width, min(covered, 1.0)

    def shape(self, execution: int = 0) -> BatchShape:
        """What an execution computes: in steady decode that of one before, with one token of context more for each."""
        prefill, decode, encoder_tokens = self._shape
        more = (self._later + execution) * decode.tokens
        longer = decode._replace(pairs=decode.pairs + more, kv_tokens=decode.kv_tokens + more)
        return BatchShape(prefill, longer, encoder_tokens)

    def joules(self, execution: int = 0) -> float:
        """Predicted joules of an execution."""
        return self._next_joules - (self.executions - execution) * self._growth_joules + self.prefill_joules

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


class Inside:
    """The steps in a window, found a few at a time so that no scheduler step waits for hundreds.

    parts: those found. busy_seconds, predicted_joules of all devices, the part of it that is prefill, and all of it at
    their pace: sums over them, each step by its share. The split is theirs.
    Places count all steps there ever were.
    """

    __slots__ = (
        "_behind",
        "_pace",
        "_place",
        "busy_seconds",
        "paced_joules",
        "parts",
        "predicted_joules",
        "prefill_joules",
        "split",
        "window",
    )

    def __init__(self, window: MeterWindow, place: int, pace: Pace) -> None:
        """pace: of the steps before ``place``, and of these from now on."""
        self.window = window
        self.split = Split()
        self.parts: list[StepShare] = []
        self.busy_seconds = self.predicted_joules = self.prefill_joules = self.paced_joules = 0.0
        self._place, self._pace = place, pace
        self._behind: int | None = None

    def look(self, steps: deque[Step], first: int, most: int) -> bool:
        """Go on over at most so many steps, in their order; whether that was all. first: place of the first of them."""
        _, begin, end, *_ = self.window
        begun = max(self._place - first, 0)
        stop = min(begun + most, len(steps))
        for place in range(begun, stop):
            step = steps[place]
            if step.end_seconds >= end and self._behind is None:
                self._behind = first + place
            if step.begin_seconds >= end:
                self._place = first + place
                return True
            self._take(step, begin, end)
        self._place = first + stop
        return stop == len(steps)

    def _take(self, step: Step, begin: float, end: float) -> None:
        if not step.sealed:
            if step.open_executions:
                return  # scheduled before the window's end; it begins behind it
            step.sealed = True
            step.pace_ratio = self._pace.of(step)
        if begin <= step.begin_seconds < step.end_seconds <= end:
            share = 1.0
        elif step.lost or not (share := step.share_in(begin, end)):
            return
        joules = share * step.predicted_joules
        self.parts.append(StepShare(step, share))
        self.busy_seconds += share * step.busy_seconds
        self.predicted_joules += joules
        self.prefill_joules += share * step.prefill_joules
        self.paced_joules += joules * step.pace_ratio
        step.splits += ((self.split, share),)

    @property
    def next_place(self) -> int:
        """Where the next window of the device begins to look."""
        return self._place if self._behind is None else self._behind
