"""What a meter said of a request: exact on the wire, and a figure that lies between the prediction and the truth."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.ledgers import RequestCharge
from llmco2_vllm.core.settlement import Account, Journal, Settled, Settlement
from llmco2_vllm.core.steps import Mark
from llmco2_vllm.telemetry.annotation import annotate
from llmco2_vllm.telemetry.ledger import Ledger, Provenance, RequestLedger
from llmco2_vllm.telemetry.metered import (
    Metered,
    decode_metered,
    encode_metered,
    figure,
    metered_of,
    total_figure,
)
from tests.telemetry.books import accounting

joules = st.floats(0, 1e6)
records = st.builds(Metered, st.booleans(), st.builds(Settled, *[st.floats()] * 8), st.floats())
LEDGER = Ledger(0, True, True, 10.0, 30.0, 30.0, 60.0, 0.5, 100, 50, 0, 0, 0, 50)
WORLD = accounting()


def record(share: float = 1.0, final: bool = True, estimated: float = 0.0) -> Metered:
    """Half as much again as predicted, of ``share`` of the request; of it ``estimated`` joules under no window."""
    settled = Settled(15.0 * share, 45.0 * share, 3.0 * share, 10.0 * share, 30.0 * share, 0.0, 0.0, estimated)
    return Metered(final, settled, 1.5)


def request(metered: Metered | None) -> RequestLedger:
    return RequestLedger(LEDGER, Provenance("gnn/2-h100", "nvml"), complete=True, finished=True, metered=metered)


def described(*metered: Metered | None) -> dict[str, object]:
    annotation = annotate([request(item) for item in metered], WORLD)
    assert annotation is not None
    return dict(json.loads(annotation.json_text()))


@given(records)
def test_a_record_survives_the_wire_to_the_last_bit(item: Metered) -> None:
    # By their text, which tells -0.0 from 0.0 and lets nan be nan.
    assert str(decode_metered(encode_metered(item))) == str(item)


@pytest.mark.parametrize("text", ["1,1" + ",0.125" * 9, "", "garbage"])
def test_a_record_of_another_version_is_refused_by_that_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"of wire version '{text.split(',')[0]}.*reads '2'"):
        decode_metered(text)


digits = st.text("0123456789abcdefABCDEF, xé\ud800", max_size=300)


@given(st.one_of(st.text(), digits, digits.map("2,{}".format)))
def test_a_malformed_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_metered(text)
    assert caught.type is ValueError


@given(st.integers(0, 145))
def test_a_record_that_was_cut_off_or_runs_on_is_refused(length: int) -> None:
    text = encode_metered(record())
    version, numbers = text.split(",")
    for other in (numbers[:length], f"{numbers}0", f"{numbers}00", f"{numbers},0", f"x{numbers[1:]}"):
        with pytest.raises(ValueError, match="numbers are not"):
            decode_metered(f"{version},{other}")


def test_a_final_record_is_the_figure() -> None:
    found = figure(LEDGER, record())
    assert (found.prefill_joules, found.decode_joules, found.half_width_joules) == (15.0, 45.0, 3.0)
    assert found.coverage_ratio == 1.0


@given(st.floats(0, 1))
def test_open_steps_are_predicted_at_the_recent_ratio(share: float) -> None:
    found = figure(LEDGER, record(share, final=False))
    # What is open was predicted by the same half too low, so the sum does not hang on how much is open.
    assert found.energy_joules == pytest.approx(60.0)
    assert found.coverage_ratio == pytest.approx(share, abs=1e-6)
    # The prediction's interval is the wider one: the less is measured, the wider the whole.
    assert found.half_width_joules == pytest.approx(3.0 * share + (1 - share) * 60.0 * 0.5)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=5))
def test_several_engine_requests_add_up(parts: list[tuple[float, bool]]) -> None:
    items = [(LEDGER, record(share, final)) for share, final in parts]
    found = total_figure(items)
    assert found is not None
    assert found.energy_joules == pytest.approx(sum(figure(*item).energy_joules for item in items))
    assert 0.0 <= found.coverage_ratio <= 1.0


def test_one_request_without_a_meter_leaves_the_sum_unknown() -> None:
    assert total_figure([(LEDGER, record()), (LEDGER, None)]) is None
    assert total_figure([]) is None


def test_a_covered_request_is_measured_and_its_grams_rest_on_that() -> None:
    carbon = described(record())
    assert (carbon["basis"], carbon["coverage_ratio"], carbon["meter"]) == ("measured", 1.0, "nvml")
    energy, grams = carbon["energy_joules"], carbon["carbon_grams"]
    assert isinstance(energy, dict) and isinstance(grams, dict)
    assert (energy["value"], energy["prefill"], energy["decode"]) == (60.0, 15.0, 45.0)
    assert (energy["lower"], energy["upper"]) == (57.0, 63.0)
    assert grams["operational"] == pytest.approx(WORLD.operational_grams(60.0), rel=1e-5)
    assert carbon["estimate"]["energy_joules"] == 40.0  # type: ignore[index]


def test_a_request_with_open_steps_is_mixed() -> None:
    carbon = described(record(0.5, final=False))
    assert (carbon["basis"], carbon["coverage_ratio"]) == ("mixed", 0.5)


def test_coverage_is_of_energy_so_a_dear_prefill_that_no_window_saw_counts_as_such() -> None:
    carbon = described(record(estimated=45.0))
    assert (carbon["basis"], carbon["coverage_ratio"]) == ("mixed", 0.25)


def test_a_request_no_window_covers_is_a_prediction_and_claims_no_measurement() -> None:
    for metered in (None, record(0.0, final=False), record(estimated=60.0)):
        carbon = described(metered)
        assert carbon["basis"] == "predicted"
        assert "energy_joules" not in carbon and "coverage_ratio" not in carbon


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_rounding_in_sums_makes_no_coverage_and_takes_none(prefill: float, decode: float) -> None:
    settled = Settled(prefill, decode, 0.0, prefill, decode, 0.0, 0.0, (prefill + decode) * (1 - 1e-9))
    bare = Metered(True, settled, 1.0)
    assert figure(LEDGER, bare).coverage_ratio == 0.0
    assert figure(LEDGER, Metered(True, settled._replace(estimated_joules=1e-9), 1.0)).coverage_ratio == 1.0
    whole = total_figure([(LEDGER, bare)] * 3)
    assert whole is not None and whole.coverage_ratio == 0.0


def test_a_charge_without_a_meter_has_no_record() -> None:
    settlement = Settlement(Journal())
    charge = RequestCharge(0, 4, 4)
    assert metered_of(charge, settlement, 1.0) is None
    charge.account = Account()
    assert metered_of(charge, settlement, 1.0) == Metered(False, Settled(*[0.0] * 8), 1.0)


def test_what_ran_after_a_stop_string_is_not_told_to_the_client() -> None:
    settlement, charge = Settlement(Journal()), RequestCharge(0, 4, 4)
    charge.account = account = Account()
    mark = Mark()
    account.pay(mark, (10.0, 30.0, 0.0), 5)
    mark.ratios, mark.sums = (1.5, 0.1, 0.2), (0.0,) * 8
    account.leave(mark)
    whole, told = (metered_of(charge, settlement, 1.0, share) for share in (1.0, 0.75))
    assert whole is not None and told is not None
    assert told.final and told.settled == pytest.approx([0.75 * value for value in whole.settled])
