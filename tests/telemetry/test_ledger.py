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
names = st.text(st.characters(codec="ascii", exclude_characters=",", categories=("L", "N", "P")), max_size=20)
provenances = st.builds(Provenance, names, names, st.text(max_size=40))


@given(ledgers, provenances, st.floats(0, 10))
def test_a_ledger_survives_the_wire(ledger: Ledger, provenance: Provenance, pace: float) -> None:
    there, source = decode(encode(ledger, Origin(ledger.engine, provenance), ledger.final, ledger.context, pace))
    assert source == provenance
    assert there[:3] == ledger[:3] and there[8:] == ledger[8:]
    assert there[3:7] == pytest.approx(ledger[3:7], rel=1e-8)
    assert there.held_seconds == pytest.approx(pace * ledger.energy_joules, rel=1e-8)


@given(st.lists(ledgers.filter(lambda ledger: ledger.energy_joules > 0), min_size=2, max_size=4), st.data())
def test_the_time_held_by_a_call_is_unknown_as_soon_as_it_is_for_a_part(
    items: list[Ledger], data: st.DataObject
) -> None:
    assert total(items).held_seconds == pytest.approx(sum(item.held_seconds for item in items))
    silent = data.draw(st.sampled_from(range(len(items))))
    items[silent] = items[silent]._replace(held_seconds=0.0)
    assert total(items).held_seconds == 0.0


@pytest.mark.parametrize("text", ["", "1,0", "3,0,1", "3" + ",x" * 18])
def test_another_version_or_a_malformed_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)
    with pytest.raises(ValueError):
        decode_sums(text)


@given(st.integers(0, 512), st.builds(DecodeSums, counts, *[joules] * 9, st.integers(-1, 1 << 40)))
def test_running_sums_survive_the_wire_to_the_last_digit(engine: int, sums: DecodeSums) -> None:
    assert decode_sums(encode_sums(sums, engine)) == (engine, sums)


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
        assert ledger.held_seconds == pytest.approx(0.25 * ledger.energy_joules, rel=1e-6)
        assert ledger[3:7] == pytest.approx(
            (charge.prefill_joules, charge.decode_joules, charge.lower_joules, charge.upper_joules), rel=1e-7
        )
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
