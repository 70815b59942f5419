"""The one metric table, and the recorder that feeds it.

Plain counters, gauges and histograms with prometheus_client, because collectors, Info and Enum
do not exist in its multiprocess mode. Predicted joules and measured ones are families apart.
Names carry no colon and labels never a request id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample

from llmco2_vllm.core.embodied import split_idle
from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.telemetry.accounting import Accounting

# Relative error of a window's prediction, both signs.
ERROR_BUCKETS = (-0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
# 0.1 J to 100 kJ in steps of 1-2-5.
JOULE_BUCKETS = (*(m * 10.0**e for e in range(-1, 5) for m in (1, 2, 5)), 1e5)
# The others in steps of 1-3, to keep the number of series in bounds.
_BUCKETS = {
    "llmco2_window_error_ratio": ERROR_BUCKETS,
    "llmco2_request_carbon_grams": tuple(m * 10.0**e for e in range(-5, 1) for m in (1, 3)),
    "llmco2_request_energy_joules_per_1000_tokens": tuple(m * 10.0**e for e in range(5) for m in (1, 3)),
    "llmco2_request_carbon_grams_per_1000_tokens": tuple(m * 10.0**e for e in range(-4, 1) for m in (1, 3)),
}


class Metric(NamedTuple):
    """A row of the table."""

    kind: type[MetricWrapperBase]
    help: str
    labels: tuple[str, ...]


_ENGINE = ("model_name", "engine")
_PHASE = (*_ENGINE, "phase")
_MIX = (*_ENGINE, "phase_mix")

METRICS: dict[str, Metric] = {
    "llmco2_predicted_energy_joules_total": Metric(
        Counter, "Predicted device energy of all scheduled steps, aborted requests included.", _PHASE
    ),
    "llmco2_predicted_carbon_grams_total": Metric(
        Counter, "Operational CO2e of the predicted energy, with PUE and node overhead as configured.", _PHASE
    ),
    "llmco2_energy_joules_total": Metric(
        Counter, "Measured device energy of requests by phase, aborted ones included; nothing without a meter.", _PHASE
    ),
    "llmco2_carbon_grams_total": Metric(
        Counter,
        "Operational CO2e of the measured energy of requests, PUE and node overhead as configured.",
        _PHASE,
    ),
    "llmco2_market_carbon_grams_total": Metric(
        Counter, "The same energy by the market-based intensity of the settings; beside the other, never added.", _PHASE
    ),
    "llmco2_unpriced_energy_joules_total": Metric(
        Counter, "Measured energy of requests while no carbon intensity was known; in no grams.", _ENGINE
    ),
    "llmco2_idle_carbon_grams_total": Metric(
        Counter, "Operational CO2e of the measured idle energy, by state of the engine.", (*_ENGINE, "state")
    ),
    "llmco2_embodied_carbon_grams_total": Metric(
        Counter, "Embodied CO2e of the hardware held, by busy and idle time.", (*_ENGINE, "state")
    ),
    "llmco2_metered_energy_joules_total": Metric(
        Counter, "Energy of the engine's devices as counted: requests + idle + sleeping + unattributed.", _ENGINE
    ),
    "llmco2_idle_energy_joules_total": Metric(
        Counter, "Measured energy of the time without steps, by state of the engine.", (*_ENGINE, "state")
    ),
    "llmco2_unattributed_energy_joules": Metric(
        Gauge, "Measured energy since start that neither steps nor idleness explain, of either sign.", _ENGINE
    ),
    "llmco2_conservation_residual_joules": Metric(
        Gauge, "Metered energy less requests, idle, sleeping and unattributed: rounding, or a fault of ours.", _ENGINE
    ),
    "llmco2_estimated_energy_joules_total": Metric(
        Counter, "Energy of steps no window covered, predicted at the recent ratio of measured to predicted.", _ENGINE
    ),
    "llmco2_aborted_energy_joules_total": Metric(
        Counter, "Part of the measured energy that went to requests whose client left or that failed.", _ENGINE
    ),
    "llmco2_recomputed_energy_joules_total": Metric(
        Counter, "Part of the measured energy that computed tokens again after a preemption.", _ENGINE
    ),
    "llmco2_rejected_draft_energy_joules_total": Metric(
        Counter, "Part of the measured energy that computed draft tokens which were not accepted.", _ENGINE
    ),
    "llmco2_window_error_ratio": Metric(
        Histogram, "Predicted over measured energy of windows of 5 s and more, less 1.", _ENGINE
    ),
    "llmco2_prediction_bias_ratio": Metric(
        Gauge, "Predicted over measured energy of the recent past, less 1, by what the work was.", _MIX
    ),
    "llmco2_meter_windows_total": Metric(
        Counter, "Windows between edges of the energy counters, by trust.", (*_ENGINE, "trusted")
    ),
    "llmco2_meter_faults_total": Metric(Counter, "Faults of the meter, by kind.", (*_ENGINE, "kind")),
    "llmco2_meter_up": Metric(
        Gauge, "1 while every device of the engine is metered by its counter or its power, else 0.", _ENGINE
    ),
    "llmco2_power_watts": Metric(Gauge, "Power of the engine's devices now, as metered.", _ENGINE),
    "llmco2_idle_power_watts": Metric(
        Gauge, "Learned idle power of the engine's devices, by state of the engine.", (*_ENGINE, "state")
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
    "llmco2_request_energy_joules": Metric(
        Histogram, "Measured energy per finished engine request; only those that windows cover wholly.", _ENGINE
    ),
    "llmco2_request_carbon_grams": Metric(Histogram, "Operational CO2e of the same requests.", _ENGINE),
    "llmco2_request_energy_joules_per_1000_tokens": Metric(
        Histogram, "Measured energy per 1000 computed tokens of the same requests.", _ENGINE
    ),
    "llmco2_request_carbon_grams_per_1000_tokens": Metric(
        Histogram, "Operational CO2e per 1000 computed tokens of the same requests.", _ENGINE
    ),
    "llmco2_hook_active": Metric(Gauge, "1 while the hook of the engine is on, else 0.", _ENGINE),
    "llmco2_grid_intensity_grams_per_kwh": Metric(
        Gauge, "Carbon intensity in use, g CO2e per kWh, location-based or market-based.", ("basis",)
    ),
    "llmco2_grid_intensity_age_seconds": Metric(
        Gauge, "Since the intensity was last known to hold; absent for one that is stated without a time.", ("basis",)
    ),
    "llmco2_grid_intensity_estimated": Metric(
        Gauge, "1 while the intensity is modelled, a forecast or a stand-in, else 0.", ("basis",)
    ),
    "llmco2_grid_intensity_known": Metric(Gauge, "1 while a carbon intensity is known, else 0.", ("basis",)),
    "llmco2_grid_info": Metric(
        Gauge, "1 for the source of the intensity in use, 0 for one that was.", ("zone", "source", "method", "basis")
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
_STATES = {"awake": "idle_joules", "sleeping": "sleeping_joules"}
_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the info metric says."""

    model_name: str
    version: str
    vllm_version: str


class _WithoutBirth(MetricWrapperBase):
    """Leaves out the time of birth: a fifth more series and as much more time per scrape, and nobody asks for it.

    The library can only be told for the whole process, hence for the host's own metrics too.
    """

    def _child_samples(self) -> Iterable[Sample]:
        return tuple(sample for sample in super()._child_samples() if sample.name != "_created")


class _Counter(_WithoutBirth, Counter):
    """A counter."""


class _Histogram(_WithoutBirth, Histogram):
    """A histogram."""


_KINDS: dict[type[MetricWrapperBase], type[MetricWrapperBase]] = {Counter: _Counter, Histogram: _Histogram}
# A registry takes each name once, and a process may start several engines one after the other.
_made: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()


class Recorder:
    """Feeds the Prometheus objects of one front-end process; they are created once, on first use."""

    def __init__(self, identity: Identity, registry: CollectorRegistry = REGISTRY) -> None:
        self.identity = identity
        self._metrics = _made.setdefault(registry, {})
        self._seen: dict[tuple[str, str], float] = {}
        self._sources: dict[str, tuple[str, str, str, str] | None] = {}
        for name, metric in METRICS.items():
            if name in self._metrics:
                continue
            options: dict[str, Any] = {"registry": registry}
            if metric.kind is Histogram:
                options["buckets"] = _BUCKETS.get(name, JOULE_BUCKETS)
            if metric.kind is Gauge:
                options["multiprocess_mode"] = "mostrecent"
            self._metrics[name] = _KINDS.get(metric.kind, metric.kind)(name, metric.help, metric.labels, **options)

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
            if figure is not None or known is not None:
                self._metrics["llmco2_grid_intensity_known"].labels(basis).set(float(figure is not None))
            if figure is None or source is None:
                continue
            self._metrics["llmco2_grid_info"].labels(*source).set(1)
            self._metrics["llmco2_grid_intensity_grams_per_kwh"].labels(basis).set(figure.grams_per_kwh)
            self._metrics["llmco2_grid_intensity_estimated"].labels(basis).set(float(figure.estimated))
            if age is not None:
                self._metrics["llmco2_grid_intensity_age_seconds"].labels(basis).set(age)

    def engine(self, snapshot: Mapping[str, Any], accounting: Accounting, now_epoch_seconds: float) -> None:
        """Advance the counters by what is new since the last snapshot of this engine.

        The snapshot is cumulative, so one that never arrived costs nothing; a restart begins anew.
        """
        engine = str(snapshot["engine"])
        labels = (self.identity.model_name, engine)
        source = f"{engine} since {snapshot['started_seconds']}"
        grams_per_joule = accounting.operational_grams(1.0) or 0.0
        for phase in _PHASES:
            joules = self._new(source, f"{phase}_joules", snapshot[f"{phase}_joules"])
            self._metrics["llmco2_predicted_energy_joules_total"].labels(*labels, phase).inc(joules)
            self._metrics["llmco2_predicted_carbon_grams_total"].labels(*labels, phase).inc(joules * grams_per_joule)
            tokens = self._new(source, f"{phase}_tokens", snapshot[f"{phase}_tokens"])
            self._metrics["llmco2_tokens_total"].labels(*labels, phase).inc(tokens)
        for name, field in _SNAPSHOT_COUNTERS.items():
            self._metrics[name].labels(*labels).inc(self._new(source, field, snapshot[field]))
        self._metrics["llmco2_hook_active"].labels(*labels).set(float(snapshot["active"]))
        self.failures(engine, snapshot["failures"])
        self._embodied(
            labels, source, accounting, (snapshot["step_seconds"], now_epoch_seconds - snapshot["started_seconds"])
        )
        if "metered" in snapshot:
            self._metered(labels, source, snapshot["metered"], accounting)
            self._meter(labels, source, snapshot.get("meter", {}).get("devices", []))
        provenance = snapshot["provenance"]
        self._metrics["llmco2_build_info"].labels(
            self.identity.model_name,
            self.identity.version,
            self.identity.vllm_version,
            provenance["predictor"],
            provenance["meter"],
        ).set(1)

    def _embodied(
        self, labels: tuple[str, str], source: str, accounting: Accounting, seconds: tuple[float, float]
    ) -> None:
        hardware, (busy, up) = (
            accounting.hardware,
            (
                self._new(source, f"{name} for hardware", value)
                for name, value in zip(("busy", "up"), seconds, strict=True)
            ),
        )
        if hardware is None:
            return
        rate = hardware.rate_grams_per_second
        for state, grams in zip(
            ("busy", "idle"), split_idle(rate, busy, max(0.0, up - busy), hardware.idle), strict=True
        ):
            self._metrics["llmco2_embodied_carbon_grams_total"].labels(*labels, state).inc(grams)

    def _metered(
        self, labels: tuple[str, str], source: str, metered: Mapping[str, Any], accounting: Accounting
    ) -> None:
        metrics, source = self._metrics, f"{source}, metered"
        for phase in _PHASES:
            joules = self._new(source, f"{phase}_joules", metered[f"{phase}_joules"])
            metrics["llmco2_energy_joules_total"].labels(*labels, phase).inc(joules)
            grams, market = accounting.operational_grams(joules), accounting.market_grams(joules)
            if grams is not None:
                metrics["llmco2_carbon_grams_total"].labels(*labels, phase).inc(grams)
            else:
                metrics["llmco2_unpriced_energy_joules_total"].labels(*labels).inc(joules)
            if market is not None:
                metrics["llmco2_market_carbon_grams_total"].labels(*labels, phase).inc(market)
        for name, field in _METERED_COUNTERS.items():
            metrics[name].labels(*labels).inc(self._new(source, field, metered[field]))
        for name, field in _METERED_GAUGES.items():
            metrics[name].labels(*labels).set(metered[field])
        for state, field in _STATES.items():
            joules = self._new(source, field, metered[field])
            metrics["llmco2_idle_energy_joules_total"].labels(*labels, state).inc(joules)
            if (grams := accounting.operational_grams(joules)) is not None:
                metrics["llmco2_idle_carbon_grams_total"].labels(*labels, state).inc(grams)
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
        if devices and len(watts) == len(devices):
            self._metrics["llmco2_power_watts"].labels(*labels).set(sum(watts))
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
