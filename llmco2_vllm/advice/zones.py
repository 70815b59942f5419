"""Carbon intensity of the zones that are compared: a year's mean, and with an hourly file the hours of the day."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.core.units import SECONDS_PER_HOUR
from llmco2_vllm.grid.series import read_series
from llmco2_vllm.grid.stated import TableProvider
from llmco2_vllm.grid.zones import check_zone

_HOURS = 24


@dataclass(frozen=True)
class ZoneIntensity:
    """grams_per_kwh: the mean. hours: g CO2e/kWh by hour of day in UTC, (24,); None without an hourly file.

    kind: which intensity it is. estimated: whether it stands in for the hour, or part of it is modelled.
    year: the last one that it speaks of. age_seconds: since its time ended. None where that is unknown.
    """

    zone: str
    grams_per_kwh: float
    source: str
    hours: tuple[float, ...] | None = None
    kind: Kind = field(default_factory=Kind)
    estimated: bool | None = None
    year: int | None = None
    age_seconds: float | None = None

    @property
    def best_hour(self) -> int | None:
        """The hour of day, UTC, with the cleanest electricity."""
        return None if self.hours is None else int(np.argmin(self.hours))

    @property
    def worst_hour(self) -> int | None:
        """The hour of day, UTC, with the dirtiest electricity."""
        return None if self.hours is None else int(np.argmax(self.hours))


def zone_intensity(zone: str, file: Path | None = None) -> ZoneIntensity:
    """Intensity of a zone: of ``file`` (see grid.series), else the shipped yearly average of its country.

    Raises ValueError that names the zone, or the file and row.
    """
    if file is not None:
        return _of_file(zone, file)
    now = time.time()
    figure = TableProvider(zone).at(now)
    if figure is None:
        raise ValueError(f"zone={zone!r} has no figure of this year or before")
    stands_in = "" if figure.zone == zone else f", of {figure.zone} as a whole"
    return replace(_told(figure, zone, now), grams_per_kwh=figure.grams_per_kwh, source=f"{figure.source}{stands_in}")


def _told(last: Intensity, zone: str, now_epoch_seconds: float) -> ZoneIntensity:
    """What a zone's intensity says of itself by its last figure."""
    begin = last.valid_from_epoch_seconds
    year = None if begin is None else datetime.fromtimestamp(begin, UTC).year
    kind, age = last.kind, last.age_seconds(now_epoch_seconds)
    return ZoneIntensity(zone, last.grams_per_kwh, last.source, None, kind, last.estimated, year, age)


def _of_file(zone: str, file: Path) -> ZoneIntensity:
    figures = read_series(file, Kind(zone))
    begins = np.array([figure.valid_from_epoch_seconds for figure in figures], dtype=np.float64)
    ends = np.array([figure.valid_to_epoch_seconds for figure in figures], dtype=np.float64)
    if np.median(ends - begins) > SECONDS_PER_HOUR:
        raise ValueError(f"intensity-file={str(file)!r} is not hourly; allowed: rows of an hour or less")
    values = np.array([figure.grams_per_kwh for figure in figures])
    hours = np.array([datetime.fromtimestamp(begin, UTC).hour for begin in begins])
    if len(missing := sorted(set(range(_HOURS)) - set(hours.tolist()))):
        raise ValueError(
            f"intensity-file={str(file)!r} has no row of {missing[0]}:00 UTC; allowed: rows of all 24 hours of the day"
        )
    by_hour = tuple(float(values[hours == hour].mean()) for hour in range(_HOURS))
    return replace(
        _told(figures[-1], zone, time.time()),
        grams_per_kwh=float(np.mean(by_hour)),
        hours=by_hour,
        estimated=any(figure.estimated for figure in figures),
    )


def zone_intensities(zones: tuple[str, ...], files: Mapping[str, Path]) -> tuple[ZoneIntensity, ...]:
    """Of all zones in order. Raises ValueError also for a zone that is none, and a file of one that is not compared."""
    for zone in zones:
        check_zone(zone)
    for zone in files:
        if zone not in zones:
            raise ValueError(f"intensity file of zone={zone!r}; allowed: one of the zones compared, {', '.join(zones)}")
    return tuple(zone_intensity(zone, files.get(zone)) for zone in zones)
