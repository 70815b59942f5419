"""Constants of the embodied models, each with unit, source and year: ``data/embodied.toml`` as named values.

A constant is only ever read in a unit that the reader names, so a wrong unit is an error and not a wrong figure.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from llmco2_vllm.core.units import convert

STATUSES = ("seen", "derived", "recalled")


@dataclass(frozen=True, slots=True)
class Constant:
    """One published figure.

    name: path in the catalog: ``product.h100-sxm``, ``act.energy-per-area.7nm``.
    source, year: key of the document in :func:`sources`, and its year.
    status: seen (read there), derived (arithmetic from seen figures) or recalled (still to be compared).
    spread_ratio: relative half-width of the uncertainty; None when nobody states one.
    facts: other fields of the row: devices, node, count, memory.
    """

    name: str
    value: float
    unit: str
    source: str
    year: int
    status: str
    note: str
    spread_ratio: float | None
    facts: Mapping[str, Any]

    def to(self, unit: str) -> float:
        """The figure in ``unit``. Raises ValueError that names the constant when the dimensions differ."""
        try:
            return convert(self.value, self.unit, unit)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


@cache
def _document() -> Mapping[str, Any]:
    return tomllib.loads(files("llmco2_vllm").joinpath("data", "embodied.toml").read_text("utf-8"))


def sources() -> Mapping[str, Mapping[str, str]]:
    """Documents by key: title, url, licence, and notice where the licence asks for one."""
    found: Mapping[str, Mapping[str, str]] = _document()["source"]
    return found


@cache
def constants() -> Mapping[str, Constant]:
    """All constants by name."""
    sections = {name: rows for name, rows in _document().items() if name not in ("schema", "source")}
    return {
        constant.name: constant
        for section, rows in sections.items()
        for name, row in rows.items()
        for constant in _expand(f"{section}.{name}", row)
    }


def _expand(path: str, row: Mapping[str, Any]) -> Iterator[Constant]:
    """The constants of one table: one for ``value``, one per key of ``values``."""
    known = ("value", "values", "unit", "source", "year", "status", "note", "spread_ratio")
    facts = {key: value for key, value in row.items() if key not in known}
    described = (row["unit"], row["source"], row["year"], row["status"], row.get("note", ""), row.get("spread_ratio"))
    if "value" in row:
        yield Constant(path, float(row["value"]), *described, facts)
    for key, value in row.get("values", {}).items():
        yield Constant(f"{path}.{key}", float(value), *described, facts)


def constant(name: str) -> Constant:
    """The constant called ``name``. Raises ValueError that lists what is allowed beside it."""
    found = constants().get(name)
    if found is None:
        group, _, wanted = name.rpartition(".")
        raise ValueError(f"{wanted!r} is not in the catalog; allowed: {', '.join(names_in(group))}")
    return found


def names_in(group: str) -> tuple[str, ...]:
    """Last parts of the names under ``group``, in the catalog's order: names_in("component.hbm") is hbm2, ..."""
    return tuple(name.removeprefix(f"{group}.") for name in constants() if name.startswith(f"{group}."))


def for_device(section: str, device: str) -> tuple[Constant, ...]:
    """The constants of ``section`` that list ``device``, a name of ``devices.toml``; empty when there is none."""
    rows = constants().items()
    return tuple(row for name, row in rows if name.startswith(f"{section}.") and device in row.facts.get("devices", ()))
