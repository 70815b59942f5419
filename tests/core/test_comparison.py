"""Prediction against measurement: reports over five seconds and more, and a bias that forgets."""

from __future__ import annotations

import pytest

from llmco2_vllm.core.attribution import Activity, WindowAccount
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.comparison import Comparison, PhaseMix
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.core.steps import Step, StepShare
from llmco2_vllm.testing import ConstantPredictor

PREFILL, DECODE = PhaseShape(1, 100, 0, 100, 0), PhaseShape(50, 50, 0, 50, 0)


def account(begin: float, ratio: float, batch: BatchShape, trusted: bool = True) -> WindowAccount:
    """A window of a second, full of one step."""
    step = Step(begin, ConstantPredictor().estimate(batch), batch)
    predicted = step.predicted_joules
    window = MeterWindow(0, begin, begin + 1.0, ratio * predicted)
    parts = (StepShare(step, 1.0),) if predicted else ()
    joules = ratio * predicted
    return WindowAccount(
        window, parts, Activity.AWAKE, 1.0, predicted, joules, 0.0, 0.0, ratio, trusted, step.prefill_joules
    )


@pytest.mark.parametrize(
    ("batch", "mix"),
    [
        (BatchShape(PREFILL), PhaseMix.PREFILL),
        (BatchShape(decode=DECODE), PhaseMix.DECODE),
        (BatchShape(PREFILL, DECODE), PhaseMix.MIXED),
    ],
)
def test_windows_become_one_report_in_five_seconds_with_their_mix(batch: BatchShape, mix: PhaseMix) -> None:
    comparison = Comparison()
    for second in range(9):
        comparison.add(account(second, 2.0, batch))
    [report] = comparison.reports
    assert (report.number, report.mix, report.duration_seconds) == (1, mix, 5.0)
    assert report.error_ratio == pytest.approx(-0.5)
    assert comparison.bias[mix].ratio == pytest.approx(-0.5)


def test_untrusted_and_empty_windows_say_nothing_about_the_prediction() -> None:
    comparison = Comparison()
    for second in range(20):
        comparison.add(account(second, 9.0, BatchShape(decode=DECODE), trusted=False))
        comparison.add(account(second, 9.0, BatchShape()))
    assert not comparison.reports and comparison.bias[PhaseMix.DECODE].ratio is None


def test_windows_far_apart_make_a_report_of_their_own_time_not_of_the_time_between() -> None:
    comparison = Comparison()
    for number in range(5):
        comparison.add(account(600.0 * number, 2.0, BatchShape(decode=DECODE)))
    [report] = comparison.reports
    assert report.duration_seconds == pytest.approx(5.0)


def test_the_bias_follows_what_is_recent() -> None:
    comparison = Comparison()
    for second in range(8000):
        comparison.add(account(second, 1.0 if second < 4000 else 2.0, BatchShape(decode=DECODE)))
    assert comparison.bias[PhaseMix.DECODE].ratio == pytest.approx(-0.5, abs=0.02)
    assert len(comparison.reports) == 256
