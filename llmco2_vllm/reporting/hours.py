"""What each model took in each hour. Hours and days are UTC; an hour is its number since 1970."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Final, NamedTuple

from llmco2_vllm.core.units import SECONDS_PER_HOUR

HOURS_PER_DAY: Final = 24
# Of the energy of a model, in the order in which they are shown; they add up to it.
PARTS: Final = ("prefill", "decode", "mixed", "idle", "sleeping", "unattributed", "unsplit")


class Use(NamedTuple):
    """One model in one hour. amounts: sums over the hour by name, units in the name; what is not there is unknown.

    energy_joules is of the devices as metered, aborted requests, idleness and what nothing explains included; those of
    ``PARTS`` add up to it. predicted_joules is apart and never a part of it.
    """

    hour: int
    model: str
    amounts: Mapping[str, float]


class Period(NamedTuple):
    """Hours from ``begin`` to before ``end``."""

    begin: int
    end: int

    @property
    def hours(self) -> int:
        """How many there are."""
        return self.end - self.begin

    def days(self) -> dict[str, Period]:
        """The days it touches, as 2026-01-31, and its hours in each."""
        numbers = range(self.begin // HOURS_PER_DAY, (self.end - 1) // HOURS_PER_DAY + 1)
        first = {day_of(number * HOURS_PER_DAY): number * HOURS_PER_DAY for number in numbers}
        return {day: Period(max(self.begin, hour), min(self.end, hour + HOURS_PER_DAY)) for day, hour in first.items()}

    def __str__(self) -> str:
        return f"{_moment(self.begin)} to {_moment(self.end)} UTC"


class Window(NamedTuple):
    """A metered window whose prediction is off. Joules of its steps on one device, seconds."""

    began_epoch_seconds: float
    duration_seconds: float
    model: str
    metered_joules: float
    predicted_joules: float

    @property
    def error_joules(self) -> float:
        """Predicted less metered."""
        return self.predicted_joules - self.metered_joules

    @property
    def error_ratio(self) -> float:
        """Predicted over metered, less 1."""
        return self.predicted_joules / self.metered_joules - 1


class RecordedIntensity(NamedTuple):
    """Carbon intensities that the servers showed. grams_per_kwh, estimated: by hour; method: of all of them.

    origins: sources and zones that were in use.
    """

    grams_per_kwh: Mapping[int, float]
    estimated: frozenset[int]
    method: str
    origins: Sequence[str] = ()


@dataclass(frozen=True)
class Record:
    """What a source said.

    source: where it comes from, in words. notes: what is to be known of its figures. unknown: what it cannot tell and
    why. windows: the worst predicted, worst first; None where the source has no windows. intensities: by basis.
    """

    source: str
    period: Period
    uses: Sequence[Use]
    notes: Sequence[str] = ()
    unknown: Sequence[str] = ()
    windows: Sequence[Window] | None = None
    intensities: Mapping[str, RecordedIntensity] | None = None


@dataclass(frozen=True)
class Selection:
    """What of a source to report: days (both included, UTC) and a model; None is all of them."""

    first: date | None = None
    last: date | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.first is not None and self.last is not None and self.last < self.first:
            raise ValueError(f"to={self.last} is not possible; allowed: {self.first}, as from says, or later")

    def bounds(self) -> tuple[float, float]:
        """Epoch seconds of begin and end, infinite where they are open."""
        begin = -math.inf if self.first is None else _midnight(self.first)
        end = math.inf if self.last is None else _midnight(self.last) + HOURS_PER_DAY * SECONDS_PER_HOUR
        return begin, end


def period(hours: Iterable[int], bounds: tuple[float, float]) -> Period:
    """The hours between ``bounds``; from the first and to the last of ``hours`` where they are open."""
    found = sorted(hours)
    begin, end = bounds
    return Period(
        hour_of(begin) if math.isfinite(begin) else found[0], hour_of(end) if math.isfinite(end) else found[-1] + 1
    )


def chosen_model(wanted: str | None, known: Iterable[str], prefix: bool = False) -> str | None:
    """The model that is meant by its name, or by the begin of it. Raises ValueError that lists those that are there."""
    names = sorted(set(known))
    if wanted is None or wanted in names:
        return wanted
    near = [name for name in names if prefix and wanted and name.startswith(wanted)]
    if len(near) != 1:
        raise ValueError(f"model={wanted!r} is not in the data; allowed: {', '.join(names[:20])}")
    return near[0]


def hour_of(epoch_seconds: float) -> int:
    """The hour in which a moment lies."""
    return math.floor(epoch_seconds / SECONDS_PER_HOUR)


def day_of(hour: int) -> str:
    """The day of an hour."""
    return f"{datetime.fromtimestamp(hour * SECONDS_PER_HOUR, UTC):%Y-%m-%d}"


def pieces(begin_seconds: float, end_seconds: float) -> Iterator[tuple[int, float]]:
    """The hours a stretch of time touches, and which share of it lies in each; shares add up to 1."""
    first, last = hour_of(begin_seconds), hour_of(end_seconds)
    if first == last:
        yield first, 1.0
        return
    for hour in range(first, last + 1):
        begin = max(begin_seconds, hour * SECONDS_PER_HOUR)
        end = min(end_seconds, (hour + 1) * SECONDS_PER_HOUR)
        if end > begin:
            yield hour, (end - begin) / (end_seconds - begin_seconds)


def _midnight(day: date) -> float:
    return datetime.combine(day, time(), UTC).timestamp()


def _moment(hour: int) -> str:
    return f"{datetime.fromtimestamp(hour * SECONDS_PER_HOUR, UTC):%Y-%m-%d %H:%M}"
