"""Accountings for tests: as a server's settings would make them."""

from __future__ import annotations

from llmco2_vllm.assemble import open_accountant
from llmco2_vllm.config import build_settings
from llmco2_vllm.telemetry.accounting import Accountant, Accounting


def accountant(device: str | None = None, devices: int = 1, **settings: object) -> Accountant:
    """That of these settings; None is as if the key were not there."""
    given = {key: value for key, value in settings.items() if value is not None}
    return open_accountant(build_settings(("settings", given)), device, devices, {})


def accounting(
    zone: str | None = None,
    intensity: float | None = None,
    pue: float | None = None,
    node_overhead: float | None = None,
    auxiliary: float | None = None,
) -> Accounting:
    """Of now, without embodied carbon."""
    given = {"zone": zone, "intensity": intensity, "pue": pue, "node_overhead": node_overhead, "auxiliary": auxiliary}
    return accountant(**given).now()


def with_hardware(intensity: float = 56.0, **settings: object) -> Accounting:
    """Of one H100 and its share of a server."""
    if settings.get("embodied_idle") == "busy":
        settings = {"utilisation": 0.5, **settings}
    if settings.get("intensity_method") == "marginal":
        settings = {**settings, "market_intensity": None}
    return accountant("h100-sxm", intensity=intensity, **settings).now()
