"""Growth of cumulative figures over the recent past, from two of its moments."""

from __future__ import annotations


class RecentGrowth:
    """Of figures that are looked at now and then; the first of them is their time.

    span: how long ago the earlier moment lies, once to twice, or as long as there is; in the unit of the first figure.
    """

    __slots__ = ("_earlier", "_later", "_span")

    def __init__(self, span: float, *now: float) -> None:
        self._span = span
        self._earlier = self._later = now

    def until(self, *now: float) -> list[float]:
        """By how much each has grown until now."""
        if now[0] - self._later[0] >= self._span:
            self._earlier, self._later = self._later, now
        return [figure - before for figure, before in zip(now, self._earlier, strict=True)]
