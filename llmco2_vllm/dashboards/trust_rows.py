"""Panels of the rows grid and trust."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llmco2_vllm.dashboards.panels import Json, heatmap, information, judged, lines, stat, states, without_sparkline
from llmco2_vllm.dashboards.promql import RATE, increase, rate, ratio, select, told, total
from llmco2_vllm.dashboards.series import (
    AGE,
    BIAS,
    CARBON,
    CHARGED,
    COVERAGE,
    DRIFT_RATIO,
    ENERGY,
    G_PER_KWH,
    INTENSITY,
    MARKET,
    STALE_SECONDS,
    Placed,
    hourly,
)

# Thresholds of the coverage.
_COVERED: Final = (("red", None), ("orange", 0.5), ("green", 0.9))


def grid() -> Iterator[Placed]:
    """Carbon intensity, its age, and location against market."""
    basis = "{{basis}}"
    fresh, doubt, stale = ("green", None), ("orange", STALE_SECONDS / 2), ("red", STALE_SECONDS)
    intensity = [(total("avg", INTENSITY, by="basis"), basis)]
    yield lines("Grid intensity", "Carbon intensity in use, g CO2e per kWh.", intensity, G_PER_KWH), 8, 7
    oldest = [(total("max", AGE, by="basis"), basis)]
    text = "Since the figure in use was valid; dashed where it counts as stale."
    aged = lines("Age of the intensity", text, oldest, "s", axisSoftMax=STALE_SECONDS)
    yield judged(aged, fresh, doubt, stale), 8, 7
    emitted = [(hourly(CARBON), "location"), (hourly(MARKET), "market")]
    text = "Operational CO2e of requests per hour by the grid's average and by contracts."
    yield lines("Carbon per hour, location and market", text, emitted, "massg"), 8, 7
    for title, text, name, words in (
        (
            "Intensity is known",
            "Where it is not, energy is counted and gives no grams.",
            "llmco2_grid_intensity_known",
            {"0": ("unknown", "red"), "1": ("known", "green")},
        ),
        (
            "Intensity is estimated",
            "Whether the figure in use is modelled, a forecast or a stand-in.",
            "llmco2_grid_intensity_estimated",
            {"0": ("published", "green"), "1": ("estimated", "orange")},
        ),
    ):
        yield states(title, text, [(total("min", name, by="basis"), basis)], words), 6, 5
    in_use = f"{select('llmco2_grid_info')} == 1"
    labels = {"instance": "Instance", "zone": "Zone", "source": "Source", "method": "Method", "basis": "Basis"}
    yield information("Sources of intensity", "Where the figures in use come from.", in_use, labels), 12, 5


def trust() -> Iterator[Placed]:
    """Whether the figures can be believed."""
    yield from ((without_sparkline(tile), 6, 4) for tile in _trust_tiles())
    errors = increase("llmco2_window_error_ratio_bucket", by="le", window=RATE)
    text = "Predicted over measured energy of windows of 5 s and more, less 1."
    yield heatmap("Error of windows", text, errors, "percentunit"), 12, 8
    bias = [(total("avg", BIAS, by="phase_mix"), "{{phase_mix}}")]
    text = "Predicted over measured energy of the recent past, less 1; dashed where it counts as drift."
    about_zero = {"min": None, "fillOpacity": 0, "axisSoftMin": -DRIFT_RATIO, "axisSoftMax": DRIFT_RATIO}
    drift = lines("Drift: bias of the prediction", text, bias, "percentunit", **about_zero)
    outside = (("red", None), ("transparent", -DRIFT_RATIO), ("red", DRIFT_RATIO))
    yield judged(drift, *outside), 12, 8
    yield from ((panel, 6, 7) for panel in _trust_over_time())
    labels = {
        "instance": "Instance",
        "model_name": "Model",
        "predictor": "Predictor",
        "meter": "Meter",
        "version": "llmco2-vllm",
        "vllm_version": "vLLM",
    }
    in_use = f"{select('llmco2_build_info')} == 1"
    yield information("Bundle and versions", "What prices and what measures.", in_use, labels), 24, 4


def _trust_tiles() -> Iterator[Json]:
    residual = total("sum", "llmco2_conservation_residual_joules")
    yield stat(
        "Coverage",
        "Part of the energy charged to requests, of all engines together, that windows of the meter cover; the rest is "
        "predicted.",
        told(rate(ENERGY), CHARGED),
        "percentunit",
        _COVERED,
    )
    yield stat(
        "Conservation residual",
        "Metered energy less requests, idle, sleeping and unattributed: rounding, or a fault of ours.",
        residual,
        "joule",
        (("red", None), ("green", -0.01), ("red", 0.01)),
    )
    up_or_down = (("red", None), ("green", 1.0))
    yield stat(
        "Meters up",
        "Part of the engines whose devices are all metered.",
        total("avg", "llmco2_meter_up"),
        "percentunit",
        up_or_down,
    )
    yield stat(
        "Hooks active",
        "Part of the engines that price their steps.",
        total("avg", "llmco2_hook_active"),
        "percentunit",
        up_or_down,
    )


def _trust_over_time() -> Iterator[Json]:
    text = "Part of the energy of each engine's recent steps that windows of its meter cover; nothing where none ran."
    covered = [(total("min", COVERAGE, by="instance, engine"), "{{instance}} · engine {{engine}}")]
    yield judged(lines("Coverage by engine", text, covered, "percentunit", axisSoftMax=1), *_COVERED)
    engine = "{{instance}}/{{engine}}"
    words = {"0": ("off", "red"), "1": ("on", "green")}
    yield states(
        "Meter and hook",
        "Whether every device is metered, and whether steps are priced.",
        [
            (total("min", "llmco2_meter_up", by="instance, engine"), f"meter {engine}"),
            (total("min", "llmco2_hook_active", by="instance, engine"), f"hook {engine}"),
        ],
        words,
    )
    windows = "llmco2_meter_windows_total"
    yield lines(
        "Windows and faults",
        "Per second: windows of the meter by trust, faults of the meter by kind, exceptions of ours by place.",
        [
            (rate(windows, 'trusted="yes"'), "trusted"),
            (rate(windows, 'trusted="no"'), "not trusted"),
            (f"{rate('llmco2_meter_faults_total', by='kind')} > 0", "fault: {{kind}}"),
            (f"{rate('llmco2_hook_failures_total', by='where')} > 0", "failure: {{where}}"),
        ],
        "cps",
    )
    steps, seconds = rate("llmco2_steps_total"), rate("llmco2_step_duration_seconds_total")
    yield lines(
        "Time of a step",
        "Mean duration of a scheduler step, as predicted and as measured, and what the hook adds to it.",
        [
            (ratio(seconds, steps), "measured"),
            (ratio(rate("llmco2_predicted_step_duration_seconds_total"), steps), "predicted"),
            (ratio(rate("llmco2_hook_duration_seconds_total"), steps), "hook"),
        ],
        "s",
    )
