"""Figures in the order of time. Readers see a whole state: it is replaced by one assignment, never changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from llmco2_vllm.core.intensity import Intensity


class History:
    """Figures by their begin; a later word on the same begin replaces the earlier one."""

    def __init__(self, figures: Iterable[Intensity] = (), limit: int | None = None) -> None:
        """limit: how many to keep, the newest; None for all."""
        self._limit = limit
        self._state: tuple[tuple[float, ...], tuple[Intensity, ...]] = ((), ())
        self.add(figures)

    def __len__(self) -> int:
        return len(self._state[0])

    @property
    def figures(self) -> tuple[Intensity, ...]:
        """All, ascending."""
        return self._state[1]

    def add(self, figures: Iterable[Intensity], now_epoch_seconds: float = float("inf")) -> None:
        """Take figures in. Those without a begin have no place in time and are left out.

        Beyond the limit the oldest go, but never the figure of now, however many begin later.
        """
        known = dict(zip(*self._state, strict=True))
        known |= {f.valid_from_epoch_seconds: f for f in figures if f.valid_from_epoch_seconds is not None}
        begins = sorted(known)
        if self._limit and len(begins) > self._limit:
            first = max(0, min(len(begins) - self._limit, bisect_right(begins, now_epoch_seconds) - 1))
            begins = begins[first : first + self._limit]
        self._state = tuple(begins), tuple(known[begin] for begin in begins)

    def before(self, epoch_seconds: float) -> Intensity | None:
        """The last figure that had begun by then."""
        begins, figures = self._state
        found = bisect_right(begins, epoch_seconds) - 1
        return figures[found] if found >= 0 else None

    def at(self, epoch_seconds: float, hold_seconds: float = 0.0) -> Intensity | None:
        """The figure of that moment; after its end it is held for a while, marked as a stand-in.

        A figure that begins later is never used: nothing is known of an hour before it began.
        """
        found = self.before(epoch_seconds)
        if found is None or found.covers(epoch_seconds):
            return found
        end = found.valid_to_epoch_seconds
        return found.held() if end is not None and epoch_seconds - end < hold_seconds else None
