"""The carbon intensity that the servers showed, by the hour: what is asked of Prometheus, and what its answers say.

A figure is of use only where all servers agree on it: the mean of two zones is the intensity of neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from llmco2_vllm.reporting.hours import RecordedIntensity

# What servers of one zone may differ by in an hour, as they ask at different moments.
AGREEMENT_RATIO: Final = 0.01
MIXED: Final = (
    "recorded {} intensities: the servers showed average and marginal ones, which are never mixed; none is taken"
)
APART: Final = (
    "recorded {} intensities: in {} hours the servers differ by more than 1 %, as servers in several zones do; no "
    "grams of those hours are known. Report each zone by itself with --match 'instance=\"HOST:PORT\"', or state the "
    "intensity with --intensity or --intensity-file"
)


class Series(NamedTuple):
    """One series of an answer: its labels, and its value at the end of each hour that has one."""

    labels: Mapping[str, str]
    values: Mapping[int, float]


class Gauge(NamedTuple):
    """How a gauge is asked for: over the servers, over the hour."""

    servers: str
    hour: str
    metric: str


_GRAMS: Final = "llmco2_grid_intensity_grams_per_kwh"
GAUGES: Final = {
    "mean": Gauge("avg by (basis)", "avg_over_time", _GRAMS),
    "lowest": Gauge("min by (basis)", "avg_over_time", _GRAMS),
    "highest": Gauge("max by (basis)", "avg_over_time", _GRAMS),
    "known": Gauge("min by (basis)", "min_over_time", "llmco2_grid_intensity_known"),
    "estimated": Gauge("max by (basis)", "max_over_time", "llmco2_grid_intensity_estimated"),
    "kinds": Gauge("max by (basis, method, source, zone)", "max_over_time", "llmco2_grid_info"),
}


def intensities(answers: Mapping[str, Iterable[Series]]) -> tuple[dict[str, RecordedIntensity], list[str]]:
    """What the servers showed, by basis, and what of it is not taken and why. answers: by the keys of ``GAUGES``.

    An hour is unknown when its mean is no number, a server did not know it for a while, or servers differ. A basis of
    two methods is left out.
    """
    values = {name: _by_hour(answers[name]) for name in GAUGES if name != "kinds"}
    kinds: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for basis, series in _by_basis(answers["kinds"]):
        kinds[basis] += [series.labels] if any(series.values.values()) else []
    found, said = {}, []
    for basis in sorted(values["mean"].keys() | values["known"].keys()):
        methods = {kind.get("method", "average") for kind in kinds[basis]}
        if len(methods) > 1:
            said.append(MIXED.format(basis))
            continue
        mean, known = values["mean"].get(basis, {}), values["known"].get(basis, {})
        lowest, highest = (values[name].get(basis, {}) for name in ("lowest", "highest"))
        apart = {hour for hour in mean if highest.get(hour, 0.0) > (1 + AGREEMENT_RATIO) * lowest.get(hour, mean[hour])}
        grams = {hour: value for hour, value in mean.items() if hour not in apart and known.get(hour, 1.0)}
        estimated = frozenset(hour for hour, value in values["estimated"].get(basis, {}).items() if value)
        method = next(iter(methods), "average")
        found[basis] = RecordedIntensity(grams, estimated, method, _origins(kinds[basis]))
        said += [APART.format(basis, len(apart))] if apart else []
    return found, said


def _origins(kinds: Sequence[Mapping[str, str]]) -> list[str]:
    """Sources and zones in words."""
    return sorted(
        {kind.get("source", "unknown source") + (f" in {kind['zone']}" if kind.get("zone") else "") for kind in kinds}
    )


def _by_hour(found: Iterable[Series]) -> dict[str, dict[int, float]]:
    """Values by basis and hour; a basis whose values are none is there too."""
    values: dict[str, dict[int, float]] = {}
    for basis, series in _by_basis(found):
        values.setdefault(basis, {}).update(series.values)
    return values


def _by_basis(found: Iterable[Series]) -> Iterator[tuple[str, Series]]:
    return ((series.labels.get("basis") or "location", series) for series in found)
