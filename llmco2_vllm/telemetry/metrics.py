"""The recorder that feeds the metrics of the table.

Plain counters, gauges and histograms with prometheus_client, because collectors, Info and Enum
do not exist in its multiprocess mode.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram

from llmco2_vllm.core.embodied import split_idle
from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.telemetry.exposition import FAMILIES
from llmco2_vllm.telemetry.metric_table import BUCKETS, JOULE_BUCKETS, METRICS

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
# The same of its part "metered", there with a meter.
_METERED_COUNTERS = {
    "llmco2_metered_energy_joules_total": "metered_joules",
    "llmco2_estimated_energy_joules_total": "estimated_joules",
    "llmco2_aborted_energy_joules_total": "aborted_joules",
    "llmco2_recomputed_energy_joules_total": "recomputed_joules",
    "llmco2_rejected_draft_energy_joules_total": "rejected_draft_joules",
}
_METERED_GAUGES = {
    "llmco2_unattributed_energy_joules": "unattributed_joules",
    "llmco2_conservation_residual_joules": "residual_joules",
}
FAULTS = tuple(doubt.value for doubt in Doubt if doubt is not Doubt.NONE)
_UNPRICED = {
    "llmco2_predicted_carbon_grams_total": "predicted",
    "llmco2_carbon_grams_total": "requests",
    "llmco2_idle_carbon_grams_total": "idle",
}
_STATES = {"awake": "idle_joules", "sleeping": "sleeping_joules"}
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

    def __init__(
        self,
        identity: Identity,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity, self._clock = identity, clock
        self._up_seconds: dict[str, tuple[float, float]] = {}
        self._metrics = _made.setdefault(registry, {})
        self._seen: dict[tuple[str, str], float] = {}
        self._sources: dict[str, tuple[str, str, str, str] | None] = {}
        self._builds: dict[str, tuple[str, ...]] = {}
        for name, metric in METRICS.items():
            if name in self._metrics:
                continue
            options: dict[str, Any] = {"registry": registry}
            if metric.kind is Histogram:
                options["buckets"] = BUCKETS.get(name, JOULE_BUCKETS)
            if metric.kind is Gauge:
                options["multiprocess_mode"] = "mostrecent"
            self._metrics[name] = FAMILIES[metric.kind](name, metric.help, metric.labels, **options)

    def request_finished(self, engine: int, energy_joules: float) -> None:
        """Count one finished engine request."""
        histogram = self._metrics["llmco2_request_predicted_energy_joules"]
        histogram.labels(self.identity.model_name, str(engine)).observe(energy_joules)

    def request_measured(self, engine: int, energy_joules: float, tokens: int, accounting: Accounting) -> None:
        """Count the measured figure of an engine request that is final and wholly covered."""
        labels, metrics = (self.identity.model_name, str(engine)), self._metrics
        thousands = tokens / 1000
        for name, value in (
            ("energy_joules", energy_joules),
            ("carbon_grams", accounting.operational_grams(energy_joules)),
        ):
            if value is not None:
                metrics[f"llmco2_request_{name}"].labels(*labels).observe(value)
                if thousands:
                    metrics[f"llmco2_request_{name}_per_1000_tokens"].labels(*labels).observe(value / thousands)

    def intensities(self, accounting: Accounting) -> None:
        """Show the carbon intensities in use."""
        for basis, figure, age in (
            ("location", accounting.intensity, accounting.age_seconds),
            ("market", accounting.market, None),
        ):
            source = None if figure is None else (figure.zone or "", figure.source, figure.method, basis)
            known = self._sources.get(basis)
            if known is not None and known != source:
                self._metrics["llmco2_grid_info"].labels(*known).set(0)
            self._sources[basis] = source or known
            if figure is None and known is None:
                continue
            # Not the last value that was known: that would be taken for one of now.
            values = (math.nan, math.nan, None) if figure is None else (figure.grams_per_kwh, figure.estimated, age)
            for name, value in zip(("grams_per_kwh", "estimated", "age_seconds"), values, strict=True):
                if value is not None or known not in (None, source):
                    gauge = self._metrics[f"llmco2_grid_intensity_{name}"].labels(basis)
                    gauge.set(math.nan if value is None else float(value))
            self._metrics["llmco2_grid_intensity_known"].labels(basis).set(float(figure is not None))
            if source is not None:
                self._metrics["llmco2_grid_info"].labels(*source).set(1)

    def engine(self, snapshot: Mapping[str, Any], accounting: Accounting, now_epoch_seconds: float) -> None:
        """Advance the counters by what is new since the last snapshot of this engine.

        The snapshot is cumulative, so one that never arrived costs nothing; a restart begins anew.
        """
        engine = str(snapshot["engine"])
        labels = (self.identity.model_name, engine)
        source = f"{engine} since {snapshot['started_seconds']}"
        for phase in _PHASES:
            joules = self._new(source, f"{phase}_joules", snapshot[f"{phase}_joules"])
            self._metrics["llmco2_predicted_energy_joules_total"].labels(*labels, phase).inc(joules)
            self._price("llmco2_predicted_carbon_grams_total", (*labels, phase), joules, accounting)
            tokens = self._new(source, f"{phase}_tokens", snapshot[f"{phase}_tokens"])
            self._metrics["llmco2_tokens_total"].labels(*labels, phase).inc(tokens)
        for name, field in _SNAPSHOT_COUNTERS.items():
            self._metrics[name].labels(*labels).inc(self._new(source, field, snapshot[field]))
        self._metrics["llmco2_hook_active"].labels(*labels).set(float(snapshot["active"]))
        self.failures(engine, snapshot["failures"])
        self._see_time(source, now_epoch_seconds - snapshot["started_seconds"])
        self._embodied(labels, source, accounting, snapshot["step_seconds"])
        if "metered" in snapshot:
            self._metered(labels, source, snapshot["metered"], accounting)
            self._meter(labels, source, snapshot.get("meter", {}).get("devices", []))
        self._build(engine, snapshot["provenance"])

    def _build(self, engine: str, provenance: Mapping[str, str]) -> None:
        """What prices and what measures an engine; the meter of a slow driver comes later."""
        of_server = self.identity.model_name, self.identity.version, self.identity.vllm_version
        now = *of_server, provenance["predictor"], provenance["meter"]
        known = self._builds.get(engine, now)
        self._builds[engine] = now
        self._metrics["llmco2_build_info"].labels(*now).set(1)
        if known not in self._builds.values():
            self._metrics["llmco2_build_info"].labels(*known).set(0)

    def _price(self, name: str, labels: tuple[str, ...], joules: float, accounting: Accounting) -> None:
        """Count the grams of this energy, or the energy as one without grams."""
        if (grams := accounting.operational_grams(joules)) is not None:
            self._metrics[name].labels(*labels).inc(grams)
        else:
            self._metrics["llmco2_unpriced_energy_joules_total"].labels(*labels[:2], _UNPRICED[name]).inc(joules)

    def _embodied(self, labels: tuple[str, str], source: str, accounting: Accounting, busy_seconds: float) -> None:
        """Grams of the time since the last snapshot, by what it was; who carries idle time is a policy of requests."""
        busy, up = self._new(source, "busy", busy_seconds), self._new(source, "up", self._up_seconds[source][1])
        if (hardware := accounting.hardware) is None:
            return
        parts = split_idle(hardware.rate_grams_per_second, busy, max(0.0, up - busy))
        for state, grams in zip(("busy", "idle"), parts, strict=True):
            self._metrics["llmco2_embodied_carbon_grams_total"].labels(*labels, state).inc(grams)

    def _see_time(self, source: str, up_seconds: float) -> None:
        """An engine's time: as it says at first, then by a clock that nobody sets."""
        now = self._clock()
        last = self._up_seconds.get(source)
        self._up_seconds[source] = now, max(0.0, up_seconds) if last is None else last[1] + now - last[0]

    def _metered(
        self, labels: tuple[str, str], source: str, metered: Mapping[str, Any], accounting: Accounting
    ) -> None:
        metrics, source = self._metrics, f"{source}, metered"
        for phase in _PHASES:
            joules = self._new(source, f"{phase}_joules", metered[f"{phase}_joules"])
            metrics["llmco2_energy_joules_total"].labels(*labels, phase).inc(joules)
            self._price("llmco2_carbon_grams_total", (*labels, phase), joules, accounting)
            if (market := accounting.market_grams(joules)) is not None:
                metrics["llmco2_market_carbon_grams_total"].labels(*labels, phase).inc(market)
        for name, field in _METERED_COUNTERS.items():
            metrics[name].labels(*labels).inc(self._new(source, field, metered[field]))
        for name, field in _METERED_GAUGES.items():
            metrics[name].labels(*labels).set(metered[field])
        covered = metered["coverage_ratio"]
        metrics["llmco2_coverage_ratio"].labels(*labels).set(math.nan if covered is None else covered)
        for state, field in _STATES.items():
            joules = self._new(source, field, metered[field])
            metrics["llmco2_idle_energy_joules_total"].labels(*labels, state).inc(joules)
            self._price("llmco2_idle_carbon_grams_total", (*labels, state), joules, accounting)
            if state in metered["idle_power_watts"]:
                metrics["llmco2_idle_power_watts"].labels(*labels, state).set(metered["idle_power_watts"][state])
        trusted = metered["windows"] - metered["doubtful_windows"]
        for word, count in (("yes", trusted), ("no", metered["doubtful_windows"])):
            metrics["llmco2_meter_windows_total"].labels(*labels, word).inc(self._new(source, f"trusted {word}", count))
        for mix, ratio in metered["bias_ratio"].items():
            metrics["llmco2_prediction_bias_ratio"].labels(*labels, mix).set(ratio)
        for number, _, error in metered["reports"]:
            if self._new(source, "report", number):
                metrics["llmco2_window_error_ratio"].labels(*labels).observe(error)

    def _meter(self, labels: tuple[str, str], source: str, devices: Sequence[Mapping[str, Any]]) -> None:
        up = bool(devices) and all(device.get("source") in ("counter", "power") for device in devices)
        self._metrics["llmco2_meter_up"].labels(*labels).set(float(up))
        watts = [float(w) for device in devices if (w := device.get("power_watts")) is not None]
        if devices:
            known = sum(watts) if len(watts) == len(devices) else math.nan
            self._metrics["llmco2_power_watts"].labels(*labels).set(known)
        for place, device in enumerate(devices):
            # Every kind from the start: a counter that is born at 1 hides its first fault from rate().
            for kind in FAULTS:
                new = self._new(source, f"fault {kind} of {place}", device.get("faults", {}).get(kind, 0))
                self._metrics["llmco2_meter_faults_total"].labels(*labels, kind).inc(new)

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
