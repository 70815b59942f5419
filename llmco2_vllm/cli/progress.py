"""A progress bar for what may take long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
SHOWN_AFTER_SECONDS = 2.0


def watched(what: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Passes ``items`` on, with a bar on a terminal once it takes longer than two seconds."""
    console, begin = Console(stderr=True), monotonic()
    progress = Progress(console=console, transient=True)
    bar = progress.add_task(what, total=total)
    try:
        for item in items:
            late = monotonic() - begin > SHOWN_AFTER_SECONDS
            if late and console.is_terminal and not progress.live.is_started:
                progress.start()
            yield item
            progress.advance(bar)
    finally:
        if progress.live.is_started:
            progress.stop()
