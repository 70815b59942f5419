"""What every source of carbon intensity offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from llmco2_vllm.core.intensity import Intensity, Kind


class Provider(Protocol):
    """One source. ``at``, ``reason`` and ``state`` look into memory alone; only ``refresh`` reaches outside."""

    @property
    def name(self) -> str:
        """Short name: ``constant``, ``static``, ``file``, ``electricity-maps``, ``watttime``, ``uk``."""

    @property
    def kind(self) -> Kind:
        """What its figures are."""

    def at(self, epoch_seconds: float) -> Intensity | None:
        """The figure of that moment, None when unknown."""

    def reason(self, epoch_seconds: float) -> str:
        """Why there is no figure of that moment, in words."""

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        """What there is to see beside that; no keys, no credentials."""

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        """Look for news if it is time. Returns seconds until it is time again, None for never. Never raises."""
