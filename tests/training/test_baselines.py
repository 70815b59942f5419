"""Baselines: equations by hand, a truth of their own form recovered, and no look at a target."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmco2_vllm.core.scores import score
from llmco2_vllm.training.baselines import (
    Baseline,
    CalibratedRoofline,
    LLMCarbon,
    light_gbm,
    random_forest,
    step_energies,
)
from llmco2_vllm.training.dataset import Observation, read
from llmco2_vllm.training.physics import FEATURE_NAMES, KINDS, mean_tokens, mean_work, physics_features
from llmco2_vllm.training.splits import leave_one_architecture_out, unseen_configurations
from tests.training.tables import CONFIGS, SPLITWISE, V3, sweep, write

for package in ("lightgbm", "sklearn"):  # of the extra 'train'; scikit-learn brings scipy
    pytest.importorskip(package)

Rows = tuple[Observation, ...]
MAKERS: list[Callable[[], Baseline]] = [LLMCarbon, CalibratedRoofline, random_forest, light_gbm]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path: Path = write(tmp_path_factory.mktemp("baselines") / "table.csv", V3, *sweep())
    return read(path, CONFIGS).observations


@pytest.mark.parametrize("make", MAKERS)
def test_predictions_are_positive_joules_and_the_same_each_time(rows: Rows, make: Callable[[], Baseline]) -> None:
    one, other = make().fit(rows).predict(rows), make().fit(rows).predict(rows)
    assert one.shape == (len(rows),)
    assert (one > 0).all()
    assert np.array_equal(one, other)


@pytest.mark.parametrize("make", MAKERS)
def test_predictions_never_look_at_a_target(rows: Rows, make: Callable[[], Baseline]) -> None:
    blind = [replace(row, step_seconds=None, decode_step_seconds=None, power_watts=None) for row in rows]
    fitted = make().fit(rows)
    assert np.array_equal(fitted.predict(rows), fitted.predict(blind))


@pytest.mark.parametrize("make", MAKERS)
def test_rows_without_step_energy_cannot_be_learned_from(make: Callable[[], Baseline], tmp_path: Path) -> None:
    latencies = read(write(tmp_path / "table.csv", SPLITWISE, {})).observations
    with pytest.raises(ValueError, match="splitwise line 2 has no step energy"):
        make().fit(latencies)
    with pytest.raises(ValueError, match="no observations"):
        make().fit([])


def test_llmcarbon_is_the_power_limit_times_flops_over_the_peak(rows: Rows) -> None:
    dense = next(row for row in rows if row.model_name == "acme/Dense-1B")
    flops = 2 * dense.model.parameters * sum(mean_tokens(dense))
    expected = dense.device.power_limit_watts * flops / dense.device.peak_flops("bf16")
    assert LLMCarbon(calibrated=False).fit([dense]).predict([dense])[0] == pytest.approx(expected)
    assert LLMCarbon().fit([dense]).predict([dense])[0] == pytest.approx(step_energies([dense])[0])


def test_llmcarbon_counts_only_the_experts_that_a_token_uses(rows: Rows) -> None:
    sparse = next(row for row in rows if row.model_name == "acme/Experts-3B")
    everything = replace(sparse, model=replace(sparse.model, experts_per_token=sparse.model.experts))
    part, whole = LLMCarbon(calibrated=False).predict([sparse, everything])
    assert part < whole


def test_the_calibrated_roofline_recovers_a_truth_of_its_own_form(rows: Rows) -> None:
    truth = []
    for row in rows:
        seconds = 1.6 * float(mean_work(row).roofline.sum()) + 2e-3
        watts = row.device.power_limit_watts
        truth.append(replace(row, step_seconds=seconds, power_watts=watts))
    for fold in unseen_configurations(truth):
        train, test = fold.rows(truth)
        fitted = CalibratedRoofline().fit(train)
        assert (fitted.factors >= 0).all()
        assert score(fitted.predict(test), step_energies(test)).mape < 1.0


@pytest.mark.parametrize("make", [random_forest, light_gbm])
def test_trees_learn_the_sweep_they_are_shown(rows: Rows, make: Callable[[], Baseline]) -> None:
    """Their leaves need several rows, so the sweep is shown with a few percent of noise, five times."""
    noise = np.random.default_rng(0).normal(0, 0.02, (5, len(rows)))
    many = [replace(r, power_watts=(r.power_watts or 0) * np.exp(n)) for line in noise for r, n in zip(rows, line)]  # noqa: B905
    assert score(make().fit(many).predict(rows), step_energies(rows)).mape < 10.0


def test_features_are_finite_and_named(rows: Rows, tmp_path: Path) -> None:
    generation = read(write(tmp_path / "table.csv", SPLITWISE, {}, {"token_size": 1})).observations
    for row in (*rows, *generation):
        features = physics_features(row)
        assert features.shape == (len(FEATURE_NAMES),)
        assert np.isfinite(features).all()


def test_the_mean_step_is_the_mix_of_its_steps(rows: Rows) -> None:
    row = rows[0]
    (_, decode), (_, mixed) = row.step_mix
    halves = replace(row, step_mix=((0.5, decode), (0.5, mixed)))
    ends = [mean_work(replace(row, step_mix=((1.0, batch),))).roofline for batch in (decode, mixed)]
    assert mean_work(halves).roofline == pytest.approx((ends[0] + ends[1]) / 2)
    assert mean_work(row).roofline.shape == (len(KINDS),)


@pytest.mark.skipif("LLMCO2_DATA" not in os.environ, reason="LLMCO2_DATA names no folder with the public tables")
def test_light_gbm_is_near_23_percent_on_unseen_architectures_and_11_on_unseen_configurations() -> None:
    found = read(Path(os.environ["LLMCO2_DATA"]) / "mlenergy_v3.csv").observations
    text = [row for row in found if not row.multimodal]
    errors = []
    for folds in (leave_one_architecture_out(text), unseen_configurations(text)):
        predicted = np.empty(len(text))
        for fold in folds:
            train, test = fold.rows(text)
            predicted[list(fold.test)] = light_gbm().fit(train).predict(test)
        errors.append(score(predicted, step_energies(text)).mape)
    assert 18 < errors[0] < 28
    assert 8 < errors[1] < 14
