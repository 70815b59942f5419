"""Windows on their way from the thread that reads meters to the one that splits their energy."""

from __future__ import annotations

import threading
from collections import Counter, deque
from itertools import accumulate, pairwise
from math import hypot

from llmco2_vllm.core.metering import Doubt, MeterWindow

# An hour of windows of one device. An engine that nobody asks and that has no work takes none for as long as it idles.
CAPACITY = 36_000
# Energy as good as that of a counter, but its window is no longer one from edge to edge.
_BLURRED = frozenset((Doubt.NONE, Doubt.INTEGRATED_POWER))


class WindowQueue(deque[MeterWindow]):
    """A deque of one appending and one taking thread. It is bounded, and loses neither energy nor time.

    When it is full the oldest windows of a device are joined to a few: one for each doubt, one for what was not
    metered, in the order in which these first came. They tile the time of what went into them, with all its joules.
    ``overflowed``: windows that have gone into others, by device.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.overflowed: Counter[int] = Counter()
        self._capacity = capacity
        # By device: where its joined windows end, and these by kind, each of a true length at a time that is not.
        self._joined: dict[int, tuple[float, dict[tuple[bool, Doubt], MeterWindow]]] = {}
        self._ready: deque[MeterWindow] = deque()
        self._lock = threading.Lock()  # never taken on the way in unless it is full

    def append(self, window: MeterWindow, /) -> None:
        """For the reading thread. Neither waits nor fails."""
        if len(self) >= self._capacity:
            with self._lock:
                if len(self) >= self._capacity:
                    self._join(super().popleft())
        super().append(window)

    def popleft(self) -> MeterWindow:
        """The oldest window, for the taking thread; those of a device come in order. Raises IndexError when empty."""
        with self._lock:
            while not self._ready and self._joined:
                self._ready.extend(_tiled(*self._joined.popitem()[1]))
            # While any are ready the deque is not empty either: who asks whether it is need not know of them.
            return self._ready.popleft() if self._ready else super().popleft()

    def _join(self, window: MeterWindow) -> None:
        self.overflowed[window.device] += 1
        doubt = Doubt.OVERFLOWED if window.doubt in _BLURRED else window.doubt
        kind = (window.energy_joules is None, doubt)
        _, pieces = self._joined.get(window.device, (0.0, {}))
        piece = pieces.get(kind)
        pieces[kind] = window._replace(doubt=doubt) if piece is None else _sum(piece, window)
        self._joined[window.device] = window.end_seconds, pieces


def _sum(piece: MeterWindow, window: MeterWindow) -> MeterWindow:
    """A window as long as both, with the energy of both."""
    return piece._replace(
        end_seconds=piece.end_seconds + window.duration_seconds,
        energy_joules=None if piece.energy_joules is None else piece.energy_joules + (window.energy_joules or 0.0),
        sigma_joules=hypot(piece.sigma_joules, window.sigma_joules),
    )


def _tiled(end_seconds: float, pieces: dict[tuple[bool, Doubt], MeterWindow]) -> list[MeterWindow]:
    """The pieces one behind the other, from where the first begins to ``end_seconds``."""
    lengths = [piece.duration_seconds for piece in pieces.values()]
    begin = next(iter(pieces.values())).begin_seconds
    edges = [*accumulate(lengths[:-1], initial=begin), end_seconds]
    return [
        piece._replace(begin_seconds=begin, end_seconds=end)
        for piece, (begin, end) in zip(pieces.values(), pairwise(edges), strict=True)
    ]
