"""What several panels and rules ask for."""

from __future__ import annotations

from typing import Final

from llmco2_vllm.dashboards.panels import Json
from llmco2_vllm.dashboards.promql import plus, rate

# A panel, its columns of 24 and its height.
Placed = tuple[Json, int, int]

ENERGY: Final = "llmco2_energy_joules_total"
ESTIMATED: Final = "llmco2_estimated_energy_joules_total"
PREDICTED: Final = "llmco2_predicted_energy_joules_total"
METERED: Final = "llmco2_metered_energy_joules_total"
IDLE: Final = "llmco2_idle_energy_joules_total"
CARBON: Final = "llmco2_carbon_grams_total"
IDLE_CARBON: Final = "llmco2_idle_carbon_grams_total"
EMBODIED: Final = "llmco2_embodied_carbon_grams_total"
MARKET: Final = "llmco2_market_carbon_grams_total"
TOKENS: Final = "llmco2_tokens_total"
COVERAGE: Final = "llmco2_coverage_ratio"
BIAS: Final = "llmco2_prediction_bias_ratio"
INTENSITY: Final = "llmco2_grid_intensity_grams_per_kwh"
AGE: Final = "llmco2_grid_intensity_age_seconds"
REQUEST_ENERGY: Final = "llmco2_request_energy_joules"
REQUEST_CARBON: Final = "llmco2_request_carbon_grams"
REQUEST_PREDICTED: Final = "llmco2_request_predicted_energy_joules"
PARTS: Final = {
    "aborted": "llmco2_aborted_energy_joules_total",
    "recomputed": "llmco2_recomputed_energy_joules_total",
    "rejected drafts": "llmco2_rejected_draft_energy_joules_total",
}
# Thresholds of the alerts.
DRIFT_RATIO: Final = 0.3
STALE_SECONDS: Final = 7200
# Energy of steps that no window covered is apart from the measured one; both are what requests were charged.
CHARGED: Final = plus(rate(ENERGY), rate(ESTIMATED))
G_PER_KWH: Final = "suffix:g/kWh"
HOUR: Final = 3600


def hourly(counter: str, by: str = "") -> str:
    """Grams of a counter per hour."""
    return f"{HOUR} * {rate(counter, by=by)}"
