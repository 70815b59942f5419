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
from tests.telemetry.books import accounting, with_hardware

PUBLISHED = json.loads((files("llmco2_vllm") / "data" / "annotation.schema.json").read_text())
WORLD = accounting()
joules = st.floats(0, 1e7)
counts = st.integers(0, 10**6)
held = st.just(0.0) | st.floats(1e-6, 1e4)


@st.composite
def ledgers(draw: st.DrawFn) -> RequestLedger:
    prefill, decode = draw(joules), draw(joules)
    energy = prefill + decode
    lower, upper = energy * draw(st.floats(0, 1)), energy * draw(st.floats(1, 4))
    tokens = [draw(counts) for _ in range(6)]
    ledger = Ledger(
        draw(st.integers(0, 7)), True, draw(st.booleans()), prefill, decode, lower, upper, draw(held), *tokens
    )
    source = Provenance(draw(st.sampled_from(["roofline/1-h100", "roofline/1-cpu"])), "none", "no NVML library")
    return RequestLedger(ledger, source, complete=True, finished=True)


accountings = st.builds(
    accounting,
    st.none() | st.sampled_from(["FR", "US-CAL-CISO"]),
    st.none() | st.floats(0, 3000),
    st.none() | st.floats(1, 5),
    st.none() | st.floats(0, 5),
) | st.builds(
    with_hardware,
    st.floats(0, 3000),
    embodied=st.sampled_from(["product", "components", "llmcarbon"]),
    embodied_idle=st.sampled_from(["line", "busy"]),
    market_intensity=st.none() | st.floats(0, 3000),
    intensity_method=st.sampled_from(["average", "marginal"]),
)


def request(prefill: float = 6.0, decode: float = 34.0, **more: Any) -> RequestLedger:
    energy = prefill + decode
    ledger = Ledger(3, True, True, prefill, decode, energy * 0.8, energy * 1.3, 0.5, 512, 128, 64, 0, 0, 129)
    fields = {"provenance": Provenance("roofline/1-h100", "none", "no NVML library"), "complete": True} | more
    return RequestLedger(ledger, **fields)


def described(items: list[RequestLedger], rates: Accounting = WORLD) -> dict[str, Any]:
    annotation = annotate(items, rates)
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
def test_every_annotation_follows_the_published_schema(items: list[RequestLedger], rates: Accounting) -> None:
    jsonschema.validate(described(items, rates), PUBLISHED)


@given(st.lists(ledgers(), min_size=1, max_size=4), accountings)
def test_json_text_and_document_say_the_same_on_one_line(items: list[RequestLedger], rates: Accounting) -> None:
    annotation = annotate(items, rates)
    assert annotation is not None
    text = annotation.json_text()
    assert json.loads(text) == annotation.document()
    assert "\n" not in text and "null" not in text
    assert Annotation.model_validate_json(text) == annotation


@given(st.lists(ledgers(), min_size=1, max_size=4), accountings)
def test_energy_is_the_sum_of_the_requests_and_of_its_phases(items: list[RequestLedger], rates: Accounting) -> None:
    estimate = described(items, rates)["estimate"]
    assert estimate["energy_joules"] == pytest.approx(sum(i.ledger.energy_joules for i in items), rel=1e-5)
    phases = estimate["prefill_joules"] + estimate["decode_joules"]
    assert estimate["energy_joules"] == pytest.approx(phases, rel=2e-5)


@given(ledgers(), accountings)
def test_grams_lie_in_their_interval_and_follow_the_energy(item: RequestLedger, rates: Accounting) -> None:
    carbon = described([item], rates)["carbon_grams"]
    assert carbon["lower"] <= carbon["operational"] <= carbon["upper"]
    assert rates.intensity is not None
    joules_of_node = item.ledger.energy_joules * (1 + (rates.node.host_ratio or 0))
    grams = joules_of_node / 3.6e6 * (rates.node.pue or 1) * rates.intensity.grams_per_kwh
    assert carbon["operational"] == pytest.approx(grams, rel=1e-5)


def test_node_overhead_is_shown_and_counted_once() -> None:
    plain = described([request()], accounting("FR", 56, 1.2))
    whole = described([request()], accounting("FR", 56, 1.2, 0.5))
    assert "host_joules" not in plain["estimate"]
    assert whole["estimate"]["host_joules"] == pytest.approx(20)
    assert whole["estimate"]["energy_joules"] == plain["estimate"]["energy_joules"]
    assert whole["carbon_grams"]["operational"] == pytest.approx(1.5 * plain["carbon_grams"]["operational"], rel=1e-5)


@given(ledgers(), st.floats(0, 3000), st.none() | st.floats(0, 3000))
def test_sci_is_operational_and_embodied_and_no_contract_lowers_it(
    item: RequestLedger, grams: float, market: float | None
) -> None:
    carbon = described([item], with_hardware(grams, market_intensity=market))
    parts = carbon["carbon_grams"]
    assert ("sci" in carbon) == ("embodied" in parts) == ("embodied" in carbon) == (item.ledger.held_seconds > 0)
    assert ("operational_market" in parts) == ("intensity_market" in carbon) == (market is not None)
    assert carbon["intensity"]["basis"] == "location"
    if "sci" not in carbon:
        assert "total" not in parts
        return
    assert parts["total"] == pytest.approx(parts["operational"] + parts["embodied"], rel=1e-5)
    assert carbon["sci"]["per_request"] == parts["total"]
    tokens = max(0, item.ledger.useful_tokens)
    assert ("per_1000_tokens" in carbon["sci"]) == (tokens > 0)
    if tokens:
        assert carbon["sci"]["per_1000_tokens"] == pytest.approx(parts["total"] / tokens * 1000, rel=1e-5)


def test_embodied_carbon_of_a_second_is_the_cards_and_its_share_of_the_host() -> None:
    # 164 kg for the card and 5700 kg / 8 for its host over 4 years of 365 days.
    carbon = described([request()], with_hardware())
    assert carbon["carbon_grams"]["embodied"] == pytest.approx(0.5 * (164e3 + 5700e3 / 8) / (4 * 365 * 86400), rel=1e-5)
    assert carbon["embodied"] == {
        "model": "product", "held_seconds": 0.5, "lifetime_years": 4, "host_lifetime_years": 4,
        "idle": "line", "omitted": [],
    }  # fmt: skip
    longer = described([request()], with_hardware(lifetime_years=5, host_lifetime_years=5))
    assert longer["carbon_grams"]["embodied"] == pytest.approx(0.8 * carbon["carbon_grams"]["embodied"], rel=1e-5)


def test_idle_time_that_busy_time_carries_is_by_the_planned_utilisation() -> None:
    half = described([request()], with_hardware(embodied_idle="busy", utilisation=0.5))["carbon_grams"]["embodied"]
    assert half == pytest.approx(2 * described([request()], with_hardware())["carbon_grams"]["embodied"], rel=1e-5)


def test_waste_makes_no_figure_per_token_better() -> None:
    plain = request()
    wasteful = request()
    # As many tokens of use, and 60 more that were computed again or rejected, for the same energy.
    more = wasteful.ledger._replace(
        prefill_tokens=wasteful.ledger.prefill_tokens + 40, recomputed_tokens=40,
        decode_tokens=wasteful.ledger.decode_tokens + 20, rejected_draft_tokens=20,
    )  # fmt: skip
    wasteful.ledger = more
    first, second = (described([item], with_hardware())["sci"] for item in (plain, wasteful))
    assert first == second


def test_without_an_intensity_energy_is_told_and_no_grams_are() -> None:
    carbon = described([request()], WORLD._replace(intensity=None))
    assert carbon["estimate"]["energy_joules"] == 40.0
    assert not {"carbon_grams", "intensity", "sci"} & carbon.keys()
    with_embodied = described([request()], with_hardware()._replace(intensity=None))
    assert with_embodied["carbon_grams"].keys() == {"embodied"}


def test_what_is_not_known_is_left_out() -> None:
    shown = described([request()])
    assert not shown.keys() & {"energy_joules", "coverage_ratio", "pue", "engine"}
    assert "rejected_drafts" not in shown["tokens"]
    unnamed = described([request(provenance=Provenance("roofline/1", "none"))], accounting(None, 56, 1, 0))
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
