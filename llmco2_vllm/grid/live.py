"""A provider that asks a server now and then, remembers what it was told, and holds the last word for a while."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import zlib
from collections.abc import Iterable, Mapping
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
# A figure that says it holds for longer than so many periods is a slip, or a file that somebody has changed.
MOST_PERIODS = 4
# News is asked for so long after the last figure's end, and up to so much of a period later, each process at its own
# moment; and where it is not published yet, again after so much of a period, doubled each time up to a whole one.
LAG_SECONDS, LAG_RATIO = 2.0, 0.015
LATE_RATIO, SHORTEST_LATE_SECONDS = 0.1, 30.0


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
        self._history = History(limit=KEPT_FIGURES)
        now = feed.server.clock()
        self._history.add(self._believed(cache.read() if cache else (), now), now)
        self._due_epoch_seconds, self._wait_seconds = float("-inf"), 0.0
        self._failures, self._late = 0, 0
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
        server = self._feed.server
        server.retry_after_seconds = None
        try:
            self._wait_seconds = await self._learn(now_epoch_seconds)
            self._failures, self._failure = 0, None
        except FeedError as error:
            self._fail(error)
        except Exception as error:
            self._fail(FeedError(f"failed ({type(error).__name__})"))
        # Also where a question that the feed could do without was answered so.
        self._wait_seconds = max(self._wait_seconds, server.retry_after_seconds or 0.0)
        self._due_epoch_seconds = now_epoch_seconds + self._wait_seconds
        self._check_clock()
        return self._wait_seconds

    async def _learn(self, now_epoch_seconds: float) -> float:
        """Take in what another front end has fetched, else what the feed says. Returns seconds until there is news.

        Raises FeedError.
        """
        now = now_epoch_seconds
        kept = self._believed(await asyncio.to_thread(self._cache.read), now) if self._cache else []
        if self._is_fresh(kept, now):
            self._history.add(kept, now)
        else:
            last = self._history.before(now)
            said = await self._feed.fetch(now, None if last is None else last.valid_from_epoch_seconds)
            figures = self._believed(said, now)
            if not figures:
                raise FeedError("its figures begin more than a period ahead or last too long")
            self._history.add(figures, now)
            await self._keep()
        return self._until_news(now)

    def _believed(self, figures: Iterable[Intensity], now_epoch_seconds: float) -> list[Intensity]:
        """Figures whose times can be: begun or the next one, of some periods at most, and not fetched in the future."""
        period = self._feed.period_seconds
        found = []
        for figure in figures:
            begin, end = figure.valid_from_epoch_seconds, figure.valid_to_epoch_seconds
            fetched = figure.fetched_epoch_seconds
            if begin is None or end is None or fetched is None:
                continue
            soon = begin <= now_epoch_seconds + period
            if soon and end - begin <= MOST_PERIODS * period and fetched <= now_epoch_seconds + SKEW_SECONDS:
                found.append(figure)
        return found

    def _is_fresh(self, kept: Iterable[Intensity], now_epoch_seconds: float) -> bool:
        """Whether another front end has asked since there was news to expect."""
        last = History(kept).before(now_epoch_seconds)
        if last is None:
            return False
        begin, end = last.valid_from_epoch_seconds or 0.0, last.valid_to_epoch_seconds or 0.0
        recent = now_epoch_seconds - _late_seconds(end - begin) / 2
        since = begin if last.covers(now_epoch_seconds) else max(end, recent)
        return (last.fetched_epoch_seconds or 0.0) >= since

    def _until_news(self, now_epoch_seconds: float) -> float:
        """Seconds until the end of the figure of now and a little; a short patience where that is not known yet."""
        last = self._history.before(now_epoch_seconds)
        period, left = self._feed.period_seconds, 0.0
        if last is not None and last.valid_to_epoch_seconds is not None:
            period = last.valid_to_epoch_seconds - (last.valid_from_epoch_seconds or 0.0)
            left = last.valid_to_epoch_seconds - now_epoch_seconds
        if left > 0:
            self._late = 0
            return left + LAG_SECONDS + LAG_RATIO * period * process_share()
        self._late += 1
        late = _late_seconds(period)
        return min(late * 2.0 ** min(self._late - 1, 30), max(period, late))

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


def _late_seconds(period_seconds: float) -> float:
    """How long to wait for figures of that length that are not published in time."""
    return max(LATE_RATIO * period_seconds, SHORTEST_LATE_SECONDS)


def process_share() -> float:
    """0 to 1: hosts anywhere and neighbouring processes far apart, so that the first to ask spares the others."""
    golden = 0.6180339887498949
    return (zlib.crc32(socket.gethostname().encode()) / 2.0**32 + os.getpid() * golden) % 1.0
