"""The chain of providers: the first that knows answers, and it is always visible which one and why.

``current`` is an attribute: reading it asks nobody, waits for nothing and looks into no file. A coroutine in the
front end's loop keeps it up to date.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from llmco2_vllm.core.intensity import Intensity
from llmco2_vllm.grid.provider import Provider

logger = logging.getLogger("vllm.llmco2")

LONGEST_SLEEP_SECONDS = 60.0
SHORTEST_SLEEP_SECONDS = 1.0
# How a span is walked where the first link has no figure with an end ahead: in steps so long, in at most so many.
STRIDE_SECONDS, MOST_PARTS = 300.0, 500


class Chain:
    """Providers in the order in which they are believed.

    current: the figure of now as of the last round, None when no link knows.
    """

    def __init__(self, links: Sequence[Provider], clock: Callable[[], float] = time.time) -> None:
        """Raises ValueError when a figure could silently change its kind: method, basis or factors differ."""
        if not links:
            raise ValueError("chain: no provider; expected one or more")
        _check_kinds(links)
        self._links, self._clock = tuple(links), clock
        self._logged: set[str] = set()
        self._failures = 0
        self.current: Intensity | None = None
        self._look()

    def at(self, epoch_seconds: float) -> Intensity | None:
        """The figure of that moment by the first link that knows; None when none does. Memory only."""
        return self._find(epoch_seconds)[1]

    def between(self, begin_epoch_seconds: float, end_epoch_seconds: float) -> list[tuple[Intensity | None, float]]:
        """The figures of a span in order, each with its seconds; None for what no link knows. Memory only.

        A figure that is held past its time, missing, or of a stand-in is looked for anew every few minutes of the
        span: the first link may know again.
        """
        at, found = begin_epoch_seconds, []
        stride = max(STRIDE_SECONDS, (end_epoch_seconds - begin_epoch_seconds) / MOST_PARTS)
        while True:
            number, figure = self._find(at)
            until = None if figure is None else figure.valid_to_epoch_seconds
            stop = min(at + stride, end_epoch_seconds)
            if figure is not None and number == 0 and (until is None or until > at):
                stop = end_epoch_seconds if until is None else min(until, end_epoch_seconds)
            elif until is not None and until > at:
                stop = min(stop, until)
            found.append((figure, stop - at))
            if stop >= end_epoch_seconds:
                return found
            at = stop

    def state(self) -> dict[str, Any]:
        """The figure of now with its age, and of each link whether it answers and why not."""
        now = self._clock()
        answering, figure = self._find(now)
        links = [self._link_state(number, answering, now) for number in range(len(self._links))]
        shown = None if figure is None else {**asdict(figure), "age_seconds": figure.age_seconds(now)}
        name = None if figure is None else self._links[answering].name
        return {"answers": name, "figure": shown, "links": links, "failures": self._failures}

    async def refresh(self) -> float:
        """One round over the links that are due. Returns seconds until the next round is worth it."""
        self._look()  # at once: a new hour does not wait for a server that hangs
        began = self._clock()
        waits = await asyncio.gather(*(link.refresh(began) for link in self._links))
        self._look()
        self._tell()
        now = self._clock()
        soon = [wait - (now - began) for wait in waits if wait is not None]
        if self.current is not None and self.current.valid_to_epoch_seconds is not None:
            left = self.current.valid_to_epoch_seconds - now
            soon += [left] if left > 0 else []
        return max(SHORTEST_SLEEP_SECONDS, min([*soon, LONGEST_SLEEP_SECONDS]))

    async def run(self) -> None:
        """Rounds until cancelled. An error of ours is counted, logged once, and the next round tries again."""
        while True:
            wait = LONGEST_SLEEP_SECONDS
            try:
                wait = await self.refresh()
            except Exception as error:
                self._failures += 1
                self._log_once("failure", "carbon intensity is not refreshed (%s)", type(error).__name__)
            await asyncio.sleep(wait)

    def _find(self, epoch_seconds: float) -> tuple[int, Intensity | None]:
        for number, link in enumerate(self._links):
            figure = link.at(epoch_seconds)
            if figure is not None:
                return number, figure
        return len(self._links), None

    def _look(self) -> None:
        """Take the figure of now."""
        self.current = self._find(self._clock())[1]

    def _tell(self) -> None:
        """Say once of each stand-in that the first link does not answer, and why."""
        now = self._clock()
        answering, figure = self._find(now)
        if answering > 0:
            name, first = "nobody" if figure is None else figure.source, self._links[0]
            self._log_once(name, "carbon intensity from %s now; %s: %s", name, first.name, first.reason(now))

    def _link_state(self, number: int, answering: int, now: float) -> dict[str, Any]:
        link = self._links[number]
        reason = None
        if number != answering:
            asked = number < answering
            reason = link.reason(now) if asked else f"{self._links[answering].name} answers before it"
        return {
            "name": link.name,
            **asdict(link.kind),
            "answers": number == answering,
            "reason": reason,
            **link.state(now),
        }

    def _log_once(self, key: str, text: str, *arguments: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("llmco2: " + text, *arguments)


def _check_kinds(links: Sequence[Provider]) -> None:
    """Raises ValueError when two links give figures that must not stand in for each other."""
    for key in ("method", "basis", "factors"):
        said = {getattr(link.kind, key): link.name for link in links if getattr(link.kind, key) is not None}
        if len(said) > 1:
            words = ", ".join(f"{name} gives {value}" for value, name in said.items())
            raise ValueError(f"chain: {key} must be one and the same in all links ({words})")
