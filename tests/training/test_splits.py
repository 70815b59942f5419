"""Splits: no group on both sides, nothing lost, the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmco2_vllm.training.dataset import Observation, read
from llmco2_vllm.training.splits import (
    Fold,
    Group,
    across_devices,
    architecture,
    configuration,
    device,
    hold_out,
    leave_one_architecture_out,
    unseen_configurations,
)
from tests.training.tables import CONFIGS, V3, sweep, write

Rows = tuple[Observation, ...]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path: Path = write(tmp_path_factory.mktemp("splits") / "table.csv", V3, *sweep())
    return read(path, CONFIGS).observations


def nothing_leaks(fold: Fold, rows: Rows, group: Group) -> bool:
    train, test = fold.rows(rows)
    return not {group(row) for row in train} & {group(row) for row in test}


def test_leaving_an_architecture_out_leaves_all_its_checkpoints_out(rows: Rows) -> None:
    folds = leave_one_architecture_out(rows)
    assert len(folds) == 4  # five checkpoints, two of one architecture
    for fold in folds:
        assert nothing_leaks(fold, rows, architecture)
        assert sorted(fold.train + fold.test) == list(range(len(rows)))
    assert sorted(position for fold in folds for position in fold.test) == list(range(len(rows)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folds_of_configurations_are_apart_complete_and_of_like_size(rows: Rows, seed: int) -> None:
    folds = unseen_configurations(rows, folds=4, seed=seed)
    assert all(nothing_leaks(fold, rows, configuration) for fold in folds)
    assert sorted(position for fold in folds for position in fold.test) == list(range(len(rows)))
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 2


def test_repeats_by_another_checkpoint_are_the_same_configuration(rows: Rows) -> None:
    twins = [row for row in rows if row.architecture == rows[0].architecture]
    assert len({row.model_name for row in twins}) == 2
    assert len({configuration(row) for row in twins}) == len(twins) // 2


def test_devices_are_learned_and_predicted_both_ways(rows: Rows) -> None:
    folds = across_devices(rows)
    assert [fold.name for fold in folds] == ["b200 -> h100-sxm", "h100-sxm -> b200"]
    assert all(nothing_leaks(fold, rows, device) for fold in folds)
    assert all(len(fold.train) + len(fold.test) == len(rows) for fold in folds)


@pytest.mark.parametrize("group", [architecture, configuration])
def test_the_hold_out_is_whole_groups_and_neither_side_is_empty(rows: Rows, group: Group) -> None:
    fold = hold_out(rows, group)
    assert nothing_leaks(fold, rows, group)
    assert fold.train
    assert fold.test
    assert sorted(fold.train + fold.test) == list(range(len(rows)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(order=st.permutations(range(40)), seed=st.integers(0, 5))
def test_splits_depend_neither_on_the_order_of_rows_nor_on_chance(rows: Rows, order: list[int], seed: int) -> None:
    shuffled = [rows[position] for position in order]
    held = {rows[position].line for position in hold_out(rows, configuration, seed=seed).test}
    assert {shuffled[position].line for position in hold_out(shuffled, configuration, seed=seed).test} == held
    makers: list[Callable[[Rows], list[Fold]]] = [
        leave_one_architecture_out,
        lambda given: unseen_configurations(given, folds=3, seed=seed),
    ]
    for make in makers:
        one = [{rows[position].line for position in fold.test} for fold in make(rows)]
        other = [{shuffled[position].line for position in fold.test} for fold in make(tuple(shuffled))]
        assert one == other


def test_another_seed_holds_out_other_rows(rows: Rows) -> None:
    assert len({hold_out(rows, configuration, seed=seed).test for seed in range(5)}) > 1


def test_impossible_sizes_are_refused(rows: Rows) -> None:
    with pytest.raises(ValueError, match="folds=1"):
        unseen_configurations(rows, folds=1)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        hold_out(rows, architecture, share=1.5)
    with pytest.raises(ValueError, match="of 1 groups"):
        hold_out(rows[:1], architecture)
