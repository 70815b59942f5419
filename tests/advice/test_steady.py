"""Continuous batching in the steady state: Little's law, conservation of tokens, hand-computed steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.advice.steady import steady
from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import NO_RATES, Estimate
from llmco2_vllm.testing import ConstantPredictor
from tests.advice.asked import of_length


class Recorder:
    """One second a step and 10 J; remembers the steps."""

    name = "recorder/1"

    def __init__(self) -> None:
        self.seen: list[BatchShape] = []

    def estimate(self, batch: BatchShape) -> Estimate:
        self.seen.append(batch)
        return Estimate(4.0, 6.0, NO_RATES, NO_RATES, 1.0, 0.5, 2.0, True)


def test_one_request_at_a_time_prefills_once_and_decodes_the_rest() -> None:
    engine = Recorder()
    found = steady(engine, of_length(100, 5), 1, 8192)
    assert found.ttft_seconds == found.tpot_seconds == 1.0 and found.latency_seconds == 5.0
    assert found.requests_per_second == pytest.approx(1 / 5) and found.output_tokens_per_second == pytest.approx(1.0)
    assert found.joules_per_request == pytest.approx(50.0)
    assert (found.lower_joules, found.upper_joules) == pytest.approx((25.0, 100.0))
    shapes = {(step.prefill.tokens, step.decode.tokens) for step in engine.seen}
    assert shapes == {(100, 0), (0, 1)}
    prefill = next(step.prefill for step in engine.seen if step.prefill.tokens)
    assert (prefill.pairs, prefill.kv_tokens, prefill.samples) == (5050, 100, 1)


def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks() -> None:
    engine = Recorder()
    found = steady(engine, of_length(1000, 1), 1, 251)
    assert found.ttft_seconds == pytest.approx(4.0) and found.tpot_seconds is None
    assert [step.prefill.tokens for step in engine.seen] == [250]
    assert engine.seen[0].prefill.kv_tokens == 625


lengths = st.tuples(st.integers(1, 5000), st.integers(1, 2000))


@given(lengths, st.sampled_from([1, 2, 8, 64, 256]), st.sampled_from([512, 2048, 8192]))
def test_littles_law_holds_for_any_workload_and_batch(length: tuple[int, int], limit: int, budget: int) -> None:
    found = steady(ConstantPredictor(), of_length(*length), limit, budget)
    assert 1 <= found.running <= limit
    wait = 0.5 if found.running > 1 else 0.0
    assert found.running == pytest.approx(found.requests_per_second * (found.latency_seconds - wait))


@given(lengths, st.sampled_from([1, 2, 8, 64, 256]))
def test_the_mean_step_computes_what_arrives(length: tuple[int, int], limit: int) -> None:
    prompt, output = length
    found = steady(ConstantPredictor(), of_length(prompt, output), limit, 8192)
    # One second a step: tokens of prompts and of decode steps per second must fit the budget of a step.
    tokens = found.requests_per_second * (prompt + output - 1)
    assert tokens <= 8192 * (1 + 1e-9) or found.running == 1


@given(lengths)
def test_a_larger_batch_serves_no_fewer_requests_where_steps_take_the_same_time(length: tuple[int, int]) -> None:
    rates = [steady(ConstantPredictor(), of_length(*length), limit, 8192).requests_per_second for limit in (1, 4, 16)]
    assert rates == sorted(rates)


def test_what_the_predictor_does_not_know_is_not_known() -> None:
    assert not steady(ConstantPredictor(in_distribution=False), of_length(10, 10), 4, 8192).in_distribution
