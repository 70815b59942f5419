"""Laws of the predictor of the LLMCO2 released labels, on invented rows; the released ones where LLMCO2_DATA is set."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmco2_vllm.core.batch import Phase
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.core.scores import mape
from llmco2_vllm.training.configs import ModelSizes
from llmco2_vllm.training.released import (
    DEVICE,
    MAX_TOKENS,
    NOT_ENERGY,
    PHASES,
    ReleasedPredictor,
    ReleasedRows,
    Transfer,
    block_counts,
    block_tokens,
    fit_curve,
    fit_physics,
    grouped_folds,
    layout,
    predict_phase,
    read_released,
    rooflines,
)
from tests.training.released_rows import BATCH, LARGE, SMALL, WIDE, labelled, requests

HEADER = "split,model,batch_size,prompt_tokens,output_tokens,prefill_energy_raw,decode_energy_raw\n"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.csv"
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


def test_rows_are_read_into_columns(tmp_path: Path) -> None:
    rows = read_released(write(tmp_path, f"train,{SMALL},1,100,20,0.5,2.5", f"val,{SMALL},1,7,3,0.25,1"))
    assert rows.labels.tolist() == [[0.5, 2.5], [0.25, 1.0]]
    assert (rows.prompt.tolist(), rows.split.tolist(), rows.models) == ([100, 7], ["train", "val"], [SMALL])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (f"train,{SMALL},1,100,1,0.5,2.5", "line 2, column output_tokens"),
        (f"train,{SMALL},1,-3,20,0.5,2.5", "prompt_tokens"),
        (f"train,{SMALL},1,100,20,0.5", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_released(write(tmp_path, line))


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        read_released(write(tmp_path))


def test_the_labels_are_called_what_they_are() -> None:
    assert "not energy" in NOT_ENERGY


def test_a_prefill_label_is_one_value_and_a_decode_label_one_per_step() -> None:
    rows = requests(count=50)
    assert (block_counts(Phase.PREFILL, rows).sum(axis=1) == 1).all()
    assert (block_counts(Phase.DECODE, rows).sum(axis=1) == rows.output - 1).all()


def test_prompts_of_one_block_share_a_value() -> None:
    rows = replace(requests(count=3), prompt=np.array([9, 16, 17]))
    blocks = block_counts(Phase.PREFILL, rows).argmax(axis=1)
    assert blocks.tolist() == [1, 1, 2]


def test_requests_beyond_the_last_block_lose_no_step() -> None:
    rows = replace(requests(count=2), prompt=np.array([MAX_TOKENS - 5, MAX_TOKENS + 90]))
    assert (block_counts(Phase.DECODE, rows).sum(axis=1) == rows.output - 1).all()


@pytest.mark.parametrize("phase", PHASES)
def test_the_physics_part_is_positive_and_never_falls_with_tokens(phase: Phase) -> None:
    rows = labelled(requests(), ripple=0.1)
    physics = fit_physics(phase, rows, rooflines(SMALL, 1, phase))
    assert (physics > 0).all()
    assert (np.diff(physics) >= -1e-12 * physics[:-1]).all()


@pytest.mark.parametrize("phase", PHASES)
def test_labels_without_noise_come_back(phase: Phase) -> None:
    rows = labelled(requests(count=400), ripple=0.05)
    curve = fit_curve(phase, rows, rooflines(SMALL, 1, phase), 1e-6)
    found = predict_phase(phase, curve.values, rows)
    assert mape(found, rows.labels[:, PHASES.index(phase)]) < 0.05


def test_unseen_requests_without_noise_are_predicted() -> None:
    learned = ReleasedPredictor().fit(labelled(requests((SMALL, WIDE), 400), ripple=0.02))
    unseen = labelled(requests((SMALL, WIDE), 100, seed=1), ripple=0.02)
    assert mape(learned.predict(unseen).sum(axis=1), unseen.labels.sum(axis=1)) < 0.5


def test_one_label_far_off_moves_no_other_prediction() -> None:
    clean = labelled(requests())
    spoiled = replace(clean, decode=clean.decode * np.where(np.arange(len(clean)) == 7, 3.0, 1.0))
    found = [ReleasedPredictor([1.0]).fit(rows).predict(clean)[:, 1] for rows in (clean, spoiled)]
    assert mape(found[1], found[0]) < 0.1


def test_predictions_are_positive_and_grow_with_output() -> None:
    learned = ReleasedPredictor([1e-2]).fit(labelled(requests(), ripple=0.3))
    grid = replace(requests(count=60), prompt=np.full(60, 700), output=np.arange(2, 62))
    found = learned.predict(grid)
    assert (found > 0).all()
    assert (np.diff(found[:, 1]) > 0).all()


def test_predictions_do_not_depend_on_the_order_of_rows() -> None:
    rows = labelled(requests((LARGE, SMALL), 60))
    learned = ReleasedPredictor([1e-2]).fit(rows)
    order = np.random.default_rng(3).permutation(len(rows))
    assert learned.predict(rows.where(order)) == pytest.approx(learned.predict(rows)[order])


def test_equal_requests_stay_in_one_fold() -> None:
    rows = requests(count=40)
    twice = rows.where(np.tile(np.arange(40), 2))
    for learn, test in grouped_folds(twice):
        assert {position % 40 for position in learn}.isdisjoint({position % 40 for position in test})


def test_a_model_left_out_is_not_known() -> None:
    learned = ReleasedPredictor([1e-2]).fit(labelled(requests((SMALL, WIDE), 60)))
    with pytest.raises(KeyError):
        learned.without(WIDE).predict(requests((WIDE,), 3))


def known(ripple: float = 0.0) -> Transfer:
    rows = labelled(requests((SMALL, WIDE), 300), ripple)
    return Transfer(ReleasedPredictor([1e-2]).fit(rows), rows)


def test_ten_requests_are_enough_when_the_shape_is_that_of_the_other_models() -> None:
    rows = labelled(requests((LARGE,), 80))
    dearer = replace(rows, prefill=3 * rows.prefill, decode=5 * rows.decode)
    found = known().scaled(dearer.where(np.arange(10, 80)), dearer.where(np.arange(10)))
    assert mape(found.sum(axis=1), dearer.labels[10:].sum(axis=1)) < 1.0


def test_one_scale_leaves_the_relative_shape_unchanged() -> None:
    transfer, rows = known(), labelled(requests((LARGE,), 40))
    few = rows.where(np.arange(10))
    dearer = replace(few, prefill=7 * few.prefill, decode=2 * few.decode)
    ratio = transfer.scaled(rows, dearer) / transfer.scaled(rows, few)
    assert ratio == pytest.approx(np.tile([7.0, 2.0], (40, 1)))


def test_ratios_to_the_roofline_carry_over_without_any_request() -> None:
    rows = labelled(requests((LARGE,), 40))
    assert mape(known().zero_shot(rows).sum(axis=1), rows.labels.sum(axis=1)) < 1.0


def test_the_shape_is_chosen_by_the_known_models_alone() -> None:
    assert known().powers == dict.fromkeys(PHASES, 1.0)


def test_one_known_model_is_enough() -> None:
    rows = labelled(requests((SMALL,), 100))
    transfer = Transfer(ReleasedPredictor([1e-2]).fit(rows), rows)
    other = labelled(requests((LARGE,), 30))
    assert (transfer.scaled(other, other.where(np.arange(10))) > 0).all()


def test_the_layout_holds_the_weights_and_wastes_no_device() -> None:
    device, sizes = device_by_name(DEVICE), ModelSizes()
    ranks = {name: layout(sizes.spec(name, "float16"), device).tensor_parallel for name in BATCH}
    assert ranks == {SMALL: 1, LARGE: 2, WIDE: 1}


def test_rooflines_grow_with_tokens_and_model() -> None:
    for phase in PHASES:
        small = rooflines(SMALL, 1, phase)
        assert small.shape == block_tokens(phase).shape
        assert (np.diff(small) >= 0).all()
        assert (rooflines(WIDE, 1, phase) > small).all()


@pytest.fixture(scope="module")
def released() -> ReleasedRows:
    folder = os.environ.get("LLMCO2_DATA")
    if not folder:
        pytest.skip("LLMCO2_DATA is not set")
    return read_released(Path(folder) / "llmco2_a100.csv")


def test_the_authors_split_is_predicted_within_its_target(released: ReleasedRows) -> None:
    held = released.where(released.split != "train")
    found = ReleasedPredictor().fit(released.where(released.split == "train")).predict(held)
    assert mape(found.sum(axis=1), held.labels.sum(axis=1)) <= 0.6


def test_a_model_left_out_is_predicted_within_its_target(released: ReleasedRows) -> None:
    learn = released.where(released.split == "train")
    learned = ReleasedPredictor([1e-2]).fit(learn)
    scores = []
    for name in released.models:
        transfer = Transfer(learned.without(name), learn.where(learn.model != name))
        own = released.where(released.model == name)
        few = np.random.default_rng(0).choice(np.flatnonzero(own.split == "train"), 10, replace=False)
        rest = own.where(np.setdiff1d(np.arange(len(own)), few))
        scores.append(mape(transfer.scaled(rest, own.where(few)).sum(axis=1), rest.labels.sum(axis=1)))
    assert np.mean(scores) <= 4.0
