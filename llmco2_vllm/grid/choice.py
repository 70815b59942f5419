"""From what is asked for to a chain: everything that can be wrong shows here, at start, in one line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmco2_vllm.core.intensity import Basis, Factors, Kind, Method
from llmco2_vllm.grid import electricity_maps, uk_carbon_intensity, watttime
from llmco2_vllm.grid.cache import Cache, cache_folder
from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.feed import Feed
from llmco2_vllm.grid.keys import Key
from llmco2_vllm.grid.live import LiveProvider, Patience
from llmco2_vllm.grid.provider import Provider
from llmco2_vllm.grid.regions import zone_of
from llmco2_vllm.grid.series import SeriesProvider
from llmco2_vllm.grid.server import TIMEOUT_SECONDS, Server
from llmco2_vllm.grid.stated import ConstantProvider, TableProvider
from llmco2_vllm.grid.zones import WORLD

PROVIDERS = ("constant", "static", "file", "electricity-maps", "watttime", "uk-carbon-intensity")
BASE_URLS = {
    "electricity-maps": electricity_maps.BASE_URL,
    "watttime": watttime.BASE_URL,
    "uk-carbon-intensity": uk_carbon_intensity.BASE_URL,
}
_WATTTIME_REGION = re.compile(r"[A-Z0-9_]+")


@dataclass(frozen=True, slots=True)
class GridChoice:
    """What is asked for; None where nothing is.

    provider: one of ``PROVIDERS``. zone: of the grid; WattTime's own region names for watttime.
    region: ``aws:eu-west-3``, instead of zone. grams_per_kwh: of constant. intensity_file: of file.
    method, basis, factors: what the figures of constant and file are; factors also of electricity-maps.
    key_file: holds the key instead of ELECTRICITY_MAPS_API_KEY or WATTTIME_PASSWORD.
    provider_url: another address of the same API. cache: folder; None for the user's cache.
    """

    provider: str = "static"
    zone: str | None = None
    region: str | None = None
    grams_per_kwh: float | None = None
    intensity_file: Path | None = None
    method: Method = "average"
    basis: Basis = "location"
    factors: Factors | None = None
    key_file: Path | None = None
    provider_url: str | None = None
    cache: Path | None = None
    timeout_seconds: float = TIMEOUT_SECONDS
    patience: Patience | None = None


def open_chain(
    choice: GridChoice, environment: Mapping[str, str] | None = None, clock: Callable[[], float] = time.time
) -> Chain:
    """The chain for a choice: the provider itself, the yearly average of its zone, the world's.

    The last two are only there where they are of the same kind: never after marginal, market-based or direct figures.
    Raises ValueError with one line that names the key and what is allowed.
    """
    if choice.provider not in PROVIDERS:
        raise ValueError(f"provider={choice.provider!r} is not possible; allowed: {', '.join(PROVIDERS)}")
    zone = _zone(choice)
    if choice.provider == "static":
        return Chain([TableProvider(zone or WORLD), *_world(zone or WORLD)], clock)
    first = _first(choice, zone, os.environ if environment is None else environment, clock)
    return Chain([first, *_stand_ins(first.kind)] if choice.provider != "constant" else [first], clock)


def _zone(choice: GridChoice) -> str | None:
    """The zone asked for, checked. Raises ValueError."""
    if choice.provider == "watttime":
        if choice.zone is None or not _WATTTIME_REGION.fullmatch(choice.zone):
            raise ValueError(
                f"zone={choice.zone!r} is not possible; allowed: a region of WattTime, such as CAISO_NORTH"
            )
        return choice.zone
    return zone_of(choice.zone, choice.region)


def _first(
    choice: GridChoice, zone: str | None, environment: Mapping[str, str], clock: Callable[[], float]
) -> Provider:
    kind = Kind(zone, choice.method, choice.basis, choice.factors)
    if choice.provider == "constant":
        if choice.grams_per_kwh is None:
            raise ValueError("intensity is missing; allowed: 0 to 3000 g CO2e/kWh")
        return ConstantProvider(choice.grams_per_kwh, kind)
    if choice.provider == "file":
        if choice.intensity_file is None:
            raise ValueError("intensity_file is missing; allowed: the path of a .csv, .csv.gz or .parquet")
        return SeriesProvider(choice.intensity_file, kind)
    try:
        server = Server(choice.provider_url or BASE_URLS[choice.provider], clock, choice.timeout_seconds)
    except ValueError as error:
        raise ValueError(f"provider {choice.provider}: {error}") from None
    feed = _feed(choice, zone, environment, server)
    own = (choice.provider_url or BASE_URLS[choice.provider]).rstrip("/") == BASE_URLS[choice.provider]
    address = None if own else choice.provider_url
    return LiveProvider(feed, Cache(choice.cache or cache_folder(), feed.name, feed.kind, address), choice.patience)


def _feed(choice: GridChoice, zone: str | None, environment: Mapping[str, str], server: Server) -> Feed:
    if choice.provider == "uk-carbon-intensity":
        if zone not in (None, uk_carbon_intensity.ZONE):
            raise ValueError(f"zone={zone!r} is not possible for uk-carbon-intensity; allowed: GB")
        return uk_carbon_intensity.UkCarbonIntensityFeed(server)
    if zone is None:
        raise ValueError(f"zone is missing for {choice.provider}; allowed: a zone such as FR or US-CAL-CISO")
    if choice.provider == "watttime":
        user = Key(watttime.USER_VARIABLE, None, environment)
        return watttime.WattTimeFeed(server, zone, user, Key(watttime.PASSWORD_VARIABLE, choice.key_file, environment))
    key = Key(electricity_maps.KEY_VARIABLE, choice.key_file, environment)
    return electricity_maps.ElectricityMapsFeed(server, zone, key, choice.factors or "lifecycle")


def _stand_ins(kind: Kind) -> list[Provider]:
    """Yearly averages that may stand in for figures of ``kind``.

    The zones' averages are lifecycle figures and the world's does not say: neither stands in for direct ones, which
    count combustion alone.
    """
    if kind.method != "average" or kind.basis != "location" or kind.factors == "direct":
        return []
    found: list[Provider] = []
    if kind.zone is not None:
        with suppress(ValueError):  # a zone of Electricity Maps that the table does not have
            found.append(TableProvider(kind.zone))
    return [*found, *_world(found[-1].kind.zone if found else None)]


def _world(zone: str | None) -> list[Provider]:
    return [] if zone == WORLD else [TableProvider(WORLD)]
