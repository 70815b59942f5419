"""Expositions of the product's recorder with every family filled, as full as they can get."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.comparison import PhaseMix
from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import EngineTotals
from llmco2_vllm.telemetry.metrics import Identity, Recorder
from llmco2_vllm.vllm_plugin.guard import PLACES
from tests.telemetry.books import with_hardware

WORLD = with_hardware(market_intensity=20)._replace(age_seconds=7.0)
METERED = Metering(Attributor([50.0]), deque()).state()


def _snapshot(engine: int, metered: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    return {
        "engine": engine,
        "started_seconds": 1.0,
        "provenance": {"predictor": "gnn/2026.11-h100-sxm", "meter": "nvml"},
        "active": True,
        "failures": {},
        "hook_seconds": 0.1,
        **asdict(EngineTotals()),
        "metered": metered,
        "meter": {"devices": [device]},
    }


def fill(recorder: Recorder, engine: int, broken: bool) -> None:
    """All that an engine can tell; broken: every kind of fault and failure included."""
    mixes = [mix.value for mix in PhaseMix]
    metered = {
        **METERED,
        "idle_power_watts": {"awake": 50.0, "sleeping": 20.0},
        "bias_ratio": dict.fromkeys(mixes, 0.1),
        "reports": [[number, mix, 0.1] for number, mix in enumerate(mixes, 1)],
        "decode_joules": 1.0,
        "metered_joules": 1.0,
    }
    faults = {doubt.value: 1 for doubt in Doubt if doubt is not Doubt.NONE} if broken else {}
    device = {"source": "counter", "power_watts": 300.0, "faults": faults}
    failures = dict.fromkeys(PLACES["engine"], int(broken))
    snapshot = {**_snapshot(engine, metered, device), "failures": failures}
    recorder.engine(snapshot, WORLD, 10.0)
    unpriced = {**metered, "decode_joules": 2.0, "metered_joules": 2.0}
    recorder.engine({**snapshot, "step_seconds": 2.0, "metered": unpriced}, WORLD._replace(intensity=None), 20.0)
    recorder.request_finished(engine, 3.0)
    recorder.request_measured(engine, 12.0, 100, WORLD)


def work(recorder: Recorder, engine: int, moment: int, broken: bool) -> None:
    """What a busy engine tells at moments 1, 2, ... and the requests it finished since: all that moves has moved.

    Its energy is that of a day and more; broken: and every kind of fault and failure came again.
    """
    passed = moment * 15.0037 + engine / 7
    energy, tokens = 3e7 + 700.0 * passed, 1_000_000 + int(2000 * passed)
    small = 1.0 + passed / 977
    joules = dict.fromkeys((name for name in METERED if name.endswith("_joules")), energy)
    metered = {
        **METERED,
        **joules,
        "unattributed_joules": -small,
        "residual_joules": small * 1e-9,
        "coverage_ratio": 1.0 / small,
        "windows": 100 + moment,
        "doubtful_windows": moment,
        "idle_power_watts": {"awake": 50.0 + small, "sleeping": 20.0 + small},
        "bias_ratio": {mix.value: small / 10 for mix in PhaseMix},
        "reports": [[100 + moment, PhaseMix.DECODE.value, small / 10]],
    }
    faults = {doubt.value: 1 + moment for doubt in Doubt if doubt is not Doubt.NONE} if broken else {}
    totals = {name: energy if isinstance(value, float) else tokens for name, value in asdict(EngineTotals()).items()}
    snapshot = {
        **_snapshot(engine, metered, {"source": "counter", "power_watts": 300.0 + small, "faults": faults}),
        **totals,
        "hook_seconds": small,
        "step_seconds": passed / 2,
        "failures": dict.fromkeys(PLACES["engine"], (1 + moment) * broken),
    }
    recorder.engine(snapshot, WORLD, 20.0 + passed)
    for number in range(8):
        recorder.request_finished(engine, small * 3.0**number)
        recorder.request_measured(engine, small * 3.0**number, 100 + number, WORLD)


def servers(models: int, engines: int, broken: bool) -> tuple[CollectorRegistry, list[Recorder]]:
    """Recorders of so many models, with so many engines each, and their registry; see ``full``."""
    registry = CollectorRegistry()
    recorders = [Recorder(Identity(f"organisation/model-{n}", "0.1.0", "0.32.0"), registry) for n in range(models)]
    for recorder in recorders:
        recorder.intensities(WORLD)
        if broken:
            recorder.failures("front_end", dict.fromkeys(PLACES["front end"], 1))
        for engine in range(engines):
            fill(recorder, engine, broken)
    return registry, recorders


def full(models: int = 1, engines: int = 1, broken: bool = True) -> CollectorRegistry:
    """A registry with so many models of so many engines each; without ``broken`` nothing has failed yet."""
    return servers(models, engines, broken)[0]


def text(registry: CollectorRegistry) -> str:
    """One scrape."""
    return generate_latest(registry).decode()
