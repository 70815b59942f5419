"""One colour for each meaning, the same in every panel, and never two meanings of a panel in one colour.

Grafana's named colours follow its light and dark themes; gray is told apart from the background of either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from llmco2_vllm.core.batch import Phase
from llmco2_vllm.core.comparison import PhaseMix
from llmco2_vllm.core.metering import Doubt

FAILURES: Final = "failure: "
_FAULTS: Final = {
    Doubt.LOST: "purple",
    Doubt.SHARED: "yellow",
    Doubt.GAP: "green",
    Doubt.FROZEN: "super-light-purple",
    Doubt.COUNTER_DECREASED: "dark-purple",
    Doubt.DRIVER_RELOADED: "dark-green",
    Doubt.CLOCK_SUSPENDED: "super-light-green",
    Doubt.SCOPE_CHANGED: "dark-yellow",
    Doubt.SLEEPING: "gray",
    Doubt.NOT_SUPPORTED: "super-light-yellow",
    Doubt.INTEGRATED_POWER: "super-light-blue",
    Doubt.LAG_LEARNT: "text",
    Doubt.OVERFLOWED: "semi-dark-green",
}
COLOURS: Final = {
    "prefill": "blue",
    "mixed": "super-light-blue",
    "decode": "purple",
    "idle": "yellow",
    "awake": "yellow",
    "sleeping": "gray",
    "operational, awake": "yellow",
    "operational, sleeping": "gray",
    "embodied": "green",
    "embodied, busy": "green",
    "embodied, idle": "super-light-green",
    "metered": "text",
    "requests": "blue",
    "measured": "blue",
    "predicted": "super-light-purple",
    "predicted p95": "dark-purple",
    "without an intensity": "dark-red",
    "aborted": "orange",
    "recomputed": "semi-dark-red",
    "rejected drafts": "super-light-orange",
    "cached": "light-green",
    "location": "blue",
    "market": "dark-green",
    "p50": "super-light-blue",
    "p95": "blue",
    "p99": "dark-blue",
    "mean": "purple",
    "hook": "dark-orange",
    "trusted": "blue",
    "not trusted": "orange",
    **{f"fault: {doubt}": colour for doubt, colour in _FAULTS.items()},
}
# What a legend made of a label reads.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "{{phase}}": tuple(Phase),
    "{{phase_mix}}": tuple(PhaseMix),
    "{{state}}": ("awake", "sleeping"),
    "operational, {{state}}": ("operational, awake", "operational, sleeping"),
    "embodied, {{state}}": ("embodied, busy", "embodied, idle"),
    "{{basis}}": ("location", "market"),
    "fault: {{kind}}": tuple(f"fault: {doubt}" for doubt in _FAULTS),
}


def names(legend: str) -> tuple[str, ...]:
    """What a legend reads, for each value that its label can have; the legend itself where they are not known."""
    return _NAMES.get(legend, (legend,))


def overrides(legends: Iterable[str]) -> list[dict[str, Any]]:
    """Grafana's overrides that give series their colours; failures, of any place, are shades of red."""
    found = dict.fromkeys(name for legend in legends for name in names(legend))
    fixed = [_colour("byName", name, "fixed", COLOURS[name]) for name in found if name in COLOURS]
    failures = any(name.startswith(FAILURES) for name in found)
    return [*fixed, *([_colour("byRegexp", f"/^{FAILURES}/", "shades", "red")] if failures else [])]


def _colour(matcher: str, matched: str, mode: str, colour: str) -> dict[str, Any]:
    value = {"fixedColor": colour, "mode": mode}
    return {"matcher": {"id": matcher, "options": matched}, "properties": [{"id": "color", "value": value}]}
