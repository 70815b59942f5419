"""Electricity Maps API v3: hourly, consumption-based averages (https://portal.electricitymaps.com/developer-hub/api).

Lifecycle factors unless direct ones are asked for. The zone is checked in each answer: asked for a zone it does not
know the API may answer for the address of the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llmco2_vllm.core.intensity import Factors, Intensity, Kind, check_grams
from llmco2_vllm.grid.feed import BACKFILL_SECONDS
from llmco2_vllm.grid.keys import Key
from llmco2_vllm.grid.server import FeedError, Question, Server, entry, epoch_seconds

BASE_URL = "https://api.electricitymaps.com"
KEY_VARIABLE = "ELECTRICITY_MAPS_API_KEY"
_PERIODS = {"5_minutes": 300.0, "15_minutes": 900.0, "hourly": 3600.0}


class ElectricityMapsFeed:
    """Carbon intensity of one zone."""

    name = "electricity-maps"
    # Published hourly, some minutes after the hour and later made final; some plans have shorter figures.
    period_seconds = _PERIODS["hourly"]

    def __init__(self, server: Server, zone: str, key: Key, factors: Factors = "lifecycle") -> None:
        self.server = server
        self._factors, self._key = factors, key
        self._kind = Kind(zone, "average", "location", factors)

    @property
    def kind(self) -> Kind:
        """Average, location-based."""
        return self._kind

    async def fetch(self, now_epoch_seconds: float, since_epoch_seconds: float | None) -> Sequence[Intensity]:
        """``latest``, and ``history`` (24 hours) when more than an hour was missed. Raises FeedError."""
        headers = {"auth-token": _secret(self._key)}
        latest = self._figure(await self._ask("latest", headers), now_epoch_seconds)
        past: list[Intensity | None] = []
        since = now_epoch_seconds - BACKFILL_SECONDS if since_epoch_seconds is None else since_epoch_seconds
        if now_epoch_seconds - since > 2 * _PERIODS["hourly"]:
            try:
                rows = entry(await self._ask("history", headers), "history", list)
                past = self._past(rows, now_epoch_seconds)
            except FeedError:
                # Not every plan has it. What is known of now does not depend on it.
                pass
        # Of one hour the last word holds: that of latest.
        figures = [figure for figure in (*past, latest) if figure is not None]
        if not figures:
            raise FeedError(f"carbonIntensity is null: not known yet for zone {self._kind.zone}")
        return figures

    async def _ask(self, what: str, headers: dict[str, str]) -> Any:
        parameters = {
            "zone": self._kind.zone or "",
            "emissionFactorType": self._factors,
            "shouldUseFallbackCallerLookup": "false",
        }
        answer = await self.server.get(Question(f"/v3/carbon-intensity/{what}", parameters, headers))
        if entry(answer, "zone", str) != self._kind.zone:
            raise FeedError(f"another zone was answered than {self._kind.zone!r}")
        return answer

    def _past(self, rows: Sequence[Any], now_epoch_seconds: float) -> list[Intensity | None]:
        """Hours of a history; a row that is not as asked for is left out, the others do not depend on it."""
        found: list[Intensity | None] = []
        for row in rows:
            with suppress(FeedError):
                found.append(self._figure(row, now_epoch_seconds))
        return found

    def _figure(self, row: Any, now_epoch_seconds: float) -> Intensity | None:
        """One hour; None while its value is null. Raises FeedError."""
        begin = epoch_seconds(entry(row, "datetime", str), "datetime")
        if row.get("zone", self._kind.zone) != self._kind.zone:
            raise FeedError(f"another zone was answered than {self._kind.zone!r}")
        if row.get("emissionFactorType", self._factors) != self._factors:
            raise FeedError(f"emissionFactorType is not {self._factors!r} as asked for")
        period = _PERIODS.get(str(row.get("temporalGranularity", "hourly")))
        if period is None:
            raise FeedError(f"temporalGranularity is none of {', '.join(_PERIODS)}")
        if row.get("carbonIntensity") is None:
            return None
        return Intensity(
            grams(row["carbonIntensity"], "carbonIntensity"),
            self._kind.zone,
            "average",
            "location",
            self.name,
            row.get("isEstimated") is not False,
            begin,
            begin + period,
            now_epoch_seconds,
            self._factors,
        )


def grams(value: object, key: str) -> float:
    """``value`` as g CO2e/kWh. Raises FeedError that names the key."""
    try:
        return check_grams(value, key)
    except ValueError as error:
        raise FeedError(str(error)[:200]) from None


def _secret(key: Key) -> str:
    try:
        return key.read()
    except ValueError as error:
        raise FeedError(str(error), refused=True) from None
