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
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import httpx

from llmco2_vllm.core.units import SECONDS_PER_HOUR
from llmco2_vllm.reporting.hours import (
    HOURS_PER_DAY,
    Period,
    Record,
    Selection,
    Use,
    chosen_model,
    hour_of,
)
from llmco2_vllm.reporting.recorded import GAUGES, Series, intensities

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
    Counter("llmco2_recomputed_tokens_total", {"": "recomputed_tokens"}),
    Counter("llmco2_rejected_draft_tokens_total", {"": "rejected_draft_tokens"}),
    _by("state", "llmco2_embodied_carbon_grams_total", "embodied_{}_grams", "busy", "idle"),
    Counter("llmco2_request_energy_joules_count", {"": "measured_requests"}),
    Counter("llmco2_request_predicted_energy_joules_count", {"": "requests"}),
)
# Without its label a counter is there from its first event on: before, nothing happened.
_FROM_FIRST_EVENT = ("requests", "measured_requests", "recomputed_tokens", "rejected_draft_tokens")
_WASTED = {
    "recomputed_tokens": "computed again after a preemption",
    "rejected_draft_tokens": "of drafts that were rejected",
}
# Of the metrics themselves, which do not share them: by such a label some would be asked for and others never found.
OWN_LABELS: Final = ("model_name", "engine", "phase", "state", "basis", "zone", "source", "method")
_MATCHER = r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)\s*"(?:[^"\\\n]|\\[abfnrtv\\"])*"\s*'


class PrometheusError(ValueError):
    """Prometheus could not be asked, or its answer is none; the message is one line."""


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
    """An expression over some hours. of: the counter it asks for, or the name of a gauge of the grid."""

    expression: str
    period: Period
    of: Counter | str


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


def check_match(text: str) -> str:
    """Label matchers as a selector holds them, checked: ``instance="a",job=~"x.*"``. Raises ValueError, one line."""
    if not re.fullmatch(f"{_MATCHER}(?:,{_MATCHER})*", text):
        raise ValueError(
            f"match={text[:80]!r} is not possible; allowed: label matchers with commas between them, such as "
            'instance="a",job=~"x.*"'
        )
    for label in re.findall(f"{_MATCHER}(?:,|$)", text):
        if label in (*OWN_LABELS, "__name__"):
            hint = "; --model chooses a model" if label == "model_name" else ""
            raise ValueError(f"match={label!r} is not possible; allowed: labels of the scrape, instance or job{hint}")
    return text.strip()


def questions(period: Period, match: str = "") -> list[Question]:
    """All that is asked, a month at a time. match: label matchers for every query, as ``check_match`` takes them."""
    parts = [Period(h, min(h + HOURS_AT_ONCE, period.end)) for h in range(period.begin, period.end, HOURS_AT_ONCE)]
    selector = f"{{{match}}}[1h]" if match else "[1h]"
    texts: list[tuple[str, Counter | str]] = [(_increase(counter, selector), counter) for counter in COUNTERS]
    texts += [(f"{one.servers} ({one.hour}({one.metric}{selector}))", name) for name, one in GAUGES.items()]
    return [Question(text, part, of) for part in parts for text, of in texts]


def read(server: Prometheus, selection: Selection, period: Period, asked: Iterable[Question]) -> Record:
    """The record of what ``questions(period)`` are answered.

    Raises PrometheusError, and ValueError when no llmco2 metric is there, or none of that model.
    """
    amounts: defaultdict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    grid: dict[str, list[Series]] = {name: [] for name in GAUGES}
    for question in asked:
        found = server.query(question.expression, question.period)
        if isinstance(question.of, str):
            grid[question.of] += found
        else:
            _collect(question.of, found, amounts)
    if not amounts:
        raise ValueError(f"prometheus {server.host}: no llmco2 metrics from {period}")
    model = chosen_model(selection.model, (name for _, name in amounts))
    counted = {name for found in amounts.values() for name in found}
    uses = [
        Use(hour, name, _completed(found, counted))
        for (hour, name), found in sorted(amounts.items())
        if model is None or name == model
    ]
    known, untaken = intensities(grid)
    unknown = [*_UNKNOWN, *untaken, *_uncounted(counted)]
    return Record(f"Prometheus, {server.host}", period, uses, _NOTES, unknown, None, known)


def _uncounted(counted: set[str]) -> list[str]:
    """Tokens in the divisor that were of no use, as nothing counts them."""
    return [
        f"tokens {words}: not counted here, so those there were are still in what SCI is divided by"
        for name, words in _WASTED.items()
        if name not in counted
    ]


def _increase(counter: Counter, selector: str) -> str:
    labels = ", ".join(("model_name", counter.label) if counter.label else ("model_name",))
    return f"sum by ({labels}) (increase({counter.metric}{selector}))"


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
