"""What a store of bounded size keeps: rare regimes, then the newer and the worse predicted."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.coverage import cells, coverage_scores, worth_keeping

COUNT = st.integers(0, 20_000)
REGIMES = st.tuples(COUNT, COUNT, COUNT, COUNT)
ERRORS = st.one_of(st.floats(-9, 9), st.just(float("nan")))
SAMPLES = st.lists(st.tuples(REGIMES, ERRORS, st.integers(1, 1000)), max_size=60)


def test_a_store_keeps_the_rare_sample_and_the_newest_of_the_common_ones() -> None:
    samples = [(0, 0, 8, 1000)] * 50 + [(1, 4000, 0, 0)] + [(0, 0, 8, 1001)] * 50
    kept = worth_keeping(samples, np.full(101, 0.1), 5)
    assert np.flatnonzero(kept).tolist() == [50, 97, 98, 99, 100]


def test_a_cell_with_more_error_keeps_more_samples() -> None:
    kept = worth_keeping([(0, 0, 8, 1000), (1, 4000, 0, 0)] * 100, [0.02, 0.4] * 100, 40)
    assert kept[1::2].sum() > kept[::2].sum() >= 10


def test_the_first_of_a_cell_comes_before_the_second_of_one_that_is_predicted_far_worse() -> None:
    bad, good = [(0, 0, 8, 1000)] * 20, [(1, 4**k, 0, 0) for k in range(1, 7)] * 20
    errors = [0.01] * 120 + [9.0] * 20
    kept = worth_keeping(good + bad, errors, 7)
    assert np.flatnonzero(kept).tolist() == [114, 115, 116, 117, 118, 119, 139]
    assert coverage_scores(good + bad, errors)[-2] > coverage_scores(good + bad, errors)[114]


def test_an_unknown_error_speaks_for_no_cell() -> None:
    known = coverage_scores([(0, 0, 8, 1000), (1, 4000, 0, 0)], [0.3, float("nan")])
    assert known.tolist() == [1, 1]
    unknown = coverage_scores([(0, 0, 8, 1000)] * 2, [float("nan")] * 2)
    assert unknown.tolist() == [0.5, 1]


@given(SAMPLES, st.integers(0, 80))
def test_pruning_by_number_keeps_just_so_many(samples: list[tuple[tuple[int, ...], float, int]], count: int) -> None:
    regimes, errors = [r for r, _, _ in samples], [e for _, e, _ in samples]
    assert worth_keeping(regimes, errors, count).sum() == min(count, len(samples))
    scores = coverage_scores(regimes, np.ones(len(samples)))
    assert len(scores) == 0 or (scores.max() == 1 and scores.min() > 0)


@given(SAMPLES, st.integers(0, 60_000))
def test_pruning_by_size_stays_within_it_and_leaves_out_nothing_that_would_fit(
    samples: list[tuple[tuple[int, ...], float, int]], capacity: int
) -> None:
    sizes = np.array([size for _, _, size in samples])
    kept = worth_keeping([r for r, _, _ in samples], [e for _, e, _ in samples], capacity, sizes)
    room = capacity - sizes[kept].sum()
    assert room >= 0 and (sizes[~kept] > room).all()


@given(SAMPLES.filter(len))
def test_every_cell_keeps_a_sample_where_the_newest_of_each_fit(
    samples: list[tuple[tuple[int, ...], float, int]],
) -> None:
    regimes, sizes = [r for r, _, _ in samples], np.array([size for _, _, size in samples])
    cell = cells(regimes)
    newest = {int(number): index for index, number in enumerate(cell)}
    kept = worth_keeping(regimes, [e for _, e, _ in samples], sizes[list(newest.values())].sum(), sizes)
    assert set(cell[kept]) == set(cell)
