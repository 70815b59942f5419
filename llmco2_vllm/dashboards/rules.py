"""Recording and alert rules for Prometheus. Each alert has a section of its own in docs/runbooks.md."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from llmco2_vllm.dashboards.promql import plus, ratio
from llmco2_vllm.dashboards.series import (
    CARBON,
    DRIFT_RATIO,
    ENERGY,
    ESTIMATED,
    IDLE,
    METERED,
    PREDICTED,
    STALE_SECONDS,
    TOKENS,
)

RUNBOOKS: Final = "docs/runbooks.md"
# Residuals of additions are 1e-9 of the whole at most.
CONSERVED_RATIO: Final = 1e-6
IDLE_RATIO: Final = 0.5
_ENGINE = "job, instance, model_name, engine"
_MODEL = "job, model_name"
_INTERVAL = "30s"


class Record(NamedTuple):
    """A recording rule; its name is level:metric:operations."""

    name: str
    expression: str
    help: str


class Alert(NamedTuple):
    """An alert rule; lasting: how long the expression must hold."""

    name: str
    expression: str
    lasting: str
    severity: str
    summary: str
    description: str

    def runbook(self, page: str = RUNBOOKS) -> str:
        """Where to read what to do, on a page of runbooks."""
        return f"{page}#{self.name.lower()}"


def _rate(counter: str, by: str, window: str = "5m", matchers: str = "") -> str:
    return f"sum by ({by}) (rate({counter}{matchers}[{window}]))"


def _charged(by: str, window: str) -> str:
    return plus(_rate(ENERGY, by, window), _rate(ESTIMATED, by, window))


# Figures that are asked for often, by model and by engine.
RECORDS: Final = (
    Record(
        "model:llmco2_energy_joules:rate5m",
        _rate(ENERGY, _MODEL),
        "Measured power of requests, W.",
    ),
    Record(
        "model:llmco2_carbon_grams:rate5m",
        _rate(CARBON, _MODEL),
        "Operational CO2e of requests, g/s.",
    ),
    Record("model:llmco2_tokens:rate5m", _rate(TOKENS, _MODEL), "Tokens computed per second."),
    Record(
        "model:llmco2_energy_joules_per_token:ratio_rate5m",
        ratio("model:llmco2_energy_joules:rate5m", "model:llmco2_tokens:rate5m"),
        "Measured joules per token computed.",
    ),
    Record(
        "model:llmco2_carbon_grams_per_1000_tokens:ratio_rate5m",
        f"1000 * {ratio('model:llmco2_carbon_grams:rate5m', 'model:llmco2_tokens:rate5m')}",
        "Operational CO2e of requests per 1 000 tokens computed, g.",
    ),
    Record("engine:llmco2_metered_energy_joules:rate5m", _rate(METERED, _ENGINE), "Metered power, W."),
    Record(
        "engine:llmco2_idle_energy:ratio_rate1h",
        ratio(_rate(IDLE, _ENGINE, "1h", '{state="awake"}'), _rate(METERED, _ENGINE, "1h")),
        "Part of the metered energy of an hour that went to an engine awake without requests.",
    ),
    Record(
        "engine:llmco2_coverage:ratio_rate30m",
        ratio(_rate(ENERGY, _ENGINE, "30m"), _charged(_ENGINE, "30m")),
        "Part of the energy charged to requests that windows of the meter cover.",
    ),
    Record(
        "engine:llmco2_prediction_error:ratio_rate30m",
        f"{ratio(_rate(PREDICTED, _ENGINE, '30m'), _charged(_ENGINE, '30m'))} - 1",
        "Predicted over measured energy of requests, less 1.",
    ),
)

_ON: Final = "{{ $labels.model_name }}, engine {{ $labels.engine }} on {{ $labels.instance }}"
# What an operator should be told of.
ALERTS: Final = (
    Alert(
        "Llmco2MeterLost",
        "llmco2_meter_up == 0",
        "2m",
        "warning",
        f"The meter of {_ON} is lost",
        "At least one device is read neither by its energy counter nor by its power. Figures of requests are "
        "predictions until it is back.",
    ),
    Alert(
        "Llmco2PredictionDrift",
        # The gauge keeps its last value where nothing runs.
        f"abs(llmco2_prediction_bias_ratio) > {DRIFT_RATIO:g} and on ({_ENGINE}) rate(llmco2_steps_total[30m]) > 0",
        "30m",
        "warning",
        f"Predictions of {_ON} are off by {{{{ $value | humanizePercentage }}}}",
        "Predicted and measured energy of {{ $labels.phase_mix }} windows differ by more than "
        f"{DRIFT_RATIO:.0%} for half an hour.",
    ),
    Alert(
        "Llmco2ConservationBroken",
        f"abs(llmco2_conservation_residual_joules) > {CONSERVED_RATIO:g} * {METERED}",
        "5m",
        "critical",
        f"Energy of {_ON} does not add up",
        "Metered energy is not that of requests, idle, sleeping and unattributed: {{ $value }} J are missing or "
        "counted twice. Figures of this engine must not be reported.",
    ),
    Alert(
        "Llmco2IntensityStale",
        f"llmco2_grid_intensity_age_seconds > {STALE_SECONDS}",
        "10m",
        "warning",
        "The {{ $labels.basis }} intensity of {{ $labels.instance }} is {{ $value | humanizeDuration }} old",
        "The source of carbon intensity has not answered. Joules are right, grams are of another hour.",
    ),
    Alert(
        "Llmco2IntensityUnknown",
        "llmco2_grid_intensity_known == 0",
        "10m",
        "warning",
        "No {{ $labels.basis }} intensity is known on {{ $labels.instance }}",
        "Energy goes on being counted and gives no grams until a source answers.",
    ),
    Alert(
        "Llmco2IdleBurn",
        # Asked of engines that are metered for an hour, and whose devices are powered.
        f"engine:llmco2_idle_energy:ratio_rate1h > {IDLE_RATIO:g} "
        f"and on ({_ENGINE}) llmco2_power_watts > 0 "
        f"and on ({_ENGINE}) {METERED} offset 1h",
        "5m",
        "info",
        f"{_ON} wastes {{{{ $value | humanizePercentage }}}} of its energy",
        "More than half of the energy of the last hour went to an engine that was awake without requests.",
    ),
    Alert(
        "Llmco2HookOff",
        "llmco2_hook_active == 0",
        "1m",
        "warning",
        f"The carbon meter of {_ON} is switched off",
        "By an operator or by a failure of ours; requests are served without figures.",
    ),
)


def recording_document() -> dict[str, Any]:
    """The recording rules as Prometheus reads them."""
    rules = [{"record": record.name, "expr": record.expression} for record in RECORDS]
    return {"groups": [{"name": "llmco2_recording", "interval": _INTERVAL, "rules": rules}]}


def alert_document(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The alert rules as Prometheus reads them. runbooks: path or URL of the page that they refer to."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.description,
                "runbook_url": alert.runbook(runbooks),
            },
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "llmco2_alerts", "interval": _INTERVAL, "rules": rules}]}
