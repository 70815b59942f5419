"""Which rows are worth a look: the best by a figure, and those that no other row beats in both carbon and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from llmco2_vllm.advice.sweep import Row

Item = TypeVar("Item")

FIGURES: Mapping[str, Callable[[Row], float | None]] = {
    "total": lambda row: row.total_grams,
    "operational": lambda row: row.operational_grams,
    "embodied": lambda row: row.embodied_grams,
    "energy": lambda row: row.energy_joules + row.idle_joules,
    "edp": lambda row: row.edp_joule_seconds,
    "cdp": lambda row: row.cdp_gram_seconds,
    "cep": lambda row: row.cep_gram_joules,
    "tcdp": lambda row: row.tcdp_gram_seconds,
}
"""What rows can be ranked by; the smaller the better."""


def best(rows: Iterable[Row], by: str = "total") -> dict[tuple[str, str], Row]:
    """For each zone and device the row with the least of ``by``.

    A device of which ``by`` is not known, for want of an embodied figure, is there with its least operational carbon,
    to be told by the figures it lacks. Keys are in the order of the rows' first sight; of equal rows the first wins.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.zone, row.configuration.device)
        if key not in found or _rank(row, by) < _rank(found[key], by):
            found[key] = row
    return found


def _rank(row: Row, by: str) -> float:
    value = FIGURES[by](row)
    return row.operational_grams if value is None else value


def front(items: Sequence[Item], coordinates: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """The Pareto front: items that no other one is at most equal to in both coordinates and below in one.

    Both coordinates are the smaller the better; ascending in the first.
    """
    kept: list[Item] = []
    ordered = sorted(items, key=coordinates)
    lowest = float("inf")
    for item in ordered:
        first, second = coordinates(item)
        same = bool(kept) and coordinates(kept[-1]) == (first, second)
        if second < lowest or same:
            kept.append(item)
            lowest = second
    return kept
