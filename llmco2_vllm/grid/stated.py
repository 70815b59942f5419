"""Figures that need no network: a stated constant, and the shipped table by zone and year."""

from __future__ import annotations

import bisect
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind, check_grams
from llmco2_vllm.grid.zones import WORLD, check_zone, country, shipped_rows

WORLD_SOURCE = "default:world-average"


@cache
def sources() -> Mapping[str, Mapping[str, Any]]:
    """Documents behind the shipped tables by key: title, url, year, licence, notice where one has to be kept."""
    text = files("llmco2_vllm").joinpath("data", "grid", "sources.toml").read_text("utf-8")
    found: Mapping[str, Mapping[str, Any]] = tomllib.loads(text)["source"]
    return found


class ConstantProvider:
    """One figure for all times."""

    name = "constant"

    def __init__(self, grams_per_kwh: float, kind: Kind | None = None, source: str = "settings") -> None:
        """Raises ValueError outside 0 to 3000 g CO2e/kWh."""
        check_grams(grams_per_kwh, "intensity")
        self._kind = kind or Kind()
        zone, method, basis = self._kind.zone, self._kind.method, self._kind.basis
        self._figure = Intensity(grams_per_kwh, zone, method, basis, source, False, factors=self._kind.factors)

    @property
    def kind(self) -> Kind:
        """As stated."""
        return self._kind

    def at(self, epoch_seconds: float) -> Intensity | None:
        """The figure."""
        return self._figure

    def reason(self, epoch_seconds: float) -> str:
        """There is always a figure."""
        return "answers at all times"

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        """Nothing changes."""
        return {}

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        """Nothing to look for."""
        return None


def year_begin(year: int) -> float:
    """First moment of a year in UTC, epoch seconds."""
    return datetime(year, 1, 1, tzinfo=UTC).timestamp()


@cache
def _table() -> Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Years, ascending, and g CO2e/kWh by zone."""
    found: dict[str, dict[int, float]] = {}
    for row in shipped_rows("intensity"):
        found.setdefault(row["zone"], {})[int(row["year"])] = float(row["grams_per_kwh"])
    return {zone: (tuple(sorted(rows)), tuple(rows[year] for year in sorted(rows))) for zone, rows in found.items()}


class TableProvider:
    """Yearly averages of a country, lifecycle factors: a stand-in for any hour, and says so.

    Part of a country gets the figure of the country, and the figure's zone is then the country. A year without a row
    gets the latest one before it.
    """

    name = "static"

    def __init__(self, zone: str) -> None:
        """Raises ValueError that names near zones when the table has neither the zone nor its country."""
        self._zone = zone if zone in _table() else country(check_zone(zone))
        if self._zone not in _table():
            raise ValueError(f"zone={zone!r} is not in the shipped table of yearly averages; allowed: a country of it")
        self._years, self._grams = _table()[self._zone]
        # Nobody states what the world average counts; all others are Ember's lifecycle figures.
        self._kind = Kind(self._zone, factors=None if self._zone == WORLD else "lifecycle")
        self._source = WORLD_SOURCE if self._zone == WORLD else "static:{}"

    @property
    def kind(self) -> Kind:
        """Average, location-based, of the country."""
        return self._kind

    def at(self, epoch_seconds: float) -> Intensity | None:
        """The average of that year or the latest before it; None before the first row."""
        row = bisect.bisect_right(self._years, datetime.fromtimestamp(epoch_seconds, UTC).year) - 1
        if row < 0:
            return None
        year = self._years[row]
        return Intensity(
            self._grams[row],
            self._zone,
            "average",
            "location",
            self._source.format(year),
            True,
            year_begin(year),
            year_begin(year + 1),
            factors=self._kind.factors,
        )

    def reason(self, epoch_seconds: float) -> str:
        """It lies before the table."""
        return f"the table begins in {self._years[0]} for {self._zone}"

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        """Its years."""
        return {"years": list(self._years)}

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        """Nothing to look for."""
        return None
