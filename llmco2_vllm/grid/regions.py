"""Cloud regions: the grid zone each stands in and, where its operator publishes one, a PUE.

``data/grid/regions.csv`` has one row a region; each names its sources, whose years are in ``sources.toml``. A PUE of
scope ``fleet`` is the operator's average over all its data centers, of scope ``geography`` over those of the Americas,
EMEA or Asia Pacific; neither is that of the region.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmco2_vllm.grid.stated import sources
from llmco2_vllm.grid.zones import check_zone, shipped_rows

PROVIDERS = ("aws", "azure", "gcp")
COLUMNS = ("provider", "region", "location", "zone", "zone_source", "pue", "pue_source")


@dataclass(frozen=True, slots=True)
class Region:
    """Where a cloud region stands.

    zone: as Electricity Maps names it. zone_source, zone_year: who says so, and the document's year.
    pue: power usage effectiveness, None where nobody publishes one that we could read.
    pue_scope: ``fleet`` or ``geography``.
    """

    provider: str
    region: str
    location: str
    zone: str
    zone_source: str
    zone_year: int
    pue: float | None = None
    pue_source: str | None = None
    pue_year: int | None = None
    pue_scope: str | None = None

    @property
    def pue_note(self) -> str | None:
        """The PUE, who says so and of what; None without one."""
        if self.pue is None:
            return None
        return f"PUE {self.pue:g} of {self.provider}:{self.region}: {self.pue_source}, {self.pue_scope}."


def region(name: str) -> Region:
    """The region called ``provider:region``: aws:eu-west-3. Raises ValueError that names near ones."""
    return find(name, shipped_regions())


def zone_of(zone: str | None, region_name: str | None) -> str | None:
    """The zone that is asked for by itself or by a region in it; None where neither is.

    Raises ValueError for both of them, and for one that is not known.
    """
    if zone is not None and region_name is not None:
        raise ValueError(f"region={region_name!r} and zone={zone!r} are both there; allowed: one of them")
    named = zone if region_name is None else region(region_name).zone
    return None if named is None else check_zone(named)


def find(name: str, known: Mapping[str, Region]) -> Region:
    """As :func:`region`, in a table of the caller's."""
    found = known.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"; near: {', '.join(close)}" if close else ""
        raise ValueError(f"region={name!r} is not in the table; allowed: aws:REGION, azure:REGION, gcp:REGION{hint}")
    return found


@cache
def shipped_regions() -> Mapping[str, Region]:
    """The shipped table by ``provider:region``."""
    return check_regions(shipped_rows("regions"), "regions.csv")


def load_regions(path: Path) -> Mapping[str, Region]:
    """A table of the user's with the same columns. Raises ValueError with one line that names file, row and key."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return check_regions(csv.DictReader(file), path.name)
    except OSError as error:
        raise ValueError(f"regions={str(path)!r} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"regions={str(path)!r} is not CSV") from None


def check_regions(rows: Iterable[Mapping[str, str | None]], name: str) -> Mapping[str, Region]:
    """Regions by ``provider:region``. Raises ValueError for a row twice, a blank zone, a PUE below 1, no source."""
    found: dict[str, Region] = {}
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            raise ValueError(f"{where}: column {missing[0]!r} is missing")
        one = _region({column: str(row[column]).strip() for column in COLUMNS}, where)
        key = f"{one.provider}:{one.region}"
        if key in found:
            raise ValueError(f"{where}: region={key!r} is there twice")
        found[key] = one
    return found


def _region(row: Mapping[str, str], where: str) -> Region:
    if row["provider"] not in PROVIDERS:
        raise ValueError(f"{where}: provider={row['provider']!r} is not possible; allowed: {', '.join(PROVIDERS)}")
    for key in ("region", "zone"):
        if not row[key]:
            raise ValueError(f"{where}: {key} is blank")
    try:
        zone = check_zone(row["zone"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    zone_year, _ = _document(row["zone_source"], "zone_source", where)
    names = (row["provider"], row["region"].lower(), row["location"], zone, row["zone_source"], zone_year)
    if not row["pue"]:
        return Region(*names)
    pue_year, scope = _document(row["pue_source"], "pue_source", where)
    return Region(*names, _pue(row["pue"], where), row["pue_source"], pue_year, scope)


def _pue(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 5:
        raise ValueError(f"{where}: pue={text!r} is not possible; allowed: 1 to 5, or blank when unknown")
    return value


def _document(source: str, key: str, where: str) -> tuple[int, str | None]:
    """Year and scope of a document: one of ``sources.toml``, or ``name-YEAR`` in a user's table."""
    known = sources().get(source)
    if known is not None:
        return int(known["year"]), known.get("scope")
    year = source.rpartition("-")[2]
    if not (len(year) == 4 and year.isascii() and year.isdigit()):
        raise ValueError(
            f"{where}: {key}={source!r} is not possible; allowed: a source and its year, such as report-2025"
        )
    return int(year), None
