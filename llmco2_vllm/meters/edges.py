"""When to look at a counter, and when it ticked: the pace of one device (METERING sections 3 and 4).

A counter publishes at ``t_k = a + k T``. A look that finds a new value knows the edge only as a bracket
``(last look with the old value, this look]``. T is learnt from the first edges; then the reader sleeps
until shortly before the next wanted edge and looks every ``h``.
"""

from __future__ import annotations

from collections import deque
from math import ceil, floor, inf, sqrt
from typing import NamedTuple

import numpy as np

POLL_SECONDS = 0.002
WINDOW_SECONDS = 0.1
CALLS_PER_SECOND = 50
COARSE_SECONDS = 1.0 / CALLS_PER_SECOND
# Below this the coarse looks cannot tell the ticks apart, and a burst of fine ones has to.
FINE_BELOW_SECONDS = 0.035
BURST_CALLS = 40
LEARNING_EDGES = 8
LINE_EDGES = 64
# After so many edges the period is searched anew, this share of it up and down.
SEARCHES = (8, 12, 16, 24, 32)
SEARCH_RANGE = 0.12
MISFITS = 8
MISFIT_EDGES = 16


class CallLimit:
    """At most ``CALLS_PER_SECOND`` calls in any second, whatever asks for them."""

    def __init__(self, calls: int = CALLS_PER_SECOND) -> None:
        self._times: deque[float] = deque(maxlen=calls)

    def note(self, now: float) -> None:
        """A call was made."""
        self._times.append(now)

    @property
    def free_at(self) -> float:
        """The earliest time of the next call."""
        times = self._times
        return times[0] + 1.0 if len(times) == times.maxlen else -inf


class Edge(NamedTuple):
    """When a counter changed, and the standard deviation of that time."""

    time_seconds: float
    sigma_seconds: float


class _Bracket(NamedTuple):
    tick: int
    low: float
    high: float


def tick_of(times: list[float], resolution_seconds: float) -> float:
    """Period in seconds of ascending times at its multiples, some missing, each somewhat late. At least two times.

    Of the periods that divide the span, the one whose multiples the times miss by the least share of a period, where a
    shorter period, which few times fit by chance, has to fit the better; none shorter than what the looks resolve,
    unless the times themselves are closer.
    """
    span = times[-1] - times[0]
    fewest = len(times) - 1
    ticks = np.arange(fewest, max(fewest, min(4 * fewest, int(span / resolution_seconds))) + 1)
    phases = np.exp(2j * np.pi * np.outer(ticks, (np.array(times) - times[0]) / span))
    centres = phases.mean(axis=1, keepdims=True)
    shares = np.angle(phases * centres.conj()).std(axis=1) if fewest > 1 else ticks
    return float(span / ticks[np.argmin(shares * np.sqrt(ticks))])


class TickLine:
    """Edge times as a line over the tick index. Looks are late, never early: its lower envelope is the line."""

    def __init__(self, tick_seconds: float, bracket: tuple[float, float]) -> None:
        self.tick_seconds = tick_seconds
        self._brackets: deque[_Bracket] = deque([_Bracket(0, *bracket)], maxlen=LINE_EDGES)
        self._offset = bracket[1]
        self._late: deque[float] = deque(maxlen=LINE_EDGES)
        self._misfits = 0
        self._added = self._tight = 0
        self.jitter_seconds: float | None = None  # standard deviation of how late this reader saw the edges

    @property
    def lost(self) -> bool:
        """Most edges lie off the line, or all over the period: it was learnt wrongly, or the device changed it."""
        spread = len(self._late) >= MISFIT_EDGES and (self.jitter_seconds or 0.0) > 0.22 * self.tick_seconds
        return spread or self._misfits > MISFITS

    def at(self, ticks: int) -> float:
        """Time of the edge ``ticks`` after the last one seen."""
        return self._offset + (self._brackets[-1].tick + ticks) * self.tick_seconds

    def add(self, low: float, high: float) -> Edge:
        """An edge somewhere in ``(low, high]``."""
        if high - low <= self.tick_seconds / 2:
            self._take(low, high)
            line = self.at(0)
        else:  # says less than the line does: the last tick before the look
            line = self.at(floor((high - self.at(0)) / self.tick_seconds + 0.1))
        edge = min(max(line, low), high)
        misfit = abs(edge - line) > POLL_SECONDS
        self._misfits = self._misfits + 1 if misfit else max(0, self._misfits - 1)
        self._late.append(high - edge)
        width, jitter = high - low, self.jitter_seconds or inf
        if self._tight >= 4 and not misfit and jitter < 0.1 * self.tick_seconds:  # the line knows better than the look
            width = min(width, max(POLL_SECONDS, jitter))
        return Edge(edge, width / sqrt(12))

    def _take(self, low: float, high: float) -> None:
        """Put an edge on its tick, and the line through all of them."""
        ahead = ((low + high) / 2 - self.at(0)) / self.tick_seconds
        self._brackets.append(_Bracket(self._brackets[-1].tick + max(1, round(ahead)), low, high))
        self._added += 1
        if self._added in SEARCHES:
            self._search()
        if len(self._brackets) >= 4 and (self._added < LINE_EDGES or self._added % 16 == 0):
            self._fit()

    def _search(self) -> None:
        """T and the tick of each edge anew: the period that the edges keep step with best; wide brackets count less.

        An edge put to the wrong tick bends the line towards more such; this looks at all of them without a line.
        """
        low, high = (np.array([getattr(b, end) for b in self._brackets]) for end in ("low", "high"))
        middle, weight = (low + high) / 2, (high - low) ** -2.0
        origin, span = middle[-1], middle[-1] - middle[0]
        step = 0.1 * self.tick_seconds / span
        periods = self.tick_seconds * (1 + np.arange(-SEARCH_RANGE, SEARCH_RANGE + step, step))
        sums = np.exp(2j * np.pi * np.outer(1 / periods, middle - origin)) @ weight
        best = np.argmax(np.abs(sums))
        self.tick_seconds = float(periods[best])
        ahead = np.angle(sums[best]) / (2 * np.pi)
        ticks = np.round((middle - origin) / self.tick_seconds - ahead).astype(int)
        ends = zip(ticks - ticks[0], low, high, strict=True)
        self._brackets = deque([_Bracket(int(t), float(a), float(b)) for t, a, b in ends], maxlen=LINE_EDGES)

    def _fit(self) -> None:
        ticks, low, high = (np.array(column) for column in zip(*self._brackets, strict=True))
        tight = high - low <= 2 * POLL_SECONDS
        self._tight = int(tight.sum())
        if self._tight >= 4:  # edges that were caught; the others were only seen afterwards
            ticks, times, weights = ticks[tight], high[tight], np.ones(self._tight)
        else:
            times, weights = (low + high) / 2, (high - low) ** -2.0
        centred = ticks - np.average(ticks, weights=weights)
        self.tick_seconds = float((weights * centred * times).sum() / (weights * centred * centred).sum())
        late = times - ticks * self.tick_seconds
        self._offset = float(late.min() if self._tight >= 4 else np.average(late, weights=weights))
        if len(self._late) >= LEARNING_EDGES:
            self.jitter_seconds = float(np.std(self._late))


class Pace:
    """Decides when to look next and times the edges. One per device; driven by :meth:`saw`.

    ``stride``: ticks from one wanted edge to the next, so that windows last at least ``window_seconds``.
    """

    def __init__(self, tick_seconds: float | None = None, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window = window_seconds
        self._known_tick = tick_seconds
        self.line: TickLine | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was learnt: the counter started anew."""
        self.line = None
        self._phase = "coarse" if self._known_tick is None else "steady"
        self._steady_tick = self._known_tick
        self._low = -inf
        self._seen: list[tuple[float, float]] = []
        self._burst_calls = 0
        self._lead = 2 * POLL_SECONDS
        self._looks = self._misses = 0
        self._expected = -inf
        self.due = -inf

    @property
    def tick_seconds(self) -> float | None:
        """Publication period as far as it is learnt; an upper bound when the counter ticks at every look."""
        return self.line.tick_seconds if self.line else self._steady_tick

    @property
    def stride(self) -> int:
        """Ticks between wanted edges: a tick a little short of the window is long enough."""
        return max(1, ceil(self._window / self.line.tick_seconds - 0.05)) if self.line else 1

    def saw(self, now: float, changed: bool) -> Edge | None:
        """A look at ``now`` found a new value or not. Returns the edge, and sets ``due`` for the next look."""
        low, self._low = self._low, now
        if low == -inf:  # the first value says nothing about edges
            self.due = now + {"coarse": COARSE_SECONDS, "burst": POLL_SECONDS}.get(self._phase, self._window)
            return None
        if self._phase == "steady":
            self.due = now + self._window
            return Edge(now, (self._steady_tick or now - low) / sqrt(12)) if changed else None
        if self._phase == "track":
            return self._track(low, now, changed)
        found = changed and now - low <= 3 * COARSE_SECONDS  # after a pause it may be any of several ticks
        if found:
            self._seen.append((low, now))
        self._learn(now)
        return Edge((low + now) / 2, (now - low) / sqrt(12)) if found else None

    def _learn(self, now: float) -> None:
        self.due = now + (COARSE_SECONDS if self._phase == "coarse" else POLL_SECONDS)
        if self._phase == "coarse" and len(self._seen) >= LEARNING_EDGES + 1:
            if self._learnt_tick() >= FINE_BELOW_SECONDS:
                self._follow(now)
            else:
                self._phase, self._seen, self._burst_calls = "burst", [], 0
                self.due = now + BURST_CALLS / CALLS_PER_SECOND  # the calls of the burst, saved up
                self._low = -inf
        elif self._phase == "burst":
            self._burst_calls += 1
            if self._burst_calls >= BURST_CALLS:
                self._end_burst(now)

    def _learnt_tick(self) -> float:
        return tick_of([high for _, high in self._seen], float(np.mean([high - low for low, high in self._seen])))

    def _end_burst(self, now: float) -> None:
        edges = len(self._seen)
        if edges >= 0.9 * (BURST_CALLS - 1):
            self._phase, self._steady_tick = "steady", POLL_SECONDS
            self.due = now + self._window
        elif edges >= 2:
            self._follow(now)
        else:
            self.restart()

    def _follow(self, now: float) -> None:
        tick = self._learnt_tick()
        self.line = TickLine(tick, self._seen[0])
        for low, high in self._seen[1:]:
            self.line.add(low, high)
        width = float(np.mean([high - low for low, high in self._seen]))
        self._lead = min(max(2 * POLL_SECONDS, 2 * width / sqrt(len(self._seen))), tick / 2)
        self._phase, self._seen = "track", []
        self._aim(now)

    def _aim(self, now: float) -> None:
        assert self.line is not None
        self._looks = 0
        ticks = self.stride
        while (due := self.line.at(ticks) - self._lead) <= now:
            ticks += 1
        self.due, self._expected = due, self.line.at(ticks)

    def _track(self, low: float, now: float, changed: bool) -> Edge | None:
        line = self.line
        assert line is not None
        self._looks += 1
        if self._looks == 1 and self.stride > 1:  # ticks that were passed over show up here
            self.due = now + POLL_SECONDS
            return None
        if not changed:
            self._wait(now)
            return None
        low = max(low, now - line.tick_seconds)  # the latest tick is no older
        if self._looks == 1:  # it was there before us: look earlier
            self._lead = min(2 * self._lead, line.tick_seconds / 2)
        else:
            self._lead = max(2 * POLL_SECONDS, 0.8 * self._lead)
        edge, self._misses = line.add(low, now), 0
        if line.lost:
            self.restart()
            self.due = now + COARSE_SECONDS
        else:
            self._aim(now)
        return edge

    def _wait(self, now: float) -> None:
        assert self.line is not None
        overdue = now - self._expected
        if overdue > 2 * POLL_SECONDS and self.stride > 1:  # it passed before the first look
            self._lead = min(2 * self._lead, self.line.tick_seconds / 2)
            self._misses += 1
            if self._misses > MISFITS:
                self.restart()
                self.due = now + COARSE_SECONDS
            else:
                self._aim(now)
        else:
            self.due = now + (POLL_SECONDS if overdue < self.line.tick_seconds else COARSE_SECONDS)
