"""Ledgers: running sums charge what step-by-step charging would, and nothing is lost on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core import ledgers
from llmco2_vllm.core.estimate import NO_RATES, Estimate, Rates
from llmco2_vllm.core.ledgers import LedgerBook, RequestCharge

rates = st.builds(Rates, st.floats(1e-6, 10), st.floats(1e-9, 1e-3), st.floats(1e-6, 1))
estimates = st.builds(
    lambda decode, lower, upper, inside: Estimate(0.0, 1.0, NO_RATES, decode, 1.0, lower, upper, inside),
    rates,
    st.floats(0.1, 1),
    st.floats(1, 10),
    st.booleans(),
)
# Per step: its estimate, and which of four requests decode in it.
steps = st.lists(st.tuples(estimates, st.sets(st.integers(0, 3), min_size=1)), min_size=1, max_size=40)


def reference(book: LedgerBook, estimate: Estimate, request_ids: list[str]) -> None:
    for request_id in request_ids:
        book.open[request_id].slice(1).pay(estimate)


def open_book() -> LedgerBook:
    book = LedgerBook()
    for i in range(4):
        book.join(f"r{i}", 100 * i + 1, 0, 0)
    return book


def assert_same(sums: RequestCharge, plain: RequestCharge) -> None:
    for name in ("decode_joules", "lower_joules", "upper_joules"):
        assert getattr(sums, name) == pytest.approx(getattr(plain, name), rel=1e-9)
    for name in ("decode_tokens", "steps", "computed", "in_distribution"):
        assert getattr(sums, name) == getattr(plain, name)


def run_both(plan: list[tuple[Estimate, set[int]]]) -> tuple[LedgerBook, LedgerBook]:
    sums, plain = open_book(), open_book()
    for estimate, present in plan:
        ids = [f"r{i}" for i in sorted(present)]
        for request_id in list(sums.decoding):
            if request_id not in ids:
                sums.interrupt(request_id)
        for request_id in ids:
            if request_id not in sums.decoding:
                sums.enter(request_id)
        assert sums.shape([]) == plain.shape([plain.open[i].slice(1) for i in ids])
        sums.advance(estimate)
        reference(plain, estimate, ids)
    return sums, plain


@given(steps)
def test_running_sums_charge_what_single_steps_charge(plan: list[tuple[Estimate, set[int]]]) -> None:
    sums, plain = run_both(plan)
    for request_id in plain.open:
        left = sums.leave(request_id)
        assert left is not None
        assert_same(left, plain.open[request_id])


@given(steps)
def test_a_ledger_read_in_between_stays_right(plan: list[tuple[Estimate, set[int]]]) -> None:
    book = open_book()
    book.enter("r0")
    plain = open_book()
    for estimate, _ in plan:
        book.advance(estimate)
        reference(plain, estimate, ["r0"])
        book.settle(book.open["r0"])
        assert_same(book.open["r0"], plain.open["r0"])


@given(steps)
def test_beginning_the_sums_anew_changes_nothing(plan: list[tuple[Estimate, set[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "REBASE_STEPS", 3)
        sums, plain = run_both(plan)
    for request_id in plain.open:
        sums.settle(sums.open[request_id])
        assert_same(sums.open[request_id], plain.open[request_id])


@given(estimates, st.integers(1, 50))
def test_several_steps_at_once_are_the_steps_one_by_one(estimate: Estimate, count: int) -> None:
    once, single = open_book(), open_book()
    for book in (once, single):
        book.enter("r1")
        book.enter("r3")
    once.advance(estimate, count)
    for _ in range(count):
        single.advance(estimate)
    for request_id in ("r1", "r3"):
        once.settle(once.open[request_id])
        single.settle(single.open[request_id])
        assert_same(once.open[request_id], single.open[request_id])
    assert once.shape([]) == single.shape([])


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    rates,
    rates,
)
def test_what_the_requests_pay_is_what_the_step_costs(
    rows: list[tuple[int, int, int]], prefill: Rates, decode: Rates
) -> None:
    book = LedgerBook()
    slices = []
    for i, (context, remaining, tokens) in enumerate(rows):
        charge = book.join(f"r{i}", context, context + remaining, context + remaining)
        slices.append(charge.slice(tokens))
    shape = book.shape(slices)
    priced = [
        phase.tokens * rate.per_token_joules
        + phase.pairs * rate.per_pair_joules
        + phase.samples * rate.per_sample_joules
        for phase, rate in ((shape.prefill, prefill), (shape.decode, decode))
    ]
    for part in slices:
        part.pay(Estimate(*priced, prefill, decode, 1.0, 1.0, 1.0, True))
    assert sum(c.prefill_joules for c in book.open.values()) == pytest.approx(priced[0], rel=1e-9)
    assert sum(c.decode_joules for c in book.open.values()) == pytest.approx(priced[1], rel=1e-9)
    assert sum(c.prefill_tokens + c.decode_tokens for c in book.open.values()) == shape.tokens


def test_tokens_known_before_the_step_are_prefill_and_the_others_decode() -> None:
    charge = RequestCharge(cached=10, known=30, prompt_tokens=30)
    part = charge.slice(23)
    assert (part.prefill, part.decode, part.prefill_samples) == (20, 3, 0)
    assert part.prefill_pairs == 20 * 10 + 210
    assert part.decode_pairs == 3 * 30 + 6


def test_a_replay_counts_what_had_been_computed_before() -> None:
    charge = RequestCharge(cached=0, known=10, prompt_tokens=10)
    charge.computed = 15
    charge.rewind(start=4, known=15)
    charge.slice(8).pay(Estimate(1.0, 0.0, Rates(1.0), NO_RATES, 1.0, 1.0, 1.0, True))
    charge.slice(5).pay(Estimate(1.0, 0.0, Rates(1.0), Rates(1.0), 1.0, 1.0, 1.0, True))
    assert charge.recomputed_tokens == 11
    assert (charge.prefill_tokens, charge.decode_tokens, charge.computed) == (11, 2, 17)


def test_leaving_twice_gives_nothing_the_second_time() -> None:
    book = open_book()
    assert book.leave("r0") is not None
    assert book.leave("r0") is None
