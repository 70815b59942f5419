"""Fail open: an exception of ours is caught at the edge, logged once, counted, and switches the hook off."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

logger = logging.getLogger("vllm.llmco2")
T = TypeVar("T")

# Where each side catches exceptions of ours, by the host's call that we are in or by what we were at.
PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "engine": (
        *("schedule", "get_grammar_bitmask", "update_from_output", "attach", "free_request", "preempt_request"),
        *("decide", "tend", "settled", "sleep"),
    ),
    "front end": (
        *("add_request", "receive", "settle", "abort_requests", "from_base", "request_output"),
        *("request_finished", "request_measured", "remember", "last", "pull", "span"),
        *("started", "scope", "open_call", "response start", "JSON body", "event stream", "refresh_metrics", "metrics"),
        *("/carbon", "/carbon/hook", "/carbon/live", "/carbon/live.json", "/carbon/requests/"),
    ),
}


class Guard:
    """Remembers failures of one side (engine or front end). ``active`` turns False at the first.

    failures: how many by place, of the places that failed.
    """

    def __init__(self, side: str, host_version: str) -> None:
        self.side = side
        self.active = True
        self.failures: Counter[str] = Counter()
        self._host_version = host_version
        self._said_off = False

    @property
    def counts(self) -> dict[str, int]:
        """Failures of every place from the start: a counter that is born at 1 hides its first from rate()."""
        return {**dict.fromkeys(PLACES[self.side], 0), **self.failures}

    def failed(self, where: str, error: BaseException, switch_off: bool = True) -> None:
        """Count a failure; log the first, and the first that switches off. Never raises."""
        worth_a_line = not self.failures or (switch_off and not self._said_off)
        self._said_off |= switch_off
        self.failures[where] += 1
        if switch_off:
            self.active = False
        if worth_a_line:
            # No traceback object is kept: it would hold the frames, and with them requests.
            logger.error(
                "llmco2: %s failed in %s (%s: %s), vLLM %s; serving goes on%s",
                self.side,
                where,
                type(error).__name__,
                error,
                self._host_version,
                ", the carbon hook is switched off" if switch_off else "",
            )

    def call(self, where: str, function: Callable[..., T], *args: object) -> T | None:
        """``function(*args)`` if active, else None; an exception switches the hook off and goes no further.

        Hand over the host's objects whole: what is read from them is then read inside.
        """
        if self.active:
            try:
                return function(*args)
            except Exception as error:
                self.failed(where, error)
        return None
