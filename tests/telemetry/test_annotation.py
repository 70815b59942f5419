"""The annotation: its schema is the published one, it adds up, and it leaves out what is not known."""

import json
import subprocess
import sys
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.telemetry.annotation import Annotation, annotate, json_schema
from llmco2_vllm.telemetry.ledger import Ledger, Provenance, RequestLedger

PUBLISHED = json.loads((files("llmco2_vllm") / "data" / "annotation.schema.json").read_text())
WORLD = Accounting.from_values(None, None, None, None)
joules = st.floats(0, 1e7)
counts = st.integers(0, 10**6)


@st.composite
def ledgers(draw: st.DrawFn) -> RequestLedger:
    prefill, decode = draw(joules), draw(joules)
    energy = prefill + decode
    lower, upper = energy * draw(st.floats(0, 1)), energy * draw(st.floats(1, 4))
    tokens = [draw(counts) for _ in range(6)]
    ledger = Ledger(draw(st.integers(0, 7)), True, draw(st.booleans()), prefill, decode, lower, upper, *tokens)
    source = Provenance(draw(st.sampled_from(["roofline/1-h100", "roofline/1-cpu"])), "none", "no NVML library")
    return RequestLedger(ledger, source, complete=True, finished=True)


accountings = st.builds(
    Accounting.from_values,
    st.none() | st.sampled_from(["FR", "US-CAL-CISO"]),
    st.none() | st.floats(0, 3000),
    st.none() | st.floats(1, 5),
    st.none() | st.floats(0, 5),
)


def request(prefill: float = 6.0, decode: float = 34.0, **more: Any) -> RequestLedger:
    energy = prefill + decode
    ledger = Ledger(3, True, True, prefill, decode, energy * 0.8, energy * 1.3, 512, 128, 64, 0, 0, 129)
    fields = {"provenance": Provenance("roofline/1-h100", "none", "no NVML library"), "complete": True} | more
    return RequestLedger(ledger, **fields)


def described(items: list[RequestLedger], accounting: Accounting = WORLD) -> dict[str, Any]:
    annotation = annotate(items, accounting)
    assert annotation is not None
    return dict(json.loads(annotation.json_text()))


def test_the_published_schema_is_the_one_of_the_model() -> None:
    assert json_schema() == PUBLISHED


def test_the_module_prints_the_published_schema() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "llmco2_vllm.telemetry.annotation"], capture_output=True, check=True, text=True
    ).stdout
    assert json.loads(printed) == PUBLISHED


def test_the_published_schema_is_a_schema_and_knows_no_null() -> None:
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    assert "null" not in json.dumps(PUBLISHED)


@given(st.lists(ledgers(), min_size=1, max_size=4), accountings)
def test_every_annotation_follows_the_published_schema(items: list[RequestLedger], accounting: Accounting) -> None:
    jsonschema.validate(described(items, accounting), PUBLISHED)


@given(st.lists(ledgers(), min_size=1, max_size=4), accountings)
def test_json_text_and_document_say_the_same_on_one_line(items: list[RequestLedger], accounting: Accounting) -> None:
    annotation = annotate(items, accounting)
    assert annotation is not None
    text = annotation.json_text()
    assert json.loads(text) == annotation.document()
    assert "\n" not in text and "null" not in text
    assert Annotation.model_validate_json(text) == annotation


@given(st.lists(ledgers(), min_size=1, max_size=4), accountings)
def test_energy_is_the_sum_of_the_requests_and_of_its_phases(
    items: list[RequestLedger], accounting: Accounting
) -> None:
    estimate = described(items, accounting)["estimate"]
    assert estimate["energy_joules"] == pytest.approx(sum(i.ledger.energy_joules for i in items), rel=1e-5)
    phases = estimate["prefill_joules"] + estimate["decode_joules"]
    assert estimate["energy_joules"] == pytest.approx(phases, rel=2e-5)


@given(ledgers(), accountings)
def test_grams_lie_in_their_interval_and_follow_the_energy(item: RequestLedger, accounting: Accounting) -> None:
    carbon = described([item], accounting)["carbon_grams"]
    assert carbon["lower"] <= carbon["operational"] <= carbon["upper"]
    joules_of_node = item.ledger.energy_joules * (1 + (accounting.node_overhead_ratio or 0))
    grams = joules_of_node / 3.6e6 * (accounting.pue or 1) * accounting.grams_per_kwh
    assert carbon["operational"] == pytest.approx(grams, rel=1e-5)


def test_node_overhead_is_shown_and_counted_once() -> None:
    plain = described([request()], Accounting.from_values("FR", 56, 1.2, None))
    whole = described([request()], Accounting.from_values("FR", 56, 1.2, 0.5))
    assert "host_joules" not in plain["estimate"]
    assert whole["estimate"]["host_joules"] == pytest.approx(20)
    assert whole["estimate"]["energy_joules"] == plain["estimate"]["energy_joules"]
    assert whole["carbon_grams"]["operational"] == pytest.approx(1.5 * plain["carbon_grams"]["operational"], rel=1e-5)


def test_what_is_not_known_is_left_out() -> None:
    shown = described([request()])
    assert not shown.keys() & {"energy_joules", "coverage_ratio", "pue", "engine"}
    assert "rejected_drafts" not in shown["tokens"]
    unnamed = described([request(provenance=Provenance("roofline/1", "none"))], Accounting.from_values(None, 56, 1, 0))
    assert "meter_reason" not in unnamed and "zone" not in unnamed["intensity"]
    assert unnamed["pue"] == 1 and unnamed["estimate"]["host_joules"] == 0


def test_the_figures_say_that_they_are_predicted() -> None:
    shown = described([request()])
    assert (shown["schema"], shown["method"], shown["basis"]) == ("llmco2/1", "1.0", "predicted")
    assert (shown["estimate"]["when"], shown["attribution"]) == ("before_execution", "step-kernel/1")
    assert (shown["meter"], shown["meter_reason"]) == ("none", "no NVML library")
    assert shown["tokens"] == {"prefill": 512, "cached": 64, "recomputed": 0, "decode": 128}


@pytest.mark.parametrize("missing", [request(complete=False), request(provenance=None)])
def test_a_sum_with_a_part_missing_is_no_annotation(missing: RequestLedger) -> None:
    assert annotate([], WORLD) is None
    assert annotate([missing], WORLD) is None
    assert annotate([request(), missing], WORLD) is None


def test_figures_have_six_significant_digits() -> None:
    assert described([request(prefill=1 / 3, decode=0)])["estimate"]["prefill_joules"] == 0.333333
    assert described([request(prefill=1234567.8, decode=0)])["estimate"]["prefill_joules"] == 1234570.0


def test_engines_with_different_predictors_are_both_named() -> None:
    other = request(provenance=Provenance("roofline/2-h100", "none", "no NVML library"))
    shown = described([request(), other, request()])
    assert (shown["predictor"], shown["meter"]) == ("roofline/1-h100, roofline/2-h100", "none")
