"""The metric table and the recorder: counters follow cumulative snapshots and never run twice."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest

from llmco2_vllm.monitor import EngineTotals
from llmco2_vllm.telemetry.metrics import JOULE_BUCKETS, METRICS, Identity, Recorder

IDENTITY = Identity("a model", "0.1.0", "0.32.0")


def snapshot(engine: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "started_seconds": 1.0,
        "provenance": {"predictor": "roofline/1-cpu", "meter": "none", "meter_reason": "why"},
        "failures": {},
        "hook_seconds": 0.0,
        **asdict(EngineTotals()),
        **values,
    }


def make() -> tuple[Recorder, CollectorRegistry]:
    registry = CollectorRegistry()
    return Recorder(IDENTITY, registry), registry


def energy(registry: CollectorRegistry, engine: str, phase: str) -> float | None:
    labels = {"model_name": "a model", "engine": engine, "phase": phase}
    return registry.get_sample_value("llmco2_predicted_energy_joules_total", labels)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=10), st.sets(st.integers(0, 9)))
def test_snapshots_that_get_lost_cost_nothing(gains: list[float], lost: set[int]) -> None:
    recorder, registry = make()
    joules = 0.0
    for i, gain in enumerate(gains):
        joules += gain
        if i not in lost or i == len(gains) - 1:
            recorder.engine(snapshot(prefill_joules=joules), 0.0)
    assert energy(registry, "0", "prefill") == pytest.approx(joules)


def test_an_engine_that_began_anew_is_counted_from_zero() -> None:
    recorder, registry = make()
    for started, joules in ((1.0, 10.0), (2.0, 4.0), (2.0, 5.0)):
        recorder.engine(snapshot(decode_joules=joules, started_seconds=started), 0.0)
    assert energy(registry, "0", "decode") == pytest.approx(15.0)


def test_a_snapshot_that_was_overtaken_brings_nothing() -> None:
    recorder, registry = make()
    for joules in (10.0, 4.0, 12.0):
        recorder.engine(snapshot(decode_joules=joules), 0.0)
    assert energy(registry, "0", "decode") == pytest.approx(12.0)


def test_engines_are_counted_apart() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(0, decode_joules=1.0), 0.0)
    recorder.engine(snapshot(1, decode_joules=2.0), 0.0)
    assert (energy(registry, "0", "decode"), energy(registry, "1", "decode")) == (1.0, 2.0)


def test_grams_are_joules_times_the_factor_of_the_moment() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(decode_joules=10.0), 0.5)
    recorder.engine(snapshot(decode_joules=20.0), 0.1)
    labels = {"model_name": "a model", "engine": "0", "phase": "decode"}
    assert registry.get_sample_value("llmco2_predicted_carbon_grams_total", labels) == pytest.approx(6.0)


def test_names_keep_to_the_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"llmco2_[a-z0-9_]+", name)
        assert name.endswith("_total") == (metric.kind is Counter)
        assert not {"request_id", "user", "prompt"} & set(metric.labels)


def test_buckets_run_from_a_tenth_of_a_joule_to_a_hundred_kilojoules() -> None:
    assert (JOULE_BUCKETS[0], JOULE_BUCKETS[-1], len(JOULE_BUCKETS)) == (0.1, 1e5, 19)
    assert list(JOULE_BUCKETS) == sorted(JOULE_BUCKETS)


def test_every_metric_of_the_table_is_fed() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(failures={"schedule": 1}, steps=3), 0.1)
    recorder.request_finished(0, 3.0)
    recorder.intensity(56.0, "FR", "settings", "average")
    text = generate_latest(registry).decode()
    for name in METRICS:
        assert re.search(rf"^{name}(_sum)?{{", text, re.MULTILINE), name


def test_a_second_engine_in_one_process_goes_on_in_the_same_metrics() -> None:
    first, registry = make()
    first.engine(snapshot(prefill_joules=5.0), 0.0)
    Recorder(IDENTITY, registry).engine(snapshot(prefill_joules=2.0), 0.0)
    assert energy(registry, "0", "prefill") == 7.0
