"""Expositions of the product's recorder with every family filled, as full as they can get."""

from __future__ import annotations

import ast
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

import llmco2_vllm
from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.comparison import PhaseMix
from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import EngineTotals
from llmco2_vllm.telemetry.metrics import Identity, Recorder
from tests.telemetry.books import with_hardware

PLUGIN = Path(llmco2_vllm.__file__).parent / "vllm_plugin"
OF_THE_ENGINE = ("engine.py", "hook.py", "scheduler.py")
WORLD = with_hardware(market_intensity=20)._replace(age_seconds=7.0)


def places_of_failure(engine: bool) -> list[str]:
    """Names of the places where the engine's part of the plugin, or the front end's, catches failures."""
    found = set()
    for path in PLUGIN.glob("*.py"):
        if (path.name in OF_THE_ENGINE) == engine:
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            first = (node.args[0] for node in calls if _catches(node) and node.args)
            found.update(a.value for a in first if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return sorted(found)


def _catches(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr in ("call", "failed")


def fill(recorder: Recorder, engine: int, broken: bool) -> None:
    """All that an engine can tell; broken: every kind of fault and failure included."""
    state = Metering(Attributor([50.0]), deque()).state()
    mixes = [mix.value for mix in PhaseMix]
    metered = {
        **state,
        "idle_power_watts": {"awake": 50.0, "sleeping": 20.0},
        "bias_ratio": dict.fromkeys(mixes, 0.1),
        "reports": [[number, mix, 0.1] for number, mix in enumerate(mixes, 1)],
        "decode_joules": 1.0,
        "metered_joules": 1.0,
    }
    faults = {doubt.value: 1 for doubt in Doubt if doubt is not Doubt.NONE} if broken else {}
    snapshot: dict[str, Any] = {
        "engine": engine,
        "started_seconds": 1.0,
        "provenance": {"predictor": "gnn/2026.11-h100-sxm", "meter": "nvml"},
        "active": True,
        "failures": dict.fromkeys(places_of_failure(engine=True), 1) if broken else {},
        "hook_seconds": 0.1,
        **asdict(EngineTotals()),
        "metered": metered,
        "meter": {"devices": [{"source": "counter", "power_watts": 300.0, "faults": faults}]},
    }
    recorder.engine(snapshot, WORLD, 10.0)
    unpriced = {**metered, "decode_joules": 2.0, "metered_joules": 2.0}
    recorder.engine({**snapshot, "step_seconds": 2.0, "metered": unpriced}, WORLD._replace(intensity=None), 20.0)
    recorder.request_finished(engine, 3.0)
    recorder.request_measured(engine, 12.0, 100, WORLD)


def full(models: int = 1, engines: int = 1, broken: bool = True) -> CollectorRegistry:
    """A registry with so many models of so many engines each; without ``broken`` nothing has failed yet."""
    registry = CollectorRegistry()
    for model in range(models):
        recorder = Recorder(Identity(f"organisation/model-{model}", "0.1.0", "0.32.0"), registry)
        recorder.intensities(WORLD)
        if broken:
            recorder.failures("front_end", dict.fromkeys(places_of_failure(engine=False), 1))
        for engine in range(engines):
            fill(recorder, engine, broken)
    return registry


def text(registry: CollectorRegistry) -> str:
    """One scrape."""
    return generate_latest(registry).decode()
