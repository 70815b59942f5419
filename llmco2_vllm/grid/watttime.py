"""WattTime API v3: the marginal operating emissions rate of a region every five minutes (https://docs.watttime.org).

Pounds of CO2 per MWh at the stacks of the plants that follow the load: marginal and direct. A token from ``/login``
lasts 30 minutes; without a plan only the region CAISO_NORTH is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.core.units import convert
from llmco2_vllm.grid.electricity_maps import grams
from llmco2_vllm.grid.feed import BACKFILL_SECONDS
from llmco2_vllm.grid.keys import Key
from llmco2_vllm.grid.server import FeedError, Question, Server, entry, epoch_seconds, iso

BASE_URL = "https://api.watttime.org"
USER_VARIABLE, PASSWORD_VARIABLE = "WATTTIME_USER", "WATTTIME_PASSWORD"
SIGNAL = "co2_moer"
UNITS = "lbs_co2_per_mwh"
_POINT_SECONDS = 300.0
_TOKEN_SECONDS = 25 * 60.0


class WattTimeFeed:
    """Marginal carbon intensity of one region."""

    name = "watttime"
    period_seconds = _POINT_SECONDS

    def __init__(self, server: Server, region: str, user: Key, password: Key) -> None:
        self.server = server
        self._user, self._password = user, password
        self._kind = Kind(region, "marginal", "location", "direct")
        self._token: tuple[str, float] | None = None

    @property
    def kind(self) -> Kind:
        """Marginal, location-based, direct."""
        return self._kind

    async def fetch(self, now_epoch_seconds: float, since_epoch_seconds: float | None) -> Sequence[Intensity]:
        """``forecast`` from now on, and ``historical`` for what was missed. Raises FeedError."""
        answer = await self._ask("/v3/forecast", {"horizon_hours": "0"}, now_epoch_seconds)
        figures = self._figures(answer, now_epoch_seconds, True)
        if not figures:
            raise FeedError("data: no value of now")
        since = now_epoch_seconds - BACKFILL_SECONDS
        since = since if since_epoch_seconds is None else max(since, since_epoch_seconds)
        if now_epoch_seconds - since <= 3 * _POINT_SECONDS:
            return figures
        try:
            span = {"start": iso(since), "end": iso(now_epoch_seconds)}
            past = await self._ask("/v3/historical", span, now_epoch_seconds)
            return [*self._figures(past, now_epoch_seconds, False), *figures]
        except FeedError:
            return figures

    async def _ask(self, path: str, parameters: dict[str, str], now_epoch_seconds: float) -> Any:
        """One answer; a token that is no longer accepted is replaced, once."""
        wanted = {"region": self._kind.zone or "", "signal_type": SIGNAL, **parameters}
        fresh = self._token is None or not 0 <= now_epoch_seconds - self._token[1] < _TOKEN_SECONDS
        if fresh or self._token is None:
            self._token = (await self._log_in(), now_epoch_seconds)
        try:
            return await self._get(path, wanted)
        except FeedError as error:
            if not error.refused or fresh:
                self._token = None if error.refused else self._token
                raise
        self._token = (await self._log_in(), now_epoch_seconds)
        return await self._get(path, wanted)

    async def _get(self, path: str, parameters: dict[str, str]) -> Any:
        token = self._token[0] if self._token else ""
        return await self.server.get(Question(path, parameters, {"authorization": f"Bearer {token}"}))

    async def _log_in(self) -> str:
        try:
            credentials = (self._user.read(), self._password.read())
        except ValueError as error:
            raise FeedError(str(error), refused=True) from None
        token: str = entry(await self.server.get(Question("/login", credentials=credentials)), "token", str)
        if not token.isascii() or not token.isprintable() or " " in token:
            raise FeedError("the answer has no 'token' as expected")
        return token

    def _figures(self, answer: Any, now_epoch_seconds: float, estimated: bool) -> list[Intensity]:
        meta = entry(answer, "meta", dict)
        for key, wanted in (("units", UNITS), ("region", self._kind.zone), ("signal_type", SIGNAL)):
            if meta.get(key) != wanted:
                raise FeedError(f"meta.{key} is not {wanted!r} as asked for")
        found = []
        for row in entry(answer, "data", list):
            begin = epoch_seconds(entry(row, "point_time", str), "point_time")
            if row.get("value") is None:
                continue
            value = grams_per_kwh(row["value"])
            found.append(
                Intensity(
                    value,
                    self._kind.zone,
                    "marginal",
                    "location",
                    f"{self.name}:{SIGNAL}",
                    estimated,
                    begin,
                    begin + _POINT_SECONDS,
                    now_epoch_seconds,
                    "direct",
                )
            )
        return found


def grams_per_kwh(pounds_per_mwh: object) -> float:
    """``pounds_per_mwh`` in g/kWh: 1 lb/MWh is 0.45359237. Raises FeedError when it is no possible value."""
    if isinstance(pounds_per_mwh, bool) or not isinstance(pounds_per_mwh, int | float):
        raise FeedError("value is no number")
    return grams(convert(float(pounds_per_mwh), "lb/MWh", "g/kWh"), "value")
