"""The one metric table, and the recorder that feeds it.

Plain counters, gauges and histograms with prometheus_client, because collectors, Info and Enum
do not exist in its multiprocess mode. Joules here are predicted; a measured family is another
name. Names carry no colon and labels never a request id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

# 0.1 J to 100 kJ in steps of 1-2-5.
JOULE_BUCKETS = (*(m * 10.0**e for e in range(-1, 5) for m in (1, 2, 5)), 1e5)


class Metric(NamedTuple):
    """A row of the table."""

    kind: type[MetricWrapperBase]
    help: str
    labels: tuple[str, ...]


_ENGINE = ("model_name", "engine")
_PHASE = (*_ENGINE, "phase")

METRICS: dict[str, Metric] = {
    "llmco2_predicted_energy_joules_total": Metric(
        Counter, "Predicted device energy of all scheduled steps, aborted requests included.", _PHASE
    ),
    "llmco2_predicted_carbon_grams_total": Metric(
        Counter, "Operational CO2e of the predicted energy, with PUE and node overhead as configured.", _PHASE
    ),
    "llmco2_tokens_total": Metric(Counter, "Tokens computed; cached prompt tokens are not computed.", _PHASE),
    "llmco2_predicted_aborted_energy_joules_total": Metric(
        Counter, "Part of the predicted energy that went to requests whose client left or that failed.", _ENGINE
    ),
    "llmco2_cached_tokens_total": Metric(
        Counter, "Prompt tokens of ended requests taken from the prefix cache.", _ENGINE
    ),
    "llmco2_recomputed_tokens_total": Metric(Counter, "Tokens of ended requests replayed after a preemption.", _ENGINE),
    "llmco2_rejected_draft_tokens_total": Metric(
        Counter, "Draft tokens of ended requests that were computed and rejected.", _ENGINE
    ),
    "llmco2_steps_total": Metric(Counter, "Scheduler steps that computed tokens.", _ENGINE),
    "llmco2_step_duration_seconds_total": Metric(
        Counter, "Measured duration of the steps, tiled over busy time.", _ENGINE
    ),
    "llmco2_predicted_step_duration_seconds_total": Metric(Counter, "Predicted duration of the same steps.", _ENGINE),
    "llmco2_hook_duration_seconds_total": Metric(
        Counter, "Time the hook spent pricing steps and writing ledgers.", _ENGINE
    ),
    "llmco2_hook_failures_total": Metric(
        Counter, "Exceptions of ours that were caught; the hook that failed is off.", ("model_name", "engine", "where")
    ),
    "llmco2_request_predicted_energy_joules": Metric(
        Histogram, "Predicted energy per finished engine request.", _ENGINE
    ),
    "llmco2_grid_intensity_grams_per_kwh": Metric(
        Gauge, "Carbon intensity in use, g CO2e per kWh.", ("zone", "source", "method")
    ),
    "llmco2_build_info": Metric(
        Gauge,
        "Always 1; says what prices and what measures.",
        ("model_name", "version", "vllm_version", "predictor", "meter"),
    ),
}

# Counters that follow a field of the engine's cumulative snapshot.
_SNAPSHOT_COUNTERS = {
    "llmco2_predicted_aborted_energy_joules_total": "aborted_joules",
    "llmco2_cached_tokens_total": "cached_tokens",
    "llmco2_recomputed_tokens_total": "recomputed_tokens",
    "llmco2_rejected_draft_tokens_total": "rejected_draft_tokens",
    "llmco2_steps_total": "steps",
    "llmco2_step_duration_seconds_total": "step_seconds",
    "llmco2_predicted_step_duration_seconds_total": "predicted_seconds",
    "llmco2_hook_duration_seconds_total": "hook_seconds",
}
_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the info metric says."""

    model_name: str
    version: str
    vllm_version: str


# A registry takes each name once, and a process may start several engines one after the other.
_made: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()


class Recorder:
    """Feeds the Prometheus objects of one front-end process; they are created once, on first use."""

    def __init__(self, identity: Identity, registry: CollectorRegistry = REGISTRY) -> None:
        self.identity = identity
        self._metrics = _made.setdefault(registry, {})
        self._seen: dict[tuple[str, str], float] = {}
        for name, metric in METRICS.items():
            if name in self._metrics:
                continue
            options: dict[str, Any] = {"registry": registry}
            if metric.kind is Histogram:
                options["buckets"] = JOULE_BUCKETS
            if metric.kind is Gauge:
                options["multiprocess_mode"] = "mostrecent"
            self._metrics[name] = metric.kind(name, metric.help, metric.labels, **options)

    def request_finished(self, engine: int, energy_joules: float) -> None:
        """Count one finished engine request."""
        histogram = self._metrics["llmco2_request_predicted_energy_joules"]
        histogram.labels(self.identity.model_name, str(engine)).observe(energy_joules)

    def intensity(self, grams_per_kwh: float, zone: str, source: str, method: str) -> None:
        """Show the carbon intensity in use."""
        self._metrics["llmco2_grid_intensity_grams_per_kwh"].labels(zone, source, method).set(grams_per_kwh)

    def engine(self, snapshot: Mapping[str, Any], grams_per_joule: float) -> None:
        """Advance the counters by what is new since the last snapshot of this engine.

        The snapshot is cumulative, so one that never arrived costs nothing; a restart begins anew.
        """
        engine = str(snapshot["engine"])
        labels = (self.identity.model_name, engine)
        source = f"{engine} since {snapshot['started_seconds']}"
        for phase in _PHASES:
            joules = self._new(source, f"{phase}_joules", snapshot[f"{phase}_joules"])
            self._metrics["llmco2_predicted_energy_joules_total"].labels(*labels, phase).inc(joules)
            self._metrics["llmco2_predicted_carbon_grams_total"].labels(*labels, phase).inc(joules * grams_per_joule)
            tokens = self._new(source, f"{phase}_tokens", snapshot[f"{phase}_tokens"])
            self._metrics["llmco2_tokens_total"].labels(*labels, phase).inc(tokens)
        for name, field in _SNAPSHOT_COUNTERS.items():
            self._metrics[name].labels(*labels).inc(self._new(source, field, snapshot[field]))
        self.failures(engine, snapshot["failures"])
        provenance = snapshot["provenance"]
        self._metrics["llmco2_build_info"].labels(
            self.identity.model_name,
            self.identity.version,
            self.identity.vllm_version,
            provenance["predictor"],
            provenance["meter"],
        ).set(1)

    def failures(self, side: str, failures: Mapping[str, int]) -> None:
        """Advance the failure counter of an engine, or of the ``front_end``."""
        counter = self._metrics["llmco2_hook_failures_total"]
        for where, count in failures.items():
            counter.labels(self.identity.model_name, side, where).inc(self._new(side, f"failure {where}", count))

    def _new(self, source: str, field: str, value: float) -> float:
        # Two pulls may be under way: one that was overtaken brings nothing.
        last = self._seen.get((source, field), 0.0)
        self._seen[source, field] = max(value, last)
        return max(value - last, 0.0)
