"""The one metric table: the recorder, docs/metrics.md and the check of the dashboard are made from it.

Predicted joules and measured ones are families apart. Names carry no colon and labels never a request id.
"""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

# Relative error of a window's prediction, both signs.
ERROR_BUCKETS = (-0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
# 0.1 J to 100 kJ in steps of 1-2-5.
JOULE_BUCKETS = (*(m * 10.0**e for e in range(-1, 5) for m in (1, 2, 5)), 1e5)
# The others in steps of 1-3, to keep the number of series in bounds.
BUCKETS = {
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
        Counter, "Energy used while no carbon intensity was known, in no grams, by what it was.", (*_ENGINE, "energy")
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
    "llmco2_coverage_ratio": Metric(
        Gauge, "Share of the energy of the last minutes' steps that windows cover; NaN while there was none.", _ENGINE
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
        "1 for what prices and what measures, 0 for what did.",
        ("model_name", "version", "vllm_version", "predictor", "meter"),
    ),
}
