"""A meter that replays a recorded edge file, to run the sampler over what a real counter did.

CSV or CSV.gz with a header. Columns: ``time_seconds`` (ascending; when a value was first seen), ``energy_joules``
(the counter), and, if recorded, ``power_watts``, ``temperature_celsius``, ``sm_clock_mhz``. Others are ignored.
"""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_right
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from llmco2_vllm.meters.base import DeviceIdentity, MeterUnavailableError, Reading, Vitals

OPTIONAL = ("power_watts", "temperature_celsius", "sm_clock_mhz")


class ReplayMeter:
    """The recorded device; its first row is now, by ``clock``, when the meter is opened."""

    name = "replay"

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Raises MeterUnavailableError that names the file, and the row and column that cannot be used."""
        self._rows = _rows(path)
        self._times = [row["time_seconds"] for row in self._rows]
        self._clock = clock
        self._start = clock()
        basis = "instant power" if "power_watts" in self._rows[0] else "none"
        self.identity = DeviceIdentity(f"replay:{path.name}", path.name, power_basis=basis)

    @property
    def end_seconds(self) -> float:
        """When, by the clock, the recording is over."""
        return self._start + self._times[-1] - self._times[0]

    def _row(self, now: float) -> dict[str, float]:
        return self._rows[max(0, bisect_right(self._times, now - self._start + self._times[0]) - 1)]

    def read(self) -> Reading:
        """What the counter showed at this time of the recording."""
        now = self._clock()
        row = self._row(now)
        return Reading(now, row["energy_joules"], row.get("power_watts"))

    def vitals(self) -> Vitals:
        """As recorded."""
        row = self._row(self._clock())
        return Vitals(row.get("temperature_celsius"), row.get("sm_clock_mhz"))

    def reopen(self) -> None:
        """A recording is never lost."""

    def close(self) -> None:
        """Nothing to close."""


def _rows(path: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, text in enumerate(csv.DictReader(StringIO(data.decode("utf-8"))), 2):
            rows.append(_row(path, number, text))
            if len(rows) > 1 and rows[-1]["time_seconds"] <= rows[-2]["time_seconds"]:
                raise MeterUnavailableError(f"{path}: row {number}: time_seconds is not later than the row before")
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise MeterUnavailableError(f"{path}: cannot be read ({error})") from None
    if len(rows) < 2:
        raise MeterUnavailableError(f"{path}: has {len(rows)} rows; a recording has two or more")
    return rows


def _row(path: Path, number: int, text: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for column in ("time_seconds", "energy_joules", *(name for name in OPTIONAL if text.get(name))):
        try:
            found[column] = float(text[column])
        except (KeyError, TypeError, ValueError):
            raise MeterUnavailableError(
                f"{path}: row {number}: {column}={text.get(column)!r} is not possible; allowed: a number"
            ) from None
    return found
