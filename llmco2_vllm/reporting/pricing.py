"""From joules of an hour to grams of that hour: intensity, node and site, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llmco2_vllm.core.intensity import Kind, Method, mean_intensity
from llmco2_vllm.core.units import SECONDS_PER_HOUR
from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.regions import region, zone_of
from llmco2_vllm.grid.series import SeriesProvider
from llmco2_vllm.grid.stated import WORLD_SOURCE, ConstantProvider
from llmco2_vllm.reporting.hours import PARTS, Record, RecordedIntensity, Use
from llmco2_vllm.telemetry.accounting import Node

_WORLD = (
    "The world's average carbon intensity is used, as no zone is known: grids differ from it by a factor of ten and "
    "more. Say where this ran: --zone, --region, --intensity or --intensity-file."
)

_WORLD_RECORDED = (
    "For some or all of the time the servers had no intensity but the world's average: grids differ from it by a "
    "factor of ten and more. Say where this ran: --zone, --region, --intensity or --intensity-file."
)


class HourIntensity(NamedTuple):
    """Carbon intensity of one hour. source: who says so."""

    grams_per_kwh: float
    estimated: bool
    source: str


@dataclass(frozen=True)
class Grid:
    """Carbon intensity hour by hour, all of one kind. at: None for an hour that nobody knows, or a part of it.

    caution: what everybody should know who reads a figure by it.
    """

    method: str
    basis: str
    words: str
    at: Callable[[int], HourIntensity | None]
    caution: str = ""


@dataclass(frozen=True)
class SiteChoice:
    """What turns joules of devices into grams; None where nothing is said.

    zone, region, grams_per_kwh, file, market, method: of the electricity; market is a second figure, g CO2e/kWh or a
    file. pue, node_overhead_ratio, auxiliary_ratio: as the settings of these names.
    """

    zone: str | None = None
    region: str | None = None
    grams_per_kwh: float | None = None
    file: Path | None = None
    market: str | None = None
    method: Method = "average"
    pue: float | None = None
    node_overhead_ratio: float | None = None
    auxiliary_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.grams_per_kwh is not None and self.file is not None:
            raise ValueError("intensity and intensity-file are both there; allowed: one of them")
        if self.method == "marginal":
            if self.market is not None:
                raise ValueError(
                    "market-intensity is an average; allowed: without it, as averages never join marginals"
                )
            if not self._stated:
                raise ValueError("method=marginal needs intensity or intensity-file; the shipped table has averages")

    @property
    def _stated(self) -> bool:
        return self.grams_per_kwh is not None or self.file is not None

    @property
    def asked(self) -> bool:
        """Whether anything is said of the location's electricity."""
        return self._stated or self.zone is not None or self.region is not None


@dataclass(frozen=True)
class Pricing:
    """All that turns the joules of an hour into its grams."""

    location: Grid
    market: Grid | None = None
    node: Node = field(default_factory=Node)
    notes: Sequence[str] = field(default=())

    def priced(self, uses: Iterable[Use]) -> list[Use]:
        """The same with grams, as far as the intensity of their hour is known."""
        return [use._replace(amounts={**use.amounts, **self._of(use)}) for use in uses]

    def _of(self, use: Use) -> dict[str, float]:
        found = _tokens(use, "useful_tokens")
        location = self.location.at(use.hour)
        market = self.market.at(use.hour) if self.market else None
        energy = use.amounts.get("energy_joules")
        if energy is not None:
            found |= {"site_joules": self.node.site_joules(energy), **_tokens(use, "measured_tokens")}
            if market is not None:
                found["market_grams"] = self.node.operational_grams(energy, market.grams_per_kwh)
        if location is None:
            return found
        names = {"energy": "location", "predicted": "predicted_location", **{part: part for part in PARTS}}
        for name, gram_name in names.items():
            joules = use.amounts.get(f"{name}_joules")
            if joules is not None:
                found[f"{gram_name}_grams"] = self.node.operational_grams(joules, location.grams_per_kwh)
        if energy is not None:
            found |= {"priced_site_joules": found["site_joules"], **_functional(use, found["location_grams"])}
        return found


def _functional(use: Use, location_grams: float) -> dict[str, float]:
    """Grams of a priced hour beside what it served: numerators and denominators of the same hours."""
    amounts = use.amounts
    found = {"served_location_grams": location_grams}
    found |= _tokens(use, "served_tokens")
    if "requests" in amounts:
        found["served_requests"] = amounts["requests"]
    held = [amounts[name] for name in ("embodied_busy_grams", "embodied_idle_grams") if name in amounts]
    if held:
        found["served_embodied_grams"] = sum(held)
    return found


def _tokens(use: Use, name: str) -> dict[str, float]:
    """Tokens of use under ``name``: of both phases, less what is known to be wasted; nothing when unknown.

    A divisor that grew with what is computed again, or rejected, would call the waste an improvement. Wasted tokens are
    told when their request ends: an hour may hold those of the one before.
    """
    known = [use.amounts[phase] for phase in ("prefill_tokens", "decode_tokens") if phase in use.amounts]
    wasted = [use.amounts.get(part, 0.0) for part in ("recomputed_tokens", "rejected_draft_tokens")]
    return {name: sum(known) - sum(wasted)} if known else {}


def open_pricing(choice: SiteChoice, record: Record) -> Pricing:
    """The pricing of a choice; what servers recorded stands in where nothing is said. Raises ValueError, one line.

    A file speaks for its own hours alone: no average of a year stands in for an hour that it does not have.
    """
    recorded = (record.intensities or {}) if not choice.asked else {}
    location = _recorded(recorded["location"], "location") if "location" in recorded else _location(choice)
    market = None if choice.market is None else _market(choice.market, choice)
    if market is None and "market" in recorded and location.method == "average":
        market = _recorded(recorded["market"], "market")
    pue, notes = choice.pue, []
    if pue is None and choice.region is not None:
        named = region(choice.region)
        pue, notes = named.pue, [named.pue_note] if named.pue_note else []
    return Pricing(location, market, Node.stated(pue, choice.node_overhead_ratio, choice.auxiliary_ratio), notes)


def _location(choice: SiteChoice) -> Grid:
    zone = zone_of(choice.zone, choice.region)
    where = "" if zone is None else f" in {zone}"
    if choice.file is not None:
        provider = SeriesProvider(choice.file, Kind(zone, choice.method))
        words = f"{choice.file.name}{where}"
        return Grid(choice.method, "location", words, _hourly(Chain([provider])))
    if choice.grams_per_kwh is not None:
        chain = open_chain(GridChoice("constant", zone, grams_per_kwh=choice.grams_per_kwh, method=choice.method))
        return Grid(choice.method, "location", f"{choice.grams_per_kwh:g} g CO2e/kWh{where}, as stated", _hourly(chain))
    chain = open_chain(GridChoice("static", zone))
    words = f"yearly averages of the shipped table{where or ', world'}"
    caution = "" if where else _WORLD
    return Grid("average", "location", words, _hourly(chain), caution)


def _market(value: str, choice: SiteChoice) -> Grid:
    kind = Kind(choice.zone, "average", "market")
    try:
        grams = float(value)
    except ValueError:
        grams = None
    try:
        provider = SeriesProvider(Path(value), kind) if grams is None else ConstantProvider(grams, kind)
    except ValueError as error:
        raise ValueError(f"market-intensity: {error}") from None
    words = Path(value).name if grams is None else f"{grams:g} g CO2e/kWh, as stated"
    return Grid("average", "market", words, _hourly(Chain([provider])))


def _recorded(found: RecordedIntensity, basis: str) -> Grid:
    def at(hour: int) -> HourIntensity | None:
        grams = found.grams_per_kwh.get(hour)
        return None if grams is None else HourIntensity(grams, hour in found.estimated, "recorded by the servers")

    origins = f" ({', '.join(found.origins)})" if found.origins else ""
    caution = _WORLD_RECORDED if any(WORLD_SOURCE in origin for origin in found.origins) else ""
    return Grid(found.method, basis, f"as the servers recorded it, mean of each hour{origins}", at, caution)


def _hourly(chain: Chain) -> Callable[[int], HourIntensity | None]:
    """The mean over an hour by time; None as soon as a part of it is not known."""

    @cache
    def at(hour: int) -> HourIntensity | None:
        found = mean_intensity(chain.between(hour * SECONDS_PER_HOUR, (hour + 1) * SECONDS_PER_HOUR))
        return None if found is None else HourIntensity(found.grams_per_kwh, found.estimated, found.source)

    return at
