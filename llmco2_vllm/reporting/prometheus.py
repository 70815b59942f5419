"""From the counters that Prometheus keeps to what each model took in each hour.

Every counter is asked for by ``increase(...[1h])`` at the ends of hours (HTTP API, ``/api/v1/query_range``:
https://prometheus.io/docs/prometheus/latest/querying/api/), which knows of restarts and extrapolates from the first
and last scrape of an hour to its edges.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import httpx

from llmco2_vllm.core.units import SECONDS_PER_HOUR
from llmco2_vllm.reporting.hours import (
    HOURS_PER_DAY,
    Period,
    Record,
    RecordedIntensity,
    Selection,
    Use,
    chosen_model,
    hour_of,
)

TIMEOUT_SECONDS: Final = 60.0
DEFAULT_DAYS: Final = 7
# Prometheus answers with at most 11 000 points of a series; a month is quick to compute.
HOURS_AT_ONCE: Final = 30 * HOURS_PER_DAY
_NOTES = (
    "Prometheus extrapolates from the first and last scrape of an hour to its edges; what a counter had reached before "
    "its first scrape is not in it.",
    "Unattributed is metered energy less that of requests and idleness, hour by hour; it also holds what steps at the "
    "edge of an hour shift to the next.",
    "Embodied carbon is as the servers counted it; PUE and what the node adds are as given to this report.",
)
_UNKNOWN = (
    "uncertainty of the meter by window: Prometheus does not hold it; a card's gain is the part that is known",
    "worst windows: Prometheus holds a histogram of errors, not the windows; ask the sample store",
)


class Counter(NamedTuple):
    """A counter and the amounts it tells, by the value of ``label``; without one its sum over all labels."""

    metric: str
    amounts: Mapping[str, str]
    label: str = ""


def _by(label: str, metric: str, amount: str, *values: str) -> Counter:
    return Counter(metric, {value: amount.format(value) for value in values}, label)


COUNTERS: Final = (
    Counter("llmco2_metered_energy_joules_total", {"": "energy_joules"}),
    _by("phase", "llmco2_energy_joules_total", "{}_joules", "prefill", "decode"),
    Counter("llmco2_idle_energy_joules_total", {"awake": "idle_joules", "sleeping": "sleeping_joules"}, "state"),
    Counter("llmco2_estimated_energy_joules_total", {"": "estimated_joules"}),
    Counter("llmco2_aborted_energy_joules_total", {"": "aborted_joules"}),
    Counter("llmco2_recomputed_energy_joules_total", {"": "recomputed_joules"}),
    Counter("llmco2_rejected_draft_energy_joules_total", {"": "rejected_draft_joules"}),
    Counter("llmco2_predicted_energy_joules_total", {"": "predicted_joules"}),
    _by("phase", "llmco2_tokens_total", "{}_tokens", "prefill", "decode"),
    _by("state", "llmco2_embodied_carbon_grams_total", "embodied_{}_grams", "busy", "idle"),
    Counter("llmco2_request_energy_joules_count", {"": "measured_requests"}),
    Counter("llmco2_request_predicted_energy_joules_count", {"": "requests"}),
)
# Without its label a counter is there from its first event on: before, nothing happened.
_FROM_FIRST_EVENT = ("requests", "measured_requests")
_MIXED = "recorded {} intensities: the servers showed average and marginal ones, which are never mixed; none is taken"
_INTENSITY = "avg by (basis) (avg_over_time(llmco2_grid_intensity_grams_per_kwh[1h]))"
_ESTIMATED = "max by (basis) (max_over_time(llmco2_grid_intensity_estimated[1h]))"
_KINDS = "max by (basis, method, source, zone) (max_over_time(llmco2_grid_info[1h]))"


class PrometheusError(ValueError):
    """Prometheus could not be asked, or its answer is none; the message is one line."""


class Series(NamedTuple):
    """One series of an answer: its labels, and its value at the end of each hour that has one."""

    labels: Mapping[str, str]
    values: Mapping[int, float]


class Prometheus:
    """A Prometheus server, or what speaks its HTTP API. Only its host is ever shown: an address may hold a password."""

    def __init__(self, url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Raises PrometheusError for an address that is none."""
        try:
            self._url = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            self._url = httpx.URL("")
        if self._url.scheme not in ("http", "https") or not re.fullmatch(r"[A-Za-z0-9.:_-]+", self._url.host):
            raise PrometheusError("prometheus: the address is not possible; allowed: http://HOST:PORT, https://HOST")
        self.host = self._url.netloc.decode()
        self._path = f"{self._url.path.rstrip('/')}/api/v1/query_range"
        self._client = httpx.Client(timeout=timeout_seconds)

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def query(self, expression: str, period: Period) -> list[Series]:
        """The value of an expression at the end of every hour. Raises PrometheusError."""
        seconds = (SECONDS_PER_HOUR * (period.begin + 1), SECONDS_PER_HOUR * period.end)
        question = {"query": expression, "start": f"{seconds[0]:.0f}", "end": f"{seconds[1]:.0f}", "step": "3600"}
        try:
            answer = self._client.get(self._url.copy_with(path=self._path), params=question)
        except (httpx.HTTPError, OSError) as error:
            # The text of such an error may quote the address.
            raise PrometheusError(f"prometheus {self.host} is not reachable ({type(error).__name__})") from None
        try:
            content = answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            content = None
        if not answer.is_success:
            said = content.get("error") if isinstance(content, Mapping) else None
            words = f": {' '.join(str(said).split())[:200]}" if said else ""
            raise PrometheusError(f"prometheus {self.host} answered {answer.status_code}{words}")
        try:
            return [_series(entry) for entry in content["data"]["result"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PrometheusError(f"prometheus {self.host} answered with something that is not its matrix") from None


class Question(NamedTuple):
    """An expression over some hours; counter: what it is of, None for the recorded intensities."""

    expression: str
    period: Period
    counter: Counter | None = None


def asked_period(selection: Selection, now_epoch_seconds: float) -> Period:
    """Whole hours of a selection, up to now; the last seven days where nothing is said. Raises ValueError."""
    begin, end = selection.bounds()
    now = hour_of(now_epoch_seconds)
    last = min(now, hour_of(end)) if math.isfinite(end) else now
    if not math.isfinite(begin):
        today = datetime.fromtimestamp((last - 1) * SECONDS_PER_HOUR, UTC).date()
        begin, _ = Selection(first=today - timedelta(days=DEFAULT_DAYS - 1)).bounds()
    if hour_of(begin) >= last:
        raise ValueError(f"from={selection.first} is not possible; allowed: a day before now")
    return Period(hour_of(begin), last)


def questions(period: Period) -> list[Question]:
    """All that is asked, a month at a time."""
    parts = [Period(h, min(h + HOURS_AT_ONCE, period.end)) for h in range(period.begin, period.end, HOURS_AT_ONCE)]
    counters = [Question(_increase(counter), part, counter) for part in parts for counter in COUNTERS]
    return [*counters, *(Question(text, part) for part in parts for text in (_INTENSITY, _ESTIMATED, _KINDS))]


def read(server: Prometheus, selection: Selection, period: Period, asked: Iterable[Question]) -> Record:
    """The record of what ``questions(period)`` are answered.

    Raises PrometheusError, and ValueError when no llmco2 metric is there, or none of that model.
    """
    amounts: defaultdict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    grid: dict[str, list[Series]] = {_INTENSITY: [], _ESTIMATED: [], _KINDS: []}
    for question in asked:
        found = server.query(question.expression, question.period)
        if question.counter is None:
            grid[question.expression] += found
        else:
            _collect(question.counter, found, amounts)
    if not amounts:
        raise ValueError(f"prometheus {server.host}: no llmco2 metrics from {period}")
    model = chosen_model(selection.model, (name for _, name in amounts))
    counted = {name for found in amounts.values() for name in found}
    uses = [
        Use(hour, name, _completed(found, counted))
        for (hour, name), found in sorted(amounts.items())
        if model is None or name == model
    ]
    intensities = _intensities(grid)
    unknown = [*_UNKNOWN, *(_MIXED.format(basis) for basis, found in intensities.items() if found is None)]
    known = {basis: found for basis, found in intensities.items() if found is not None}
    return Record(f"Prometheus, {server.host}", period, uses, _NOTES, unknown, None, known)


def _increase(counter: Counter) -> str:
    labels = ", ".join(("model_name", counter.label) if counter.label else ("model_name",))
    return f"sum by ({labels}) (increase({counter.metric}[1h]))"


def _collect(counter: Counter, found: Iterable[Series], amounts: Mapping[tuple[int, str], dict[str, float]]) -> None:
    for series in found:
        amount = counter.amounts.get(series.labels.get(counter.label, "") if counter.label else "")
        for hour, value in series.values.items() if amount else ():
            amounts[hour, series.labels.get("model_name", "")][str(amount)] = value


def _completed(found: Mapping[str, float], counted: set[str]) -> dict[str, float]:
    """With what follows from the rest: unattributed energy, and requests where none came."""
    amounts = dict(found)
    if "energy_joules" in amounts:
        split = ("prefill", "decode", "idle", "sleeping")
        known = [amounts.setdefault(f"{part}_joules", 0.0) for part in split]
        amounts["unattributed_joules"] = amounts["energy_joules"] - sum(known)
    for name in counted.intersection(_FROM_FIRST_EVENT):
        amounts.setdefault(name, 0.0)
    if "measured_requests" in amounts:
        amounts["requests"] = max(amounts.pop("measured_requests"), amounts.get("requests", 0.0))
    return amounts


def _series(entry: Any) -> Series:
    values = {round(float(at) / SECONDS_PER_HOUR) - 1: float(text) for at, text in entry["values"]}
    labels = {str(key): str(value) for key, value in entry["metric"].items()}
    return Series(labels, {hour: value for hour, value in values.items() if math.isfinite(value)})


def _intensities(grid: Mapping[str, list[Series]]) -> dict[str, RecordedIntensity | None]:
    """What the servers showed, by basis; None where it is of two methods, as they are never mixed."""
    grams: defaultdict[str, dict[int, float]] = defaultdict(dict)
    estimated: defaultdict[str, set[int]] = defaultdict(set)
    kinds: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for basis, series in _by_basis(grid[_INTENSITY]):
        grams[basis] |= series.values
    for basis, series in _by_basis(grid[_ESTIMATED]):
        estimated[basis] |= {hour for hour, value in series.values.items() if value}
    for basis, series in _by_basis(grid[_KINDS]):
        kinds[basis] += [series.labels] if any(series.values.values()) else []
    return {basis: _recorded(values, estimated[basis], kinds[basis]) for basis, values in grams.items()}


def _recorded(
    grams: Mapping[int, float], estimated: set[int], kinds: Sequence[Mapping[str, str]]
) -> RecordedIntensity | None:
    methods, origins = {kind.get("method", "average") for kind in kinds}, set()
    for kind in kinds:
        zone = f" in {kind['zone']}" if kind.get("zone") else ""
        origins.add(f"{kind.get('source', 'unknown source')}{zone}")
    if len(methods) > 1:
        return None
    return RecordedIntensity(grams, frozenset(estimated), next(iter(methods), "average"), sorted(origins))


def _by_basis(found: Iterable[Series]) -> Iterator[tuple[str, Series]]:
    return ((series.labels.get("basis") or "location", series) for series in found)
