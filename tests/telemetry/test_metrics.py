"""The metric table and the recorder: counters follow cumulative snapshots and never run twice."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest

from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import EngineTotals
from llmco2_vllm.telemetry.metric_table import JOULE_BUCKETS, METRICS
from llmco2_vllm.telemetry.metrics import Identity, Recorder
from llmco2_vllm.testing import FakeClock
from tests.telemetry.books import accounting, with_hardware

WORLD = accounting()
IDENTITY = Identity("a model", "0.1.0", "0.32.0")


def snapshot(engine: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "started_seconds": 1.0,
        "provenance": {"predictor": "roofline/1-cpu", "meter": "none", "meter_reason": "why"},
        "active": True,
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
            recorder.engine(snapshot(prefill_joules=joules), WORLD, 10.0)
    assert energy(registry, "0", "prefill") == pytest.approx(joules)


def test_an_engine_that_began_anew_is_counted_from_zero() -> None:
    recorder, registry = make()
    for started, joules in ((1.0, 10.0), (2.0, 4.0), (2.0, 5.0)):
        recorder.engine(snapshot(decode_joules=joules, started_seconds=started), WORLD, 10.0)
    assert energy(registry, "0", "decode") == pytest.approx(15.0)


def test_a_snapshot_that_was_overtaken_brings_nothing() -> None:
    recorder, registry = make()
    for joules in (10.0, 4.0, 12.0):
        recorder.engine(snapshot(decode_joules=joules), WORLD, 10.0)
    assert energy(registry, "0", "decode") == pytest.approx(12.0)


def test_engines_are_counted_apart() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(0, decode_joules=1.0), WORLD, 10.0)
    recorder.engine(snapshot(1, decode_joules=2.0), WORLD, 10.0)
    assert (energy(registry, "0", "decode"), energy(registry, "1", "decode")) == (1.0, 2.0)


def test_grams_are_joules_times_the_factor_of_the_moment() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(decode_joules=3.6e6), accounting(intensity=200), 10.0)
    recorder.engine(snapshot(decode_joules=7.2e6), accounting(intensity=400), 10.0)
    labels = {"model_name": "a model", "engine": "0", "phase": "decode"}
    assert registry.get_sample_value("llmco2_predicted_carbon_grams_total", labels) == pytest.approx(600.0)


def test_names_keep_to_the_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"llmco2_[a-z0-9_]+", name)
        assert name.endswith("_total") == (metric.kind is Counter)
        assert not {"request_id", "user", "prompt"} & set(metric.labels)


def test_buckets_run_from_a_tenth_of_a_joule_to_a_hundred_kilojoules() -> None:
    assert (JOULE_BUCKETS[0], JOULE_BUCKETS[-1], len(JOULE_BUCKETS)) == (0.1, 1e5, 19)
    assert list(JOULE_BUCKETS) == sorted(JOULE_BUCKETS)


def metered(**values: float) -> dict[str, Any]:
    """What an engine with a meter adds to its snapshot."""
    state = Metering(Attributor([50.0]), deque()).state()
    watts = {"awake": 50.0, "sleeping": 20.0}
    reports = [[1, "decode", 0.1], [2, "mixed", -0.2]]
    return {**state, "idle_power_watts": watts, "bias_ratio": {"decode": 0.1}, "reports": reports, **values}


def test_every_metric_of_the_table_is_fed() -> None:
    recorder, registry = make()
    device = {"source": "counter", "power_watts": 300.0, "faults": {"device lost": 1}}
    meter = {"devices": [device]}
    whole = with_hardware(market_intensity=20)._replace(age_seconds=7.0)
    recorder.engine(snapshot(failures={"schedule": 1}, steps=3, metered=metered(), meter=meter), whole, 10.0)
    unpriced = metered(decode_joules=1.0)
    recorder.engine(snapshot(step_seconds=2.0, metered=unpriced), whole._replace(intensity=None), 20.0)
    recorder.request_finished(0, 3.0)
    recorder.intensities(whole)
    recorder.request_measured(0, 12.0, 100, WORLD)
    text = generate_latest(registry).decode()
    for name in METRICS:
        assert re.search(rf"^{name}(_sum|_bucket)?{{", text, re.MULTILINE), name


def test_without_a_meter_no_measured_family_has_a_value() -> None:
    recorder, registry = make()
    recorder.engine(snapshot(decode_joules=3.0), WORLD, 10.0)
    text = generate_latest(registry).decode()
    assert not re.search(
        r"^llmco2_(energy|metered|idle|carbon|power|meter|window|unattributed)\w*{", text, re.MULTILINE
    )


def test_energy_without_a_known_intensity_is_in_no_grams_and_is_said() -> None:
    recorder, registry = make()
    rates = accounting(intensity=360)
    recorder.engine(snapshot(metered=metered(decode_joules=1e4)), rates, 10.0)
    recorder.engine(snapshot(metered=metered(decode_joules=5e4)), rates._replace(intensity=None), 15.0)
    recorder.engine(snapshot(metered=metered(decode_joules=6e4)), rates, 20.0)
    labels = {"model_name": "a model", "engine": "0"}
    grams = registry.get_sample_value("llmco2_carbon_grams_total", {**labels, "phase": "decode"})
    assert grams == pytest.approx(2.0), "20 kJ at 0.1 mg/J"
    unpriced = registry.get_sample_value("llmco2_unpriced_energy_joules_total", {**labels, "energy": "requests"})
    assert unpriced == pytest.approx(4e4)


@pytest.mark.parametrize("energy", ["requests", "idle", "predicted"])
def test_energy_of_every_kind_is_in_grams_or_said_to_be_in_none(energy: str) -> None:
    recorder, registry = make()
    unknown = accounting(intensity=360)._replace(intensity=None)
    told = snapshot(decode_joules=7.0, metered=metered(decode_joules=5.0, idle_joules=3.0))
    recorder.engine(told, unknown, 10.0)
    labels = {"model_name": "a model", "engine": "0", "energy": energy}
    expected = {"requests": 5.0, "idle": 3.0, "predicted": 7.0}[energy]
    assert registry.get_sample_value("llmco2_unpriced_energy_joules_total", labels) == expected


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 1)), min_size=1, max_size=8), st.floats(-1e9, 1e9))
def test_embodied_grams_of_busy_and_idle_time_add_up_to_the_time_whatever_the_calendar_says(
    spans: list[tuple[float, float]], jump: float
) -> None:
    clock, registry = FakeClock(100.0), CollectorRegistry()
    recorder = Recorder(IDENTITY, registry, clock)
    rates = with_hardware()
    held, busy = 5.0, 0.0
    recorder.engine(snapshot(), rates, 1.0 + held)
    for seconds, share in spans:
        clock.advance(seconds)
        held, busy = held + seconds, busy + seconds * share
        recorder.engine(snapshot(step_seconds=busy), rates, 1.0 + held + jump)
    labels = {"model_name": "a model", "engine": "0"}
    states = {
        state: registry.get_sample_value("llmco2_embodied_carbon_grams_total", {**labels, "state": state}) or 0.0
        for state in ("busy", "idle")
    }
    assert rates.hardware is not None
    assert sum(states.values()) == pytest.approx(rates.hardware.rate_grams_per_second * held, rel=1e-9)
    assert states["busy"] == pytest.approx(rates.hardware.rate_grams_per_second * busy, rel=1e-9)


def test_a_source_that_is_no_longer_in_use_is_shown_as_such() -> None:
    recorder, registry = make()
    for rates in (accounting("FR"), accounting("FR", 20.0), accounting("FR", 20.0)._replace(intensity=None)):
        recorder.intensities(rates)
    shown = {
        sample.labels["source"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "llmco2_grid_info"
    }
    assert sorted(shown.values()) == [0.0, 0.0]
    assert registry.get_sample_value("llmco2_grid_intensity_known", {"basis": "location"}) == 0.0
    last = registry.get_sample_value("llmco2_grid_intensity_grams_per_kwh", {"basis": "location"})
    assert last is not None and math.isnan(last), "the last known figure is not that of now"


def test_a_meter_that_none_of_the_engines_has_any_more_is_shown_as_such() -> None:
    recorder, registry = make()

    def meters() -> dict[str, float]:
        samples = [sample for family in registry.collect() for sample in family.samples]
        return {sample.labels["meter"]: sample.value for sample in samples if sample.name == "llmco2_build_info"}

    def tell(engine: int, meter: str) -> dict[str, float]:
        told = snapshot(engine=engine)
        told["provenance"] = {**told["provenance"], "meter": meter}
        recorder.engine(told, WORLD, 10.0)
        return meters()

    assert tell(0, "none") == {"none": 1.0}
    assert tell(1, "none") == {"none": 1.0}
    assert tell(0, "nvml") == {"none": 1.0, "nvml": 1.0}
    assert tell(1, "nvml") == {"none": 0.0, "nvml": 1.0}


def test_each_report_is_counted_once_however_often_it_is_told() -> None:
    recorder, registry = make()
    for _ in range(3):
        recorder.engine(snapshot(metered=metered()), WORLD, 10.0)
    labels = {"model_name": "a model", "engine": "0"}
    assert registry.get_sample_value("llmco2_window_error_ratio_count", labels) == 2


@given(st.lists(st.tuples(*[st.floats(0, 1e6)] * 4), min_size=1, max_size=8))
def test_measured_families_add_up_to_the_counter(parts: list[tuple[float, ...]]) -> None:
    recorder, registry = make()
    sums = [0.0] * 4
    for part in parts:
        sums = [x + y for x, y in zip(sums, part, strict=True)]
        prefill, decode, idle, sleeping = sums
        told = metered(
            prefill_joules=prefill, decode_joules=decode, idle_joules=idle, sleeping_joules=sleeping,
            metered_joules=sum(sums),
        )  # fmt: skip
        recorder.engine(snapshot(metered=told), WORLD, 10.0)
    values = [
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name in ("llmco2_energy_joules_total", "llmco2_idle_energy_joules_total")
    ]
    whole = registry.get_sample_value("llmco2_metered_energy_joules_total", {"model_name": "a model", "engine": "0"})
    assert sum(values) == pytest.approx(whole, rel=1e-9)


def test_power_is_unknown_as_soon_as_it_is_for_a_device_and_known_again_with_it() -> None:
    recorder, registry = make()
    for watts, known in ((300.0, 500.0), (None, None), (250.0, 450.0)):
        devices = [{"source": "counter", "power_watts": w, "faults": {}} for w in (watts, 200.0)]
        recorder.engine(snapshot(metered=metered(), meter={"devices": devices}), WORLD, 10.0)
        value = registry.get_sample_value("llmco2_power_watts", {"model_name": "a model", "engine": "0"})
        assert value is not None and (math.isnan(value) if known is None else value == known)


def test_a_meter_that_lost_a_device_is_down() -> None:
    recorder, registry = make()
    for source, up in (("counter", 1.0), ("none", 0.0), ("power", 1.0)):
        devices = [{"source": "counter"}, {"source": source}]
        recorder.engine(snapshot(metered=metered(), meter={"devices": devices}), WORLD, 10.0)
        assert registry.get_sample_value("llmco2_meter_up", {"model_name": "a model", "engine": "0"}) == up


def test_a_second_engine_in_one_process_goes_on_in_the_same_metrics() -> None:
    first, registry = make()
    first.engine(snapshot(prefill_joules=5.0), WORLD, 10.0)
    Recorder(IDENTITY, registry).engine(snapshot(prefill_joules=2.0), WORLD, 10.0)
    assert energy(registry, "0", "prefill") == 7.0


def test_an_intensity_without_a_time_has_no_age() -> None:
    recorder, registry = make()
    for _ in range(3):
        recorder.intensities(accounting("FR", 20.0))
    assert registry.get_sample_value("llmco2_grid_intensity_age_seconds", {"basis": "location"}) is None
