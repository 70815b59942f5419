"""The wire form of a ledger, and the sum over the engine requests of a call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import NO_RATES, Estimate, Rates
from llmco2_vllm.core.ledgers import DecodeSums, LedgerBook
from llmco2_vllm.telemetry.ledger import (
    Ledger,
    Origin,
    Provenance,
    RequestLedger,
    decode,
    decode_sums,
    encode,
    encode_sums,
    total,
)
from llmco2_vllm.testing import ConstantPredictor

joules = st.floats(0, 1e12)
counts = st.integers(0, 1 << 40)
flags = [st.booleans()] * 2
held = st.floats(1e-9, 1e6)
ledgers = st.builds(Ledger, st.integers(0, 512), *flags, *[joules] * 4, held, *[counts] * 6, st.integers(-1, 9))
SUMMED = Ledger._fields[3:-1]
anything, integers = st.floats(), st.integers(-(1 << 63), (1 << 63) - 1)
extremes = st.builds(
    Ledger, st.integers(0, 512), *flags, *[anything] * 4, st.just(0.0), *[integers] * 6, st.integers(-1, 1 << 62)
)
names = st.text(st.characters(codec="ascii", exclude_characters=",", categories=("L", "N", "P")), max_size=20)
provenances = st.builds(Provenance, names, names, st.text(max_size=40))


@given(extremes, provenances, st.floats(0, 10))
def test_a_ledger_survives_the_wire_to_the_last_bit(ledger: Ledger, provenance: Provenance, pace: float) -> None:
    there, source = decode(encode(ledger, Origin(ledger.engine, provenance), ledger.final, ledger.context, pace))
    assert source == provenance
    # By their text, which tells -0.0 from 0.0 and lets nan be nan.
    assert str(there) == str(ledger._replace(held_seconds=pace * ledger.energy_joules))


@given(st.lists(ledgers.filter(lambda ledger: ledger.energy_joules > 0), min_size=2, max_size=4), st.data())
def test_the_time_held_by_a_call_is_unknown_as_soon_as_it_is_for_a_part(
    items: list[Ledger], data: st.DataObject
) -> None:
    assert total(items).held_seconds == pytest.approx(sum(item.held_seconds for item in items))
    silent = data.draw(st.sampled_from(range(len(items))))
    items[silent] = items[silent]._replace(held_seconds=0.0)
    assert total(items).held_seconds == 0.0


@pytest.mark.parametrize("text", ["3,0,0,1" + ",0.125" * 5 + ",7" * 7 + ",gnn/2,nvml,", "3" + ",0" * 12, "garbage", ""])
def test_a_record_of_another_version_is_refused_by_that_name(text: str) -> None:
    for read in (decode, decode_sums):
        with pytest.raises(ValueError, match=f"of wire version '{text.split(',')[0]}.*reads '5'"):
            read(text)


digits = st.text("0123456789abcdefABCDEF, xé\ud800", max_size=300)


@given(st.one_of(st.text(), digits, digits.map("5,{}".format), digits.map("5,{},p,m,r".format)))
def test_a_malformed_record_is_refused(text: str) -> None:
    for read in (decode, decode_sums):
        with pytest.raises(ValueError) as caught:
            read(text)
        assert caught.type is ValueError


@given(st.data())
def test_a_record_that_was_cut_off_or_runs_on_is_refused(data: st.DataObject) -> None:
    ledger = encode(Ledger(), Origin(0, Provenance("p/1", "none")), final=False)
    for record, read in ((ledger, decode), (encode_sums(DecodeSums(), 0), decode_sums)):
        read(record)
        numbers = record.split(",")[1]
        cut = numbers[: data.draw(st.integers(0, len(numbers) - 1))]
        for other in (cut, f"{numbers}0", f"{numbers}00", f"{numbers} ", f"x{numbers[1:]}"):
            with pytest.raises(ValueError, match="numbers are not"):
                read(record.replace(numbers, other))
    with pytest.raises(ValueError, match="4 fields instead of 5"):
        decode(ledger.rpartition(",")[0])


@given(st.integers(0, 512), st.builds(DecodeSums, integers, *[anything] * 6, integers))
def test_running_sums_survive_the_wire_to_the_last_bit(engine: int, sums: DecodeSums) -> None:
    assert str(decode_sums(encode_sums(sums, engine))) == str((engine, sums))


steps = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1e-3), st.integers(1, 40), st.booleans()), max_size=20)


@given(st.integers(1, 5000), st.lists(steps, min_size=1, max_size=4))
def test_a_ledger_that_follows_the_sums_says_what_the_engines_own_says(prompt: int, runs: list[Any]) -> None:
    book, live, origin = LedgerBook(), RequestLedger(), Origin(3, Provenance("p/1", "none"))
    charge = book.join("a", 0, prompt, prompt)
    charge.slice(prompt).pay(ConstantPredictor().estimate(BatchShape()))
    book.enter("a")
    for run in runs:
        book.settle(charge)
        live.receive(encode(charge, origin, False, charge.computed, 0.25), {3: book.sums})
        assert live.follows_sums
        for per_token, per_pair, repeats, inside in run:
            rates = Rates(per_token, per_pair, 0.25 * per_token)
            book.advance(Estimate(0.0, 0.0, NO_RATES, rates, 0.0, 0.5, 3.0, inside), repeats)
        live.settle(decode_sums(encode_sums(book.sums, 3))[1])
        book.settle(charge)
        ledger = live.ledger
        assert ledger.held_seconds == pytest.approx(0.25 * ledger.energy_joules)
        assert ledger[3:7] == (charge.prefill_joules, charge.decode_joules, charge.lower_joules, charge.upper_joules)
        assert (ledger.decode_tokens, ledger.steps, ledger.context, ledger.in_distribution) == (
            charge.decode_tokens,
            charge.steps,
            charge.computed,
            charge.in_distribution,
        )


def test_a_ledger_follows_no_sums_unless_the_engine_says_so() -> None:
    live, origin = RequestLedger(), Origin(0, Provenance("p/1", "none"))
    live.receive(encode(Ledger(decode_joules=1.0), origin, final=False), {0: DecodeSums()})
    assert not live.follows_sums
    live.settle(DecodeSums(5, 100.0))
    assert live.ledger.energy_joules == 1.0


@given(st.lists(ledgers, min_size=1, max_size=6))
def test_the_sum_loses_nothing(items: list[Ledger]) -> None:
    together = total(items)
    for name in SUMMED:
        assert getattr(together, name) == pytest.approx(sum(getattr(item, name) for item in items))
    assert together.final == all(item.final for item in items)
    assert together.in_distribution == all(item.in_distribution for item in items)


def test_no_ledgers_have_no_sum() -> None:
    with pytest.raises(ValueError, match="no ledgers"):
        total([])


def test_a_live_ledger_is_complete_when_the_engine_says_so() -> None:
    live = RequestLedger()
    origin = Origin(0, Provenance("p/1", "none", "why, indeed"))
    live.receive(encode(Ledger(prefill_joules=1.0), origin, final=False))
    assert not live.complete
    live.receive(encode(Ledger(prefill_joules=2.0), origin, final=True))
    assert live.complete and live.ledger.energy_joules == 2.0
    assert live.provenance == origin.provenance
