"""What the engine did meanwhile, told by the scheduler thread; and how late a counter shows it."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import median
from typing import NamedTuple

HISTORY = 512
IDLE_BEFORE_SECONDS = 1.0
# A transition tells the lag from the energy of the second after it; power settles in the latter half.
SETTLED_SECONDS = 0.6
FOLLOWED_SECONDS = 1.2
TRANSITIONS = 3
MOST_TRANSITIONS = 9
RISE_RATIO = 1.5


class Transition(NamedTuple):
    """From ``time_seconds`` on the engine is busy or idle, asleep or awake."""

    time_seconds: float
    busy: bool
    asleep: bool = False


class EngineActivity:
    """Transitions of one engine. The scheduler thread appends, sampler threads read; there is no lock.

    Appending to a deque and copying it are single operations of the interpreter.
    """

    def __init__(self) -> None:
        self._transitions: deque[Transition] = deque(maxlen=HISTORY)

    def busy(self, time_seconds: float) -> None:
        """Steps run from now on. For the scheduler thread; say it once per transition."""
        self._transitions.append(Transition(time_seconds, True))

    def idle(self, time_seconds: float) -> None:
        """No step runs from now on."""
        self._transitions.append(Transition(time_seconds, False))

    def sleep(self, time_seconds: float) -> None:
        """The engine gave its memory back (vLLM's sleep mode); ended by the next transition."""
        self._transitions.append(Transition(time_seconds, False, True))

    def transitions(self) -> list[Transition]:
        """All that are remembered, in order."""
        return list(self._transitions)

    def within(self, begin_seconds: float, end_seconds: float) -> list[Transition]:
        """The states of a span: the one it begins with, when known, and those that begin in it."""
        found: list[Transition] = []
        for transition in reversed(self.transitions()):
            if transition.time_seconds < end_seconds:
                found.append(transition)
                if transition.time_seconds <= begin_seconds:
                    break
        return found[::-1]

    def is_busy(self, begin_seconds: float, end_seconds: float) -> bool | None:
        """True or False when so all the time, None when it changed or is not known."""
        states = self.within(begin_seconds, end_seconds)
        if not states or states[0].time_seconds > begin_seconds or len({state.busy for state in states}) > 1:
            return None
        return states[0].busy

    def slept(self, begin_seconds: float, end_seconds: float) -> bool:
        """Whether the engine was asleep at any time of the span."""
        return any(state.asleep for state in self.within(begin_seconds, end_seconds))


class LagLearner:
    """How much later than the engine a counter shows a rise of power, from the first rises out of idleness.

    With powers p before and q after, the energy E between edges around a rise at t places it, as the counter
    sees it, at ``end - (E - p (end - begin)) / (q - p)``; the lag is what that is later than t.
    """

    def __init__(self, activity: EngineActivity) -> None:
        self._activity = activity
        self._edges: deque[tuple[float, float]] = deque(maxlen=64)
        self._found: list[float] = []
        self._done_until = float("-inf")

    @property
    def lag_seconds(self) -> float | None:
        """Median of the transitions seen, None while they are few. Fixed once they are many."""
        return max(0.0, median(self._found)) if len(self._found) >= TRANSITIONS else None

    def forget_edges(self) -> None:
        """The counter started anew."""
        self._edges.clear()

    def edge(self, time_seconds: float, energy_joules: float) -> None:
        """An edge with the counter's value; looks whether it completes a rise."""
        self._edges.append((time_seconds, energy_joules))
        if len(self._found) >= MOST_TRANSITIONS:
            return
        recent = self._activity.within(time_seconds - 3 * FOLLOWED_SECONDS, time_seconds - FOLLOWED_SECONDS)
        for before, rise in pairwise(recent):
            begin = rise.time_seconds
            if not rise.busy or before.busy or begin <= self._done_until:
                continue
            self._done_until = begin
            if begin - before.time_seconds >= IDLE_BEFORE_SECONDS and self._activity.is_busy(begin, time_seconds):
                self._place(begin)

    def _place(self, rise: float) -> None:
        calm = [edge for edge in self._edges if rise - IDLE_BEFORE_SECONDS <= edge[0] <= rise]
        settled = [edge for edge in self._edges if edge[0] >= rise + SETTLED_SECONDS]
        if len(calm) < 2 or len(settled) < 2:
            return
        low, high = _power(calm[0], calm[-1]), _power(settled[0], settled[-1])
        if high < RISE_RATIO * low:
            return
        (begin, before), (end, after) = calm[-1], settled[0]
        seen = end - (after - before - low * (end - begin)) / (high - low)
        if abs(seen - rise) <= SETTLED_SECONDS:
            self._found.append(seen - rise)


def _power(first: tuple[float, float], last: tuple[float, float]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])
