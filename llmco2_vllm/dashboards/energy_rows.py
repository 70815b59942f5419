"""Panels of the rows now, requests, where energy goes."""

from __future__ import annotations

from collections.abc import Iterator

from llmco2_vllm.dashboards.panels import Json, areas, bars, heatmap, lines, percentiles, stat, table
from llmco2_vllm.dashboards.promql import RATE, excess, increase, mean, plus, quantile, rate, ratio, told, total
from llmco2_vllm.dashboards.series import (
    CARBON,
    CHARGED,
    DRIFT_RATIO,
    EMBODIED,
    ENERGY,
    ESTIMATED,
    HOUR,
    IDLE,
    IDLE_CARBON,
    METERED,
    PARTS,
    PREDICTED,
    REQUEST_CARBON,
    REQUEST_ENERGY,
    REQUEST_PREDICTED,
    TOKENS,
    Placed,
    hourly,
)


def now() -> Iterator[Placed]:
    """What is drawn and emitted at this moment, and whether the prediction is right."""
    yield from ((tile, 4, 5) for tile in _now_tiles())
    yield from ((panel, 8, 8) for panel in _now_over_time())


def _now_tiles() -> Iterator[Json]:
    yield stat(
        "Power", "Power of the selected engines' devices, as metered.", total("sum", "llmco2_power_watts"), "watt"
    )
    yield stat(
        "Carbon per hour",
        "Operational CO2e per hour of requests and idleness, by metered energy.",
        f"{HOUR} * {plus(rate(CARBON), rate(IDLE_CARBON))}",
        "massg",
    )
    yield stat(
        "Energy per token",
        "Metered energy of requests per token computed; idle energy is apart.",
        told(rate(ENERGY), rate(TOKENS)),
        "joule",
    )
    yield stat(
        "Carbon per 1 000 tokens",
        "Operational CO2e of requests per 1 000 tokens computed.",
        f"1000 * {told(rate(CARBON), rate(TOKENS))}",
        "massg",
    )
    yield stat(
        "Predicted against measured",
        "Predicted over measured energy of requests, less 1: above 0 the prediction is too high.",
        excess(rate(PREDICTED), CHARGED),
        "percentunit",
        (("red", None), ("orange", -DRIFT_RATIO), ("green", -0.1), ("orange", 0.1), ("red", DRIFT_RATIO)),
    )
    yield stat(
        "Idle share",
        "Part of the metered energy that no request used.",
        told(rate(IDLE), rate(METERED)),
        "percentunit",
    )


def _now_over_time() -> Iterator[Json]:
    yield lines(
        "Power, predicted against metered",
        "Energy per second: metered with idleness, charged to requests, and predicted as their steps were scheduled.",
        [(rate(METERED), "metered"), (CHARGED, "requests"), (rate(PREDICTED), "predicted")],
        "watt",
    )
    yield areas(
        "Carbon per hour by cause",
        "CO2e per hour: operational of requests and of idleness, embodied of the time the devices are held.",
        [(hourly(CARBON), "requests"), (hourly(IDLE_CARBON), "idle"), (hourly(EMBODIED), "embodied")],
        "massg",
    )
    yield lines(
        "Energy per token, predicted against measured",
        "The same tokens, as priced before they ran and as metered.",
        [(ratio(CHARGED, rate(TOKENS)), "measured"), (ratio(rate(PREDICTED), rate(TOKENS)), "predicted")],
        "joule",
    )


def requests() -> Iterator[Placed]:
    """What requests took: as a distribution, by model, by phase."""
    for title, histogram, unit in (
        ("Energy per request", REQUEST_ENERGY, "joule"),
        ("Carbon per request", REQUEST_CARBON, "massg"),
    ):
        buckets = increase(f"{histogram}_bucket", by="le", window=RATE)
        yield heatmap(title, "Finished requests by what they took, metered.", buckets, unit), 12, 8
    for title, histogram, unit in (
        ("Energy per request, percentiles", REQUEST_ENERGY, "joule"),
        ("Carbon per request, percentiles", REQUEST_CARBON, "massg"),
        ("Energy per 1 000 tokens, percentiles", f"{REQUEST_ENERGY}_per_1000_tokens", "joule"),
        ("Carbon per 1 000 tokens, percentiles", f"{REQUEST_CARBON}_per_1000_tokens", "massg"),
    ):
        text = "Over finished requests, metered; percentiles are interpolated within buckets, the mean is exact."
        yield percentiles(title, text, histogram, unit), 6, 7
    yield _by_model(), 24, 5
    yield from ((panel, 6, 7) for panel in (_requests_predicted(), *_by_phase()))


def _by_model() -> Json:
    model = "model_name"
    energy, tokens = increase(ENERGY, by=model), increase(TOKENS, by=model)
    charged = plus(energy, increase(ESTIMATED, by=model))
    totals = (increase(f"{REQUEST_CARBON}_{part}", by=model) for part in ("sum", "count"))
    columns = [
        ("Energy", energy, "joule"),
        ("Carbon", increase(CARBON, by=model), "massg"),
        ("Tokens", tokens, "short"),
        ("Energy per token", told(energy, tokens), "joule"),
        ("Carbon per request", told(*totals), "massg"),
        ("Prediction error", excess(increase(PREDICTED, by=model), charged), "percentunit"),
    ]
    return table("By model", "Metered figures of requests over the range shown.", {model: "Model"}, columns)


def _requests_predicted() -> Json:
    return lines(
        "Energy per request, as predicted",
        "Means over finished requests, and what the dearest were predicted to take.",
        [
            (mean(REQUEST_ENERGY, RATE), "measured"),
            (mean(REQUEST_PREDICTED, RATE), "predicted"),
            (quantile(0.95, REQUEST_PREDICTED), "predicted p95"),
        ],
        "joule",
    )


def _by_phase() -> Iterator[Json]:
    energy, tokens = rate(ENERGY, by="phase"), rate(TOKENS, by="phase")
    legend = "{{phase}}"
    yield areas("Power by phase", "Metered energy of requests per second.", [(energy, legend)], "watt")
    yield lines(
        "Energy per token by phase",
        "A prompt token that is computed and a token that is generated are different work.",
        [(ratio(energy, tokens), legend)],
        "joule",
    )
    yield lines(
        "Predicted carbon per hour by phase",
        "Operational CO2e per hour of the predicted energy; there also without a meter.",
        [(hourly("llmco2_predicted_carbon_grams_total", by="phase"), legend)],
        "massg",
    )


def energy() -> Iterator[Placed]:
    """Where energy goes: active, idle, aborted, recomputed, rejected drafts, unattributed, embodied."""
    spent = [(rate(ENERGY, by="phase"), "{{phase}}"), (rate(IDLE, by="state"), "{{state}}")]
    yield (
        areas(
            "Where the power goes", "Metered energy per second: requests by phase, idleness by state.", spent, "watt"
        ),
        12,
        8,
    )
    went = [(increase(ENERGY), "requests"), *((increase(name), part) for part, name in PARTS.items())]
    went += [(increase(IDLE, 'state="awake"'), "awake"), (increase(IDLE, 'state="sleeping"'), "sleeping")]
    unpriced = increase("llmco2_unpriced_energy_joules_total", 'energy!="predicted"')
    went.append((unpriced, "without an intensity"))
    text = (
        "Metered energy over the range shown. Aborted, recomputed and rejected are parts of that of requests; "
        "without an intensity there is energy and no grams."
    )
    yield bars("Where the energy went", text, went, "joule"), 12, 8
    yield from ((panel, 8, 7) for panel in _energy_of_requests())
    yield from ((panel, 8, 7) for panel in _energy_beside_requests())


def _energy_of_requests() -> Iterator[Json]:
    yield lines(
        "Energy of no avail",
        "Parts of the metered energy of requests: of clients that left, of tokens computed again after a preemption, "
        "of drafts that were not accepted.",
        [(ratio(rate(name), rate(ENERGY)), part) for part, name in PARTS.items()],
        "percentunit",
    )
    yield lines(
        "Tokens not computed, or computed in vain",
        "Tokens per second of ended requests: taken from the prefix cache, replayed after a preemption, rejected.",
        [
            (rate("llmco2_cached_tokens_total"), "cached"),
            (rate("llmco2_recomputed_tokens_total"), "recomputed"),
            (rate("llmco2_rejected_draft_tokens_total"), "rejected drafts"),
        ],
        "short",
        axisSoftMax=1,
    )
    yield lines(
        "Aborted energy, predicted against measured",
        "Energy per second that went to requests whose client left or that failed.",
        [(rate(PARTS["aborted"]), "measured"), (rate("llmco2_predicted_aborted_energy_joules_total"), "predicted")],
        "watt",
    )


def _energy_beside_requests() -> Iterator[Json]:
    yield lines(
        "Idle power",
        "Learned power of the devices without steps.",
        [(total("sum", "llmco2_idle_power_watts", by="state"), "{{state}}")],
        "watt",
    )
    yield lines(
        "Unattributed energy",
        "Since the start; neither steps nor idleness explain it. Of either sign.",
        [
            (
                total("sum", "llmco2_unattributed_energy_joules", by="instance, engine"),
                "{{instance}} · engine {{engine}}",
            )
        ],
        "joule",
        min=None,
    )
    yield areas(
        "Embodied and idle carbon per hour",
        "Embodied CO2e per hour while requests run and while none does; operational CO2e per hour of idleness.",
        [
            (hourly(EMBODIED, by="state"), "embodied, {{state}}"),
            (hourly(IDLE_CARBON, by="state"), "operational, {{state}}"),
        ],
        "massg",
    )
