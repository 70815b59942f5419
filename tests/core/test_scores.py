"""Scores: worked examples, the laws of an error, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmco2_vllm.core.scores import Scores, bias, coverage, eba, mape, median_ape, relative_errors, score

quantity = st.floats(1e-6, 1e9)
pairs = st.lists(st.tuples(quantity, quantity), min_size=1, max_size=30)


def split(values: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [first for first, _ in values], [second for _, second in values]


def test_scores_of_three_predictions_are_those_worked_by_hand() -> None:
    found = score([110.0, 80.0, 100.0], [100.0, 100.0, 100.0], ([90.0, 70.0, 101.0], [120.0, 90.0, 130.0]))
    assert found.n == 3
    assert found.mape == pytest.approx(10.0)
    assert found.median_ape == pytest.approx(10.0)
    assert found.bias == pytest.approx(-10.0 / 3)
    assert found.eba_5 == pytest.approx(100 / 3)
    assert found.eba_30 == pytest.approx(100.0)
    assert found.coverage_90 == pytest.approx(100 / 3)


def test_scores_go_to_json_under_exactly_the_published_keys() -> None:
    found = json.loads(json.dumps(score([1.0], [2.0]).to_dict()))
    assert list(found) == ["n", "mape", "median_ape", "eba_5", "eba_10", "eba_30", "bias", "coverage_90"]
    assert found["coverage_90"] is None


@given(st.lists(quantity, min_size=1))
def test_perfect_predictions_have_no_error(values: list[float]) -> None:
    assert score(values, values, (values, values)) == Scores(len(values), 0.0, 0.0, 100.0, 100.0, 100.0, 0.0, 100.0)


@given(pairs, st.floats(0.01, 100))
def test_scores_do_not_depend_on_the_unit(values: list[tuple[float, float]], factor: float) -> None:
    predicted, measured = split(values)
    scaled = mape([factor * value for value in predicted], [factor * value for value in measured])
    assert scaled == pytest.approx(mape(predicted, measured), rel=1e-9, abs=1e-9)


@given(pairs)
def test_the_order_of_rows_does_not_matter(values: list[tuple[float, float]]) -> None:
    one, other = score(*split(values)), score(*split(values[::-1]))
    assert list(one.to_dict().values())[:-1] == pytest.approx(list(other.to_dict().values())[:-1])


@given(pairs)
def test_bias_never_exceeds_the_mean_absolute_error(values: list[tuple[float, float]]) -> None:
    predicted, measured = split(values)
    assert abs(bias(predicted, measured)) <= mape(predicted, measured) * (1 + 1e-12) + 1e-12


@given(pairs, st.floats(0, 200), st.floats(0, 200))
def test_more_predictions_lie_within_a_wider_bound(values: list[tuple[float, float]], a: float, b: float) -> None:
    predicted, measured = split(values)
    assert eba(predicted, measured, min(a, b)) <= eba(predicted, measured, max(a, b))


@given(pairs)
def test_half_of_the_predictions_lie_within_the_median_error(values: list[tuple[float, float]]) -> None:
    predicted, measured = split(values)
    assert eba(predicted, measured, median_ape(predicted, measured)) >= 50.0 - 100.0 / len(values)


@given(pairs, st.floats(1, 3))
def test_wider_intervals_never_cover_less(values: list[tuple[float, float]], factor: float) -> None:
    predicted, measured = split(values)
    low, high = [value / 1.5 for value in predicted], [value * 1.5 for value in predicted]
    wide_low, wide_high = [value / factor for value in low], [value * factor for value in high]
    assert coverage(low, high, measured) <= coverage(wide_low, wide_high, measured)


@given(pairs)
def test_errors_of_twice_the_prediction_grow_by_what_the_prediction_is(values: list[tuple[float, float]]) -> None:
    predicted, measured = map(np.array, split(values))
    assume(bool((predicted / measured < 1e12).all()))
    grown = relative_errors(2 * predicted, measured) - relative_errors(predicted, measured)
    assert grown == pytest.approx(100 * predicted / measured, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("predicted", "measured", "told"),
    [
        ([], [], "predicted is empty"),
        ([1.0, 2.0], [1.0], "predicted 2, measured 1"),
        ([1.0], [0.0], r"measured\[0\]=0"),
        ([1.0, -2.0], [1.0, 1.0], r"predicted\[1\]=-2"),
        ([1.0, float("nan")], [1.0, 1.0], "predicted holds a value that is not finite, at position 1"),
        ([[1.0]], [1.0], r"shape \(1, 1\)"),
    ],
)
def test_impossible_input_is_named(predicted: list[float], measured: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        score(predicted, measured)


def test_an_interval_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match="between zero and upper"):
        coverage([2.0], [1.0], [1.5])


def test_a_negative_delta_is_refused() -> None:
    with pytest.raises(ValueError, match="delta=-1"):
        eba([1.0], [1.0], -1)
