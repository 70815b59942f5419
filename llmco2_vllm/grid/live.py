"""A provider that asks a server now and then, remembers what it was told, and holds the last word for a while."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.grid.cache import Cache
from llmco2_vllm.grid.feed import Feed
from llmco2_vllm.grid.history import History
from llmco2_vllm.grid.server import FeedError

logger = logging.getLogger("vllm.llmco2")

# 125 days of hours, 10 days of five minutes.
KEPT_FIGURES = 3000
# Half a Date header's second and the time an answer takes are no skew; a figure of the wrong hour is.
SKEW_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with what is known, and when to ask again.

    hold_seconds: how long after its end the last figure stands in. retry_seconds: after a first failure, doubled
    after each further one up to longest_retry_seconds; at once the latter when the key was not accepted.
    """

    hold_seconds: float = 6 * 3600.0
    retry_seconds: float = 30.0
    longest_retry_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for key in ("hold_seconds", "retry_seconds", "longest_retry_seconds"):
            value = getattr(self, key)
            if not 0 <= value < float("inf") or (key != "hold_seconds" and value < 1):
                least = "0" if key == "hold_seconds" else "1"
                raise ValueError(f"{key}={value!r} is not possible; allowed: {least} or more seconds")


class LiveProvider:
    """Figures of a feed. Read from any thread; refreshed in one loop."""

    def __init__(self, feed: Feed, cache: Cache | None = None, patience: Patience | None = None) -> None:
        """Reads the cache: not for the serving path."""
        self._feed, self._cache, self._patience = feed, cache, patience or Patience()
        self._history = History(cache.read() if cache else (), KEPT_FIGURES)
        self._due_epoch_seconds, self._wait_seconds = float("-inf"), 0.0
        self._failures = 0
        self._failure: str | None = None
        self._cache_failure: str | None = None
        self._logged: set[str] = set()

    @property
    def name(self) -> str:
        """The feed's."""
        return self._feed.name

    @property
    def kind(self) -> Kind:
        """The feed's."""
        return self._feed.kind

    def at(self, epoch_seconds: float) -> Intensity | None:
        """What was said of that moment, or what was said last, held for a while and marked."""
        return self._history.at(epoch_seconds, self._patience.hold_seconds)

    def reason(self, epoch_seconds: float) -> str:
        """What went wrong last, and what is known instead."""
        last = self._history.before(epoch_seconds)
        if last is not None:
            known = f"its last figure ended {epoch_seconds - (last.valid_to_epoch_seconds or 0.0):.0f} s before"
        else:
            known = "its figures begin later" if len(self._history) else "no figure yet"
        return f"{self._failure}; {known}" if self._failure else known

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        """Failures in a row, the last one's line, when it is asked again, and how far this clock is ahead."""
        return {
            "figures": len(self._history),
            "failures": self._failures,
            "failure": self._failure,
            "cache_failure": self._cache_failure,
            "next_seconds": max(0.0, self._due_epoch_seconds - now_epoch_seconds),
            "clock_skew_seconds": self._feed.server.skew_seconds,
        }

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        """Ask when it is due. Never raises; what went wrong is in ``state`` and logged once."""
        left = self._due_epoch_seconds - now_epoch_seconds
        # A clock that was set back must not silence us for longer than was meant.
        if 0 < left <= self._wait_seconds:
            return left
        try:
            figures = await self._news(now_epoch_seconds)
            self._history.add(figures)
            self._failures, self._failure = 0, None
            self._wait_seconds = self._feed.period_seconds * _spread()
            await self._keep()
        except FeedError as error:
            self._fail(error)
        except Exception as error:
            self._fail(FeedError(f"failed ({type(error).__name__})"))
        self._due_epoch_seconds = now_epoch_seconds + self._wait_seconds
        self._check_clock()
        return self._wait_seconds

    async def _news(self, now_epoch_seconds: float) -> Sequence[Intensity]:
        """What another front end has fetched just now, else what the feed says. Raises FeedError."""
        if self._cache is not None:
            kept = await asyncio.to_thread(self._cache.read)
            recent = now_epoch_seconds - self._feed.period_seconds / 2
            if any(recent < (figure.fetched_epoch_seconds or 0.0) <= now_epoch_seconds for figure in kept):
                return kept
        last = self._history.before(now_epoch_seconds)
        return await self._feed.fetch(now_epoch_seconds, None if last is None else last.valid_from_epoch_seconds)

    async def _keep(self) -> None:
        if self._cache is None:
            return
        try:
            await asyncio.to_thread(self._cache.write, self._history.figures)
            self._cache_failure = None
        except OSError as error:
            self._cache_failure = error.strerror or type(error).__name__
            self._log_once("cache", "is not kept on disk (%s)", self._cache_failure)

    def _fail(self, error: FeedError) -> None:
        self._failures += 1
        self._failure = str(error)
        patience = self._patience
        wait = min(patience.retry_seconds * 2.0 ** min(self._failures - 1, 30), patience.longest_retry_seconds)
        if error.refused:
            wait = patience.longest_retry_seconds
        self._wait_seconds = max(wait, error.retry_after_seconds or 0.0)
        self._log_once("failure", "%s; asked again later", self._failure)

    def _check_clock(self) -> None:
        skew = self._feed.server.skew_seconds
        if skew is not None and abs(skew) > SKEW_SECONDS:
            self._log_once("clock", "this host's clock is %.0f s ahead of the server's", skew)

    def _log_once(self, key: str, text: str, *arguments: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("llmco2: carbon intensity, %s: " + text, self.name, *arguments)


def _spread() -> float:
    """Processes that start together ask a little apart, so that the first to ask spares the others: 1 to 1.1."""
    return 1.0 + (os.getpid() % 16) / 160.0
