"""What the live providers have in common: asking one server for figures of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.grid.server import Server

# How far back a gap is filled; the providers give as much at once.
BACKFILL_SECONDS = 86400.0


class Feed(Protocol):
    """One provider's API."""

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def kind(self) -> Kind:
        """What its figures are."""

    @property
    def server(self) -> Server:
        """Whom it asks."""

    @property
    def period_seconds(self) -> float:
        """How often news is published: the length of a figure, or more."""

    async def fetch(self, now_epoch_seconds: float, since_epoch_seconds: float | None) -> Sequence[Intensity]:
        """News: those missed since the last known one began, and the figure of now last. Raises FeedError."""
