"""The wire form of a ledger, and the sum over the engine requests of a call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.telemetry.ledger import Ledger, Origin, Provenance, RequestLedger, decode, encode, total

joules = st.floats(0, 1e12)
counts = st.integers(0, 1 << 40)
ledgers = st.builds(Ledger, st.integers(0, 512), st.booleans(), st.booleans(), *[joules] * 4, *[counts] * 6)
names = st.text(st.characters(codec="ascii", exclude_characters=",", categories=("L", "N", "P")), max_size=20)
provenances = st.builds(Provenance, names, names, st.text(max_size=40))


@given(ledgers, provenances)
def test_a_ledger_survives_the_wire(ledger: Ledger, provenance: Provenance) -> None:
    there, source = decode(encode(ledger, Origin(ledger.engine, provenance), ledger.final))
    assert source == provenance
    assert there[:3] == ledger[:3] and there[7:] == ledger[7:]
    assert there[3:7] == pytest.approx(ledger[3:7], rel=1e-8)


@pytest.mark.parametrize("text", ["", "2,0", "1,0,1", "1" + ",x" * 16])
def test_another_version_or_a_malformed_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)


@given(st.lists(ledgers, min_size=1, max_size=6))
def test_the_sum_loses_nothing(items: list[Ledger]) -> None:
    together = total(items)
    for position in range(3, len(Ledger._fields)):
        assert together[position] == pytest.approx(sum(item[position] for item in items))
    assert together.final == all(item.final for item in items)
    assert together.in_distribution == all(item.in_distribution for item in items)


def test_no_ledgers_have_no_sum() -> None:
    with pytest.raises(ValueError, match="no ledgers"):
        total([])


def test_a_live_ledger_is_complete_when_the_engine_says_so() -> None:
    live = RequestLedger("m")
    origin = Origin(0, Provenance("p/1", "none", "why, indeed"))
    live.receive(encode(Ledger(prefill_joules=1.0), origin, final=False))
    assert not live.complete
    live.receive(encode(Ledger(prefill_joules=2.0), origin, final=True))
    assert live.complete and live.ledger.energy_joules == 2.0
    assert live.provenance == origin.provenance
