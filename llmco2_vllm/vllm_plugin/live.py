"""What ``GET /carbon/live`` shows: one small document with the figures of now, and the page that draws it.

The document holds values and method names, never text or ids of requests. Energies count from the start of the
engines, so whoever asks twice has the mean power between; what is not known, or not by all engines, is None.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from llmco2_vllm.core.embodied import split_idle
from llmco2_vllm.core.units import SECONDS_PER_HOUR
from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.vllm_plugin.asgi import Page

SCHEMA = "llmco2-live/1"
REQUESTS_SHOWN = 20
# Differences of energies are taken: a joule is seen beside a terajoule.
_DIGITS = 12
_PREDICTED = ("prefill_joules", "decode_joules", "aborted_joules")
_MEASURED = (
    *("metered_joules", "prefill_joules", "decode_joules", "idle_joules", "sleeping_joules", "unattributed_joules"),
    *("estimated_joules", "aborted_joules", "windows", "doubtful_windows"),
)
_TOKENS = {"prefill": "prefill_tokens", "decode": "decode_tokens", "cached": "cached_tokens"}

Engine = Mapping[str, Any]


def document(
    status: Mapping[str, Any],
    accounting: Accounting,
    finished: Sequence[tuple[float, str]] | None,
    now_epoch_seconds: float,
) -> dict[str, Any]:
    """Body of ``GET /carbon/live.json``; plain JSON values.

    status: that of ``GET /carbon``. finished: time and annotation of the last requests, None where it is not known.
    """
    engines: Sequence[Engine] = status["engines"]
    metered = [engine["metered"] for engine in engines if "metered" in engine]
    metered = metered if len(metered) == len(engines) else []
    grams_per_joule = accounting.operational_grams(1.0)
    shown = {
        "schema": SCHEMA,
        "time_epoch_seconds": now_epoch_seconds,
        "started_epoch_seconds": min((engine["started_seconds"] for engine in engines), default=None),
        **{key: status.get(key) for key in ("version", "vllm_version", "model")},
        "engines": len(engines),
        "running_requests": _total(engines, "running_requests"),
        "power": {"measured_watts": _power_watts(engines), "idle_watts": _idle_watts(metered)},
        "grams_per_joule": grams_per_joule,
        "predicted": {name: _total(engines, name) for name in _PREDICTED},
        "measured": {name: _total(metered, name) for name in _MEASURED} if metered else None,
        "tokens": {name: _total(engines, field) for name, field in _TOKENS.items()},
        "embodied": _embodied(engines, accounting, now_epoch_seconds),
        "trust": _trust(status, engines, metered),
        **{key: status.get(key) for key in ("intensity", "intensity_market", "pue", "pue_source")},
        "requests": None if finished is None else [_request(at, json.loads(text)) for at, text in finished],
    }
    rounded: dict[str, Any] = _rounded(shown)
    return rounded


def _total(engines: Iterable[Engine], field: str) -> Any:
    """Sum over the engines; None without one, or where one of them does not know it."""
    values = [engine.get(field) for engine in engines]
    return None if not values or None in values else sum(values)


def _devices(engines: Iterable[Engine]) -> list[Mapping[str, Any]]:
    return [device for engine in engines for device in engine.get("meter", {}).get("devices", [])]


def _power_watts(engines: Sequence[Engine]) -> float | None:
    """Power of the devices of all engines now, W."""
    if any(not engine.get("meter", {}).get("devices") for engine in engines):
        return None
    watts: float | None = _total(_devices(engines), "power_watts")
    return watts


def _idle_watts(metered: Sequence[Engine]) -> float | None:
    """What the devices of awake engines were learned to draw without steps, W."""
    watts: float | None = _total([engine["idle_power_watts"] for engine in metered], "awake")
    return watts


def _embodied(engines: Sequence[Engine], accounting: Accounting, now: float) -> dict[str, float] | None:
    """Grams CO2e of making the hardware: since the start by busy and idle time, and per hour of all of it."""
    hardware = accounting.hardware
    if hardware is None or not engines:
        return None
    rate = hardware.rate_grams_per_second
    busy = idle = 0.0
    for engine in engines:
        seconds = engine["step_seconds"]
        parts = split_idle(rate, seconds, max(0.0, now - engine["started_seconds"] - seconds))
        busy, idle = busy + parts[0], idle + parts[1]
    return {"busy_grams": busy, "idle_grams": idle, "grams_per_hour": rate * len(engines) * SECONDS_PER_HOUR}


def _trust(status: Mapping[str, Any], engines: Sequence[Engine], metered: Sequence[Engine]) -> dict[str, Any]:
    devices, front = _devices(engines), status["front_end"]
    failures = sum((Counter(part["failures"]) for part in (front, *engines)), Counter())
    faults = sum((Counter(device.get("faults", {})) for device in devices), Counter())
    # What no window covered is estimated, beside the measured energy of the phases.
    covered, uncovered = (
        sum(_total(metered, name) for name in names) if metered else 0.0
        for names in (("prefill_joules", "decode_joules"), ("estimated_joules",))
    )
    residuals = [engine["residual_joules"] for engine in metered]
    return {
        "hook_active": all(part["active"] for part in (front, *engines)) if engines else None,
        "failures": failures.total(),
        **{key: status.get(key) for key in ("meter", "meter_reason", "predictor")},
        "sources": sorted({source for device in devices if (source := device.get("source"))}),
        "faults": dict(faults.most_common(8)) if metered else None,
        "coverage_ratio": covered / (covered + uncovered) if covered + uncovered > 0.0 else None,
        "bias_ratio": _bias(metered),
        # Of either sign: sums would hide one behind the other.
        "residual_joules": max(residuals, key=abs, default=None),
    }


def _bias(metered: Iterable[Engine]) -> dict[str, float]:
    """Predicted over measured energy less 1, by mix of phases; of the engine that is furthest off."""
    worst: dict[str, float] = {}
    for engine in metered:
        for mix, ratio in engine["bias_ratio"].items():
            if ratio is not None:
                worst[mix] = max(worst.get(mix, 0.0), ratio, key=abs)
    return worst


def _request(finished_epoch_seconds: float, annotation: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the list of requests."""
    tokens, grams = annotation["tokens"], annotation.get("carbon_grams", {})
    return {
        "time_epoch_seconds": finished_epoch_seconds,
        "prefill_tokens": tokens["prefill"],
        "cached_tokens": tokens["cached"],
        "decode_tokens": tokens["decode"],
        "predicted_joules": annotation["estimate"]["energy_joules"],
        "joules": annotation.get("energy_joules", {}).get("value"),
        "coverage_ratio": annotation.get("coverage_ratio"),
        "grams": grams.get("operational"),
        "embodied_grams": grams.get("embodied"),
        "basis": annotation["basis"],
        "in_distribution": annotation["in_distribution"],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def page() -> Page:
    """The page with its guard: a browser runs and fetches nothing but what was shipped and this server's figures."""
    text = files("llmco2_vllm").joinpath("data/live.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_digests(text, 'script')}; style-src {_digests(text, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
    return Page(text.encode(), headers)


def _digests(text: str, element: str) -> str:
    """Source list of the inline elements of this name, by content."""
    inline: list[str] = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (hashlib.sha256(item.encode()).digest() for item in inline)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
