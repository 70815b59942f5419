"""A carbon intensity with everything needed to judge it: which grid, which hour, which kind, from whom, how old."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Method = Literal["average", "marginal"]
Basis = Literal["location", "market"]
Factors = Literal["lifecycle", "direct"]

# Coal alone is about 1000; small islands on old diesel sets reach 1300 in the shipped table.
LIMIT_GRAMS_PER_KWH = 3000.0
HELD = ":held"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a figure is. Figures of two kinds never stand in for each other.

    zone: grid zone as its source names it; None when not stated.
    method: ``average`` of all generation (inventories) or ``marginal``, of one kWh more (load shifting).
    basis: of Scope 2: ``location``, the grid as it is, or ``market``, with contracts.
    factors: ``lifecycle`` or ``direct`` (combustion alone, as Scope 2 wants); None when its source does not say.
    """

    zone: str | None = None
    method: Method = "average"
    basis: Basis = "location"
    factors: Factors | None = None

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("method", self.method, get_args(Method)),
            ("basis", self.basis, get_args(Basis)),
            ("factors", self.factors, (*get_args(Factors), None)),
        ):
            if value not in allowed:
                words = ", ".join(str(item) for item in allowed if item is not None)
                raise ValueError(f"{key}={value!r} is not possible; allowed: {words}")


@dataclass(frozen=True, slots=True)
class Intensity:
    """Carbon intensity of a stretch of time.

    grams_per_kwh: g CO2e/kWh, 0 to 3000. zone, method, basis, factors: as in :class:`Kind`.
    source: who says so, and the data's year or ``:held`` where it is a stand-in for a figure that is missing.
    estimated: modelled, forecast, or a stand-in for the hour; not a final figure of that hour.
    valid_from_epoch_seconds, valid_to_epoch_seconds: what it speaks of; None is open.
    fetched_epoch_seconds: when it was asked for; None when it was not.
    """

    grams_per_kwh: float
    zone: str | None
    method: Method
    basis: Basis
    source: str
    estimated: bool
    valid_from_epoch_seconds: float | None = None
    valid_to_epoch_seconds: float | None = None
    fetched_epoch_seconds: float | None = None
    factors: Factors | None = None

    def __post_init__(self) -> None:
        check_grams(self.grams_per_kwh, "grams_per_kwh")
        begin, end = self.valid_from_epoch_seconds, self.valid_to_epoch_seconds
        if begin is not None and end is not None and not begin < end:
            raise ValueError(f"valid_to={end!r} is not possible; expected later than valid_from={begin!r}")

    @property
    def kind(self) -> Kind:
        """What it is."""
        return Kind(self.zone, self.method, self.basis, self.factors)

    def covers(self, epoch_seconds: float) -> bool:
        """Whether it speaks of that moment; its end is the next one's."""
        begin, end = self.valid_from_epoch_seconds, self.valid_to_epoch_seconds
        return (begin is None or begin <= epoch_seconds) and (end is None or epoch_seconds < end)

    def age_seconds(self, now_epoch_seconds: float) -> float | None:
        """Seconds since it was last known to hold: since it was fetched, or since its time ended if that is longer.

        Never negative, whatever the clocks say; None for a figure that is stated without a time.
        """
        known = [at for at in (self.fetched_epoch_seconds, self.valid_to_epoch_seconds) if at is not None]
        return max(0.0, now_epoch_seconds - min(known)) if known else None

    def held(self) -> Intensity:
        """The same as a stand-in for a later time."""
        return replace(self, source=self.source + HELD, estimated=True)


def mean_intensity(parts: Sequence[tuple[Intensity | None, float]]) -> Intensity | None:
    """The mean by time of figures that follow one another, each with its seconds; None when one is not known.

    Energy is multiplied by the intensity of the hour in which it was used; what spans the turn of an hour gets this.
    All figures are of one method and basis, as a chain guarantees.
    """
    figures = [figure for figure, _ in parts]
    known = [figure for figure in figures if figure is not None]
    if not known or len(known) < len(figures) or all(figure == known[0] for figure in known):
        return None if len(known) < len(figures) or not known else known[0]
    seconds = [length for _, length in parts]
    grams = sum(f.grams_per_kwh * length for f, length in zip(known, seconds, strict=True)) / sum(seconds)
    fetched = [f.fetched_epoch_seconds for f in known if f.fetched_epoch_seconds is not None]
    return replace(
        known[-1],
        grams_per_kwh=grams,
        source=" + ".join(dict.fromkeys(f.source for f in known)),
        estimated=any(f.estimated for f in known),
        valid_from_epoch_seconds=known[0].valid_from_epoch_seconds,
        fetched_epoch_seconds=min(fetched, default=None),
    )


def check_grams(value: object, key: str) -> float:
    """``value`` as g CO2e/kWh. Raises ValueError that names the key and the limits."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not 0 <= number <= LIMIT_GRAMS_PER_KWH:
        # A text may be anything, a key that a server sends back among it.
        shown = type(value).__name__ if isinstance(value, str | bytes | list | dict) else repr(value)[:40]
        raise ValueError(f"{key}={shown} is not possible; allowed: 0 to {LIMIT_GRAMS_PER_KWH:g} g CO2e/kWh")
    return number
