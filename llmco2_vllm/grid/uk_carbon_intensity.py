"""Carbon Intensity API of the National Energy System Operator: Great Britain by the half-hour, no key.

https://api.carbonintensity.org.uk, CC BY 4.0. Its factors are direct: nuclear, wind and sun count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.grid.electricity_maps import grams
from llmco2_vllm.grid.feed import BACKFILL_SECONDS
from llmco2_vllm.grid.server import FeedError, Question, Server, entry, epoch_seconds, iso

BASE_URL = "https://api.carbonintensity.org.uk"
ZONE = "GB"
# How long an actual value may take to replace its forecast.
_REVISED_SECONDS = 7200.0


class UkCarbonIntensityFeed:
    """Carbon intensity of Great Britain."""

    name = "uk-carbon-intensity"
    period_seconds = 1800.0
    kind = Kind(ZONE, "average", "location", "direct")

    def __init__(self, server: Server) -> None:
        self.server = server

    async def fetch(self, now_epoch_seconds: float, since_epoch_seconds: float | None) -> Sequence[Intensity]:
        """This half-hour, and those whose actual value may have come since. Raises FeedError."""
        current = await self._ask("/intensity", now_epoch_seconds)
        earliest = now_epoch_seconds - BACKFILL_SECONDS
        begin = earliest if since_epoch_seconds is None else max(earliest, since_epoch_seconds - _REVISED_SECONDS)
        try:
            past = await self._ask(f"/intensity/{iso(begin)}/{iso(now_epoch_seconds)}", now_epoch_seconds)
        except FeedError:
            past = []
        if not current and not past:
            raise FeedError("forecast and actual are null: nothing is known of this half-hour")
        return [*past, *current]

    async def _ask(self, path: str, now_epoch_seconds: float) -> list[Intensity]:
        rows = entry(await self.server.get(Question(path, headers={"accept": "application/json"})), "data", list)
        found = (_figure(row, now_epoch_seconds) for row in rows)
        return [figure for figure in found if figure is not None]


def _figure(row: Any, now_epoch_seconds: float) -> Intensity | None:
    """One half-hour: the actual value, else the forecast, marked; None when both are null."""
    begin = epoch_seconds(entry(row, "from", str), "from")
    end = epoch_seconds(entry(row, "to", str), "to")
    values = entry(row, "intensity", dict)
    key = "actual" if values.get("actual") is not None else "forecast"
    if values.get(key) is None:
        return None
    if not begin < end:
        raise FeedError("to is not later than from")
    value = grams(values[key], key)
    source, estimated = UkCarbonIntensityFeed.name, key == "forecast"
    return Intensity(value, ZONE, "average", "location", source, estimated, begin, end, now_epoch_seconds, "direct")
