"""Focused sampling: what it proposes is possible, new and reproducible, and it learns faster than chance does."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import focused_sampling as simulation
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.sampling import (
    Reason,
    Sampling,
    expected_errors,
    proposals,
    propose,
)
from llmco2_vllm.training.traffic import Candidate, Served, Space, Traffic, kv_capacity_tokens

SPACE = simulation.SPACE
CHAT = simulation.simulated_traffic(0)
COUNT = st.integers(0, 20_000)
CANDIDATES = st.builds(Candidate, COUNT, COUNT, COUNT, COUNT)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    sequences = draw(st.integers(1, 1024))
    length = draw(st.integers(3, 131_072))
    return Space(sequences, sequences + draw(st.integers(0, 16_384)), length, length + draw(st.integers(0, 1_000_000)))


def measured_around(error_at: Candidate, error: float, others: float) -> list[tuple[Candidate, float]]:
    """A first round with one step that is predicted badly."""
    first = [candidate for candidate in propose(SPACE, CHAT, [], 40) if candidate != error_at]
    return [(error_at, error), *((candidate, others) for candidate in first)]


@given(space=spaces(), candidate=CANDIDATES)
def test_whatever_is_clipped_is_valid_and_what_is_valid_stays_as_it_is(space: Space, candidate: Candidate) -> None:
    clipped = space.clip(candidate)
    assert space.valid(clipped)
    assert space.clip(clipped) == clipped
    assert clipped == candidate or not space.valid(candidate)


@given(space=spaces(), levels=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_grid_holds_distinct_valid_steps_inside_the_unit_cube(space: Space, levels: int) -> None:
    grid = space.grid(levels)
    places = space.coordinates(grid)
    assert grid and len(set(grid)) == len(grid) and all(map(space.valid, grid))
    assert places.min() >= 0 and places.max() <= 1 + 1e-12


@given(candidate=CANDIDATES)
def test_a_step_survives_the_way_through_a_batch(candidate: Candidate) -> None:
    step = SPACE.clip(candidate)
    assert Candidate.from_batch(step.batch) == step
    assert step.batch.tokens == step.prefill_sequences * step.prefill_tokens + step.decode_sequences


def test_pairs_of_a_chunk_are_those_of_the_whole_prompt_less_those_before() -> None:
    whole, before = Candidate(3, 700, 0, 0).batch.prefill, Candidate(3, 400, 0, 0).batch.prefill
    assert Candidate(3, 300, 0, 400).batch.prefill.pairs == whole.pairs - before.pairs


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, 10, 10, 10), "max_num_seqs=0 is not possible; allowed: 1 or more"),
        ((8, 7, 10, 10), "max_num_batched_tokens=7 is not possible; allowed: max_num_seqs=8 or more"),
        ((8, 8, 2, 10), "max_model_len=2"),
        ((8, 8, 10, 9), "kv_capacity_tokens=9 is not possible; allowed: max_model_len=10 or more"),
    ],
)
def test_impossible_limits_are_named_with_what_is_allowed(limits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(*limits)


@given(space=spaces(), errors=st.lists(st.floats(-5, 5), max_size=30), count=st.integers(0, 40), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_proposals_are_new_valid_distinct_and_the_same_each_time(
    space: Space, errors: list[float], count: int, seed: int
) -> None:
    traffic = Traffic.uniform(space, seed, nodes=100)
    measured = list(zip(traffic.candidates, errors, strict=False))
    sampling = Sampling(seed)
    found = propose(space, traffic, measured, count, sampling)
    assert all(map(space.valid, found)) and len(set(found)) == len(found) <= count
    assert not set(found) & {candidate for candidate, _ in measured}
    assert found == propose(space, traffic, measured, count, sampling)


def test_as_many_steps_are_proposed_as_were_asked_for_even_when_no_error_is_left() -> None:
    measured = [(candidate, 0.0) for candidate in propose(SPACE, CHAT, [], 16)]
    assert len(propose(SPACE, CHAT, [], 800)) == 800
    assert len(propose(SPACE, CHAT, measured, 800)) == 800


def test_a_space_of_a_few_steps_is_proposed_once_and_then_nothing() -> None:
    space = Space(1, 1, 3, 3)
    traffic = Traffic.uniform(space)
    first = propose(space, traffic, [], 50)
    rest = propose(space, traffic, [(candidate, 0.1) for candidate in first], 50)
    assert len(first) + len(rest) <= 5
    assert propose(space, traffic, [(candidate, 0.1) for candidate in first + rest], 50) == []


def test_the_first_round_is_half_coarse_grid_and_half_traffic() -> None:
    found = proposals(SPACE, CHAT, [], 20)
    coarse = [proposal.candidate for proposal in found if proposal.reason is Reason.COVERAGE]
    drawn = [proposal.candidate for proposal in found if proposal.reason is Reason.TRAFFIC]
    assert len(coarse) == len(drawn) == 10
    assert set(coarse) <= set(SPACE.grid(3)) and set(drawn) <= set(CHAT.candidates)
    assert all(proposal.expected_error is None for proposal in found)


@given(rounds=st.lists(st.integers(1, 20), min_size=1, max_size=20), share=st.floats(0, 1), first=st.integers(1, 50))
def test_rounds_of_any_size_add_up_to_the_share_of_coverage(rounds: list[int], share: float, first: int) -> None:
    sampling, taken, covered = Sampling(coverage_share=share), first, 0
    for count in rounds:
        part = sampling.coverage_count(taken, count)
        assert 0 <= part <= count
        taken, covered = taken + count, covered + part
    assert abs(covered - share * (taken - first)) < 1 + 1e-6


def test_focus_draws_near_a_step_that_is_predicted_badly_and_visited_often() -> None:
    bad = CHAT.candidates[int(CHAT.shares.argmax())]
    place = SPACE.coordinates([bad])

    def distances(error: float) -> float:
        found = proposals(SPACE, CHAT, measured_around(bad, error, 0.02), 10, Sampling(coverage_share=0))
        steps = [proposal.candidate for proposal in found]
        return float(np.median(np.linalg.norm(SPACE.coordinates(steps) - place, axis=1)))

    assert distances(2.0) < 0.7 * distances(0.02)


def test_the_same_error_where_nothing_is_served_draws_no_focus() -> None:
    silent = Candidate(256, 32, 0, 0)
    found = proposals(SPACE, CHAT, measured_around(silent, 2.0, 0.02), 30, Sampling(coverage_share=0))
    places = SPACE.coordinates([proposal.candidate for proposal in found])
    assert np.linalg.norm(places - SPACE.coordinates([silent]), axis=1).min() > 0.1


def test_coverage_visits_all_phases_even_when_the_traffic_has_one() -> None:
    traffic = Traffic.from_steps(SPACE, [(0, 0, 8, 500), (0, 0, 9, 700)], "decode alone")
    measured = [(candidate, 0.5) for candidate in traffic.candidates]
    found = [p.candidate for p in proposals(SPACE, traffic, measured, 60) if p.reason is Reason.COVERAGE]
    assert len(found) >= 12
    assert any(not step.decode_sequences for step in found)
    assert any(step.decode_sequences and step.prefill_sequences for step in found)


def test_expected_errors_are_those_measured_at_the_place_and_their_mean_far_away() -> None:
    near, far = Candidate(0, 0, 16, 1000), Candidate(256, 32, 0, 0)
    measured = [(near, -0.6), (Candidate(0, 0, 64, 8000), 0.2)] * 40
    expected = expected_errors(SPACE, measured, [near, far])
    assert expected[0] == pytest.approx(0.6, abs=0.05) and expected[1] == pytest.approx(0.4, abs=0.05)
    assert expected_errors(SPACE, [], [near, far]).tolist() == [1, 1]


def test_an_error_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        propose(SPACE, CHAT, [(Candidate(0, 0, 1, 1), float("nan"))], 1)


def test_observed_requests_give_steps_that_obey_littles_law() -> None:
    lengths = np.array([[1000.0, 100.0]])
    traffic = Traffic.observed(SPACE, lengths, np.array([32.0]))
    joining = sum(s * c.prefill_sequences for c, s in zip(traffic.candidates, traffic.shares, strict=True))
    context = sum(s * c.context_tokens for c, s in zip(traffic.candidates, traffic.shares, strict=True))
    assert joining == pytest.approx(32 / 100, rel=0.2) and context == pytest.approx(1050, rel=0.02)
    assert traffic.shares.sum() == pytest.approx(1)


def test_a_steady_trace_gives_the_running_requests_of_littles_law() -> None:
    # Four requests a second, 50 steps of 0.03 s each: six run at a time.
    served = Served(np.arange(2000) / 4, np.full(2000, 300.0), np.full(2000, 50.0))
    traffic = Traffic.replayed(SPACE, served)
    running = sum(s * c.decode_sequences for c, s in zip(traffic.candidates, traffic.shares, strict=True))
    context = sum(s * c.context_tokens for c, s in zip(traffic.candidates, traffic.shares, strict=True))
    assert running == pytest.approx(6, rel=0.05) and context == pytest.approx(325, rel=0.02)


def test_a_longer_step_leaves_more_requests_running() -> None:
    served = Served(np.arange(500) / 4, np.full(500, 300.0), np.full(500, 50.0))
    slow = Traffic.replayed(SPACE, served, lambda batch: 0.1)
    assert np.mean([c.decode_sequences for c in slow.candidates if c.decode_sequences]) > 10


def test_a_trace_is_read_plain_or_gzipped_and_idle_time_does_not_count(tmp_path: Path) -> None:
    text = "t_s,input_tokens,output_tokens\n0,100,10\n3600,200,10\n"
    (tmp_path / "plain.csv").write_text(text)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (Traffic.from_trace(SPACE, tmp_path / name) for name in ("plain.csv", "packed.csv.gz"))
    assert plain.candidates == packed.candidates and np.array_equal(plain.shares, packed.shares)
    assert {c.prefill_tokens for c in plain.candidates if c.prefill_sequences} == {100, 200}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t_s,input_tokens\n1,2\n", "column output_tokens is missing"),
        ("t_s,input_tokens,output_tokens\n1,2,x\n", "line 2, column output_tokens: 'x' is not a number"),
        ("t_s,input_tokens,output_tokens\n1,2\n", "line 2, has 2 fields"),
        ("t_s,input_tokens,output_tokens\n", "holds no request"),
    ],
)
def test_a_faulty_trace_is_named_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Traffic.from_trace(SPACE, tmp_path / "trace.csv")


def test_the_cache_of_an_8b_model_is_what_its_weights_leave_of_the_memory() -> None:
    model, device = ModelSpec.from_config(simulation.MODEL), device_by_name("h100-sxm")
    # 8.03e9 weights of 2 bytes beside 0.92 of 80e9; 32 layers x 2 x 1024 x 2 bytes = 131072 a token.
    assert kv_capacity_tokens(model, device, Topology()) == pytest.approx((73.6e9 - 16.06e9) / 131072, rel=0.01)
    two = kv_capacity_tokens(model, device, Topology(tensor_parallel=2))
    assert two == pytest.approx((2 * 73.6e9 - 16.06e9) / 131072, rel=0.01)


@pytest.fixture(scope="module")
def campaigns() -> dict[str, np.ndarray]:
    """Scores of nine simulated campaigns of 96 measurements for each way to choose."""
    return simulation.campaigns(9, 96, None, lambda: None)


def test_focused_sampling_reaches_the_target_error_with_fewer_measurements_than_random_sampling(
    campaigns: dict[str, np.ndarray],
) -> None:
    needed = {
        method: np.median([simulation.measurements_to_target(one) for one in scores])
        for method, scores in campaigns.items()
    }
    assert np.isfinite(needed["focused"])
    assert all(needed["focused"] < needed[method] for method in simulation.METHODS[1:])


def test_focused_sampling_leaves_rare_regimes_no_worse_than_random_sampling_of_the_same_division(
    campaigns: dict[str, np.ndarray],
) -> None:
    worst = {method: np.median(scores[:, -1, 1]) for method, scores in campaigns.items()}
    assert worst["focused"] <= worst["random: 80 % traffic, 20 % space"]
    assert worst["focused"] < 0.8 * worst["random: traffic"]
