"""Held-out predictions: intervals keep their promise, no row is learned from and predicted, scores add up."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import accuracy
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.training import evaluate, fit, score_tables
from llmco2_vllm.training.dataset import Dataset, read
from llmco2_vllm.training.export import bundle_of
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.origin import campaign
from llmco2_vllm.training.predict import Trained, train
from llmco2_vllm.training.released import ReleasedRows
from llmco2_vllm.training.splits import (
    Fold,
    Group,
    across_devices,
    architecture,
    configuration,
    leave_one_architecture_out,
    unseen_configurations,
)
from tests.training import released_rows, tables

torch.set_num_threads(1)
RECIPE = fit.Recipe(steps=3)


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> list[Observation]:
    """Forty invented rows: five models, two devices, four batch limits."""
    path = tables.write(tmp_path_factory.mktemp("data") / "v3.csv", tables.V3, *tables.sweep())
    return list(read(path, tables.CONFIGS).observations)


@pytest.fixture(scope="module")
def trained(observations: list[Observation]) -> Trained:
    return train(observations, RECIPE)


@pytest.fixture(scope="module")
def bundle(trained: Trained) -> Bundle:
    ratios = {"decode": Interval(0.5, 2.0), "mixed": Interval(0.4, 3.0), "unknown": Interval(0.01, 100.0)}
    seconds = math.exp(trained.model.log_campaign.item())
    return bundle_of(trained, "gnn/test", ratios, {"campaigns": {"mlenergy-v3/gpqa/b200": seconds}})


@given(st.lists(st.floats(0, 10), min_size=10, max_size=80))
def test_of_any_errors_nine_in_ten_lie_inside_the_interval_of_the_others(errors: list[float]) -> None:
    """The exchangeability argument itself, with no chance in it."""
    every = np.array(errors)
    inside = [every[i] <= evaluate.conformal_error(np.delete(every, i)) for i in range(len(every))]
    assert sum(inside) >= evaluate.COVERAGE * len(every)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(20, 200), heavy=st.booleans())
def test_intervals_of_synthetic_residuals_hold_nine_in_ten_new_ones_and_few_more(
    seed: int, size: int, heavy: bool
) -> None:
    draw = np.random.default_rng(seed)

    def sample(n: int) -> evaluate.FloatArray:
        return draw.standard_t(2, n) if heavy else draw.normal(0.3, 1, n)

    held = [np.mean(np.abs(sample(100)) <= evaluate.conformal_error(sample(size))) for _ in range(400)]
    spread = 4 * math.sqrt(0.09 / size + 0.09 / 100) / math.sqrt(400)
    assert 0.9 - spread <= np.mean(held) <= 0.9 + 1 / (size + 1) + spread


def test_the_interval_never_has_a_sign_and_needs_an_error() -> None:
    assert evaluate.conformal_error(np.array([-3.0, 1.0])) == 3.0
    with pytest.raises(ValueError, match="no errors"):
        evaluate.conformal_error(np.array([]))


def test_an_interval_is_widened_as_independent_errors_add() -> None:
    wide = evaluate.widened(Interval(math.exp(-0.3), math.exp(0.3)), 0.4 / evaluate.NORMAL_90)
    assert math.log(wide.upper_ratio) == pytest.approx(0.5) == -math.log(wide.lower_ratio)
    assert evaluate.widened(Interval(0.5, 2.0), 0.0).upper_ratio == pytest.approx(2.0)


def test_phases_with_few_rows_share_one_interval(observations: list[Observation]) -> None:
    found = evaluate.intervals(observations, np.linspace(-0.5, 0.5, len(observations)))
    assert found["decode"] == found["mixed"]


@pytest.mark.parametrize("group", [architecture, configuration])
def test_inner_folds_cut_no_group_and_lose_no_row(observations: list[Observation], group: Group) -> None:
    rows = list(range(3, len(observations)))
    parts = evaluate.inner_folds(observations, rows, group)
    assert sorted(row for part in parts for row in part) == rows and len(parts) == evaluate.INNER_FOLDS
    seen = [{group(observations[row]) for row in part} for part in parts]
    assert not (seen[0] & seen[1] or seen[1] & seen[2] or seen[0] & seen[2])


def test_one_group_cannot_be_split_again(observations: list[Observation]) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        evaluate.inner_folds(observations, [0, 1], lambda o: "same")


def test_every_held_out_row_is_predicted_once_and_ticks_come_as_told(observations: list[Observation]) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    split = evaluate.Split("architecture", tuple(leave_one_architecture_out(observations)), architecture)
    found = evaluate.cross_validate(observations, split, RECIPE, tick)
    assert sorted(o.line for o in found.observations) == [o.line for o in observations]
    assert ticks == split.fits * RECIPE.steps
    assert (found.lower_ratio < 1).all() and (found.upper_ratio > 1).all() and (found.energy_joules > 0).all()
    whole = found.scores()
    assert whole.n == len(observations) == sum(s.n for s in found.by(lambda o: o.device.name).values())


def test_what_is_held_out_has_no_say_in_its_prediction(observations: list[Observation]) -> None:
    """Its targets changed, a fold predicts the same."""
    fold = unseen_configurations(observations)[0]
    split = evaluate.Split("one", (fold,), configuration)
    changed = list(observations)
    for row in fold.test:
        watts = changed[row].power_watts
        assert watts is not None
        changed[row] = replace(changed[row], step_seconds=9.0, power_watts=watts / 2)
    first, second = (evaluate.cross_validate(rows, split, RECIPE) for rows in (observations, changed))
    np.testing.assert_array_equal(first.energy_joules, second.energy_joules)
    np.testing.assert_array_equal(first.upper_ratio, second.upper_ratio)


def test_intervals_on_an_unseen_device_are_wider(observations: list[Observation]) -> None:
    fold = across_devices(observations)[0]
    known, unknown = (
        evaluate.cross_validate(observations, evaluate.Split("device", (fold,), architecture, new), RECIPE)
        for new in (False, True)
    )
    np.testing.assert_array_equal(known.energy_joules, unknown.energy_joules)
    assert (unknown.upper_ratio > known.upper_ratio).all()


def test_stalled_rows_are_predicted_but_not_learned_from(observations: list[Observation]) -> None:
    stalled = replace(observations[0], decode_step_seconds=1e-6)
    assert stalled.stalled
    rows = [stalled, *observations[1:]]
    fold = next(fold for fold in unseen_configurations(rows) if 0 in fold.train)
    without = Fold("without", tuple(row for row in fold.train if row), fold.test)
    splits = [evaluate.Split("one", (one,), configuration) for one in (fold, without)]
    first, second = (evaluate.cross_validate(rows, split, RECIPE).energy_joules for split in splits)
    np.testing.assert_array_equal(first, second)


def test_a_bundle_predicts_what_the_trained_model_does(
    observations: list[Observation], trained: Trained, bundle: Bundle
) -> None:
    """The mean over the steps of a mix, offsets and the slow campaign included; numpy against torch."""
    assert {campaign(o) for o in observations} == {None, "mlenergy-v3/gpqa/b200"}
    served, mean = score_tables.predict(bundle, observations), trained.predict(observations)
    np.testing.assert_allclose(served.energy_joules, mean.energy_joules(observations), rtol=1e-9)
    np.testing.assert_allclose(served.step_seconds, mean.step_seconds.numpy(), rtol=1e-9)
    means = score_tables.means(bundle, observations)
    np.testing.assert_allclose([m.decode_seconds for m in means], mean.decode_seconds.numpy(), rtol=1e-9)


def test_what_a_bundle_has_not_seen_gets_the_interval_of_the_unknown(
    observations: list[Observation], bundle: Bundle
) -> None:
    old = replace(observations[0], era="2023")
    found = score_tables.predict(bundle, [observations[0], old])
    assert found.upper_ratio.tolist() == [2.0, 100.0]


def test_latency_rows_count_twice_once_for_each_time(tmp_path: Path, bundle: Bundle) -> None:
    path = tables.write(tmp_path / "s.csv", tables.SPLITWISE, {}, {"batch_size": 8, "avg_power_frac": 0})
    target = score_tables.score_table(read(path), bundle)
    assert target.name == "time, seconds" and target.scores.n == 4


@pytest.mark.parametrize("authors", [True, False])
def test_released_labels_of_an_invented_truth_are_found_with_and_without_a_split(authors: bool) -> None:
    rows = released_rows.labelled(released_rows.requests(count=60))
    if not authors:
        rows = ReleasedRows(**{**vars(rows), "split": np.full(len(rows), "test")})
    found = score_tables.score_released(rows)
    assert found.n == (15 if authors else 60)
    assert found.mape < 1 and found.coverage_90 is not None


def test_too_few_released_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        score_tables.score_released(released_rows.labelled(released_rows.requests(count=5)))


def test_a_table_without_anything_to_score_is_refused(observations: list[Observation], bundle: Bundle) -> None:
    bare = replace(observations[0], step_seconds=None, decode_step_seconds=None)
    with pytest.raises(ValueError, match="no row"):
        score_tables.score_table(Dataset("splitwise", (bare,)), bundle)


def test_scoring_a_bundle_needs_no_torch() -> None:
    code = "import json, sys, llmco2_vllm.training.score_tables; print(json.dumps([m for m in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "torch_geometric", "scipy"} & set(json.loads(answer.stdout))


def test_the_plots_are_drawn(observations: list[Observation], bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from llmco2_vllm.training import figures

    held = {"one": score_tables.predict(bundle, observations), "two": score_tables.predict(bundle, observations[:9])}
    figures.parity(held, 5.0, tmp_path / "parity.png")
    figures.residuals_by_batch(held, 5.0, tmp_path / "residuals.png")
    figures.coverage(held, tmp_path / "coverage.png")
    figures.by_model({"ours": {"a/b": 3.0}, "other": {"a/b": 30.0}}, 5.0, tmp_path / "models.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 4


def test_the_benchmark_predicts_every_row_once_and_no_fold_knows_an_untouched_one(
    observations: list[Observation],
) -> None:
    data = accuracy.Data(observations, [], [])
    for folds, untouched in accuracy.splits_of(data)[:-1]:
        aside = {row for fold in untouched.folds for row in fold.test}
        tested = [row for split in (folds, untouched) for fold in split.folds for row in fold.test]
        assert aside and sorted(tested) == list(range(len(observations)))
        assert not aside & {row for split in (folds, untouched) for fold in split.folds for row in fold.train}


def test_batch_ranges_meet_without_gap(observations: list[Observation]) -> None:
    limits = (1, 8, 9, 512, 513, 4096)
    found = [accuracy.batch_bin(replace(observations[0], batch_limit=limit)) for limit in limits]
    assert found == ["1 to 8", "1 to 8", "9 to 32", "129 to 512", "513 and more", "513 and more"]
