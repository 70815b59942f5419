"""The learning curve: what is predicted was never learned from, each row as often as any other, and figures add up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from benchmarks.accuracy import OURS, Data
from benchmarks.learning_curve import (
    METERED,
    METHODS,
    Outcome,
    Plan,
    alike,
    curve,
    document,
    fold_of,
    layout,
    learned_sets,
    metered,
    octave,
    prefilling,
    regimes,
    repeats,
    run,
    tables,
    write,
)
from llmco2_vllm.training.dataset import read
from llmco2_vllm.training.fit import Recipe
from llmco2_vllm.training.observation import Observation
from tests.training import tables as made

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "accuracy" / "learning_curve.json"
ARCHITECTURES = 4
TINY = Plan(sizes=(1, 3), draws=ARCHITECTURES, recipe=Recipe(steps=2))


@cache
def rows() -> tuple[Observation, ...]:
    with TemporaryDirectory() as folder:
        path = made.write(Path(folder) / "mlenergy_v3.csv", made.V3, *made.sweep())
        return tuple(read(path, made.CONFIGS).observations)


def data() -> Data:
    """The made table, and as another source the same rows once more."""
    others = [replace(o, source="mlenergy-v2") for o in rows()]
    return Data(list(rows()), others, [])


@cache
def outcomes() -> tuple[Outcome, ...]:
    with Progress(disable=True) as progress:
        return tuple(run(data(), TINY, progress))


@cache
def tiny() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(document(outcomes(), data(), TINY)))
    return found


def outcome(factors: dict[str, float]) -> Outcome:
    """A draw of which each method errs by one factor."""
    measured = np.array([o.step_energy_joules for o in rows()], dtype=np.float64)
    return Outcome(0, 1, rows(), rows(), {method: measured * factor for method, factor in factors.items()})


def shape(value: Any) -> Any:
    """Names of a document, without figures, names of groups and how many draws there were."""
    if isinstance(value, dict):
        grouped = value and all(isinstance(own, dict) and "share_of_error" in own for own in value.values())
        return shape(next(iter(value.values()))) if grouped else {name: shape(own) for name, own in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000))
def test_with_a_draw_for_each_architecture_every_row_is_predicted_equally_often(seed: int) -> None:
    sets = learned_sets(rows(), replace(TINY, seed=seed))
    for size in TINY.sizes:
        own = [learned for _, learned in sets if len(learned) == size]
        assert len(own) == ARCHITECTURES
        assert {sum(o.architecture not in learned for learned in own) for o in rows()} == {ARCHITECTURES - size}


def test_a_draw_adds_architectures_and_the_seed_decides_their_order() -> None:
    for draw in range(TINY.draws):
        small, large = (learned for number, learned in learned_sets(rows(), TINY) if number == draw)
        assert small < large
    assert learned_sets(rows(), TINY) == learned_sets(reversed(rows()), TINY)
    assert len({str(learned_sets(rows(), replace(TINY, seed=seed))[0]) for seed in range(10)}) > 1


@pytest.mark.parametrize(("plan", "name"), [(Plan(sizes=(4,)), "sizes: 4"), (Plan(sizes=(1,), draws=9), "draws: 9")])
def test_a_plan_that_leaves_nothing_to_predict_is_named(plan: Plan, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        learned_sets(rows(), plan)


def test_no_row_of_any_source_tells_of_an_architecture_that_is_predicted() -> None:
    every = data().observations
    for _, learned in learned_sets(rows(), TINY):
        known, held = fold_of(data(), learned).rows(every)
        assert {o.architecture for o in known} == learned
        assert {o.source for o in known} == {"mlenergy-v3", "mlenergy-v2"} and len(held) + len(known) // 2 == len(
            rows()
        )
        assert not {o.architecture for o in held} & learned and {o.source for o in held} == {"mlenergy-v3"}


def test_what_is_held_out_has_no_say_in_its_prediction() -> None:
    plan = replace(TINY, sizes=(3,), draws=1)
    ((_, learned),) = learned_sets(rows(), plan)
    changed = [o if o.architecture in learned else replace(o, power_watts=9 * (o.power_watts or 0.0)) for o in rows()]
    with Progress(disable=True) as progress:
        (first,), (second,) = (run(Data(own, [], []), plan, progress) for own in (list(rows()), changed))
    np.testing.assert_allclose(second.measured, 9 * first.measured)
    for method in METHODS:
        np.testing.assert_array_equal(first.joules[method], second.joules[method])


def test_stalled_rows_are_neither_learned_from_nor_scored() -> None:
    stalled = replace(rows()[0], decode_step_seconds=1e-6)
    with Progress(disable=True) as progress:
        found = run(Data([stalled, *rows()[1:]], [], []), replace(TINY, sizes=(1,)), progress)
    assert all(stalled.line not in {o.line for o in (*own.learned, *own.rows)} for own in found)


def test_scores_of_a_known_error_are_that_error() -> None:
    found = [outcome(dict.fromkeys(METHODS, 1.2)), outcome(dict.fromkeys(METHODS, 0.6))._replace(draw=1)]
    for points in curve(found).values():
        (point,) = points
        assert point["mape"]["draws"] == [20.0, 40.0] and point["mape"]["mean"] == 30.0
        assert point["mape"]["deviation"] == pytest.approx(200**0.5, abs=0.01)
        assert point["pooled"]["mape"] == 30.0 and point["pooled"]["bias"] == -10.0
        assert point["pooled"]["n"] == 2 * len(rows()) and point["eba_30"]["mean"] == 50.0


def test_one_draw_has_no_spread() -> None:
    ((point,), *_) = curve([outcome(dict.fromkeys(METHODS, 1.2))]).values()
    assert point["mape"] == {"mean": 20.0, "deviation": None, "draws": [20.0]}


def test_groups_of_a_regime_hold_every_row_once_and_all_of_the_error() -> None:
    for regime, groups in regimes(outcomes()).items():
        assert sum(group["rows"] for group in groups.values()) == len(rows()), regime
        assert sum(group["share_of_error"] for group in groups.values()) == pytest.approx(100, abs=0.5)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 5.0))
def test_an_error_that_is_one_factor_is_gone_after_one_measured_row(factor: float) -> None:
    found = metered([outcome({**dict.fromkeys(METHODS, 1.0), OURS: factor})])
    assert found["rows"] == list(METERED) and found["deployments"] == 10
    first, *rest = found["mape"][OURS]
    assert first == pytest.approx(100 * abs(factor - 1), abs=0.06) and rest == [0.0] * len(rest)


def test_rows_of_one_operating_point_differ_by_the_noise_alone() -> None:
    twin = replace(rows()[0], power_watts=1.1 * (rows()[0].power_watts or 0.0))
    assert repeats([rows()[0], rows()[-1]]) == [] and repeats([rows()[0], rows()[-1], twin]) == [10.0]


def test_octaves_and_shares_of_prefill_meet_without_gap() -> None:
    batches = [octave(replace(rows()[0], batch_limit=limit)) for limit in (8, 15, 16, 4096)]
    assert batches == ["8 to 15", "8 to 15", "16 to 31", "4096 to 8191"]
    (decode_share, decode), (share, mixed) = rows()[0].step_mix
    assert share + decode_share == pytest.approx(1) and share < 0.05
    for part, name in ((0.0499, "0 to 5 %"), (0.05, "5 to 25 %"), (0.25, "25 to 100 %")):
        assert prefilling(replace(rows()[0], step_mix=((1 - part, decode), (part, mixed)))) == name
    assert prefilling(replace(rows()[0], step_mix=((1.0, mixed),))) == "100 %"


def test_layouts_are_told_by_what_is_divided() -> None:
    def named(n_gpu: int, data: int, expert: int) -> str:
        own = rows()[0].deployment._replace(n_gpu=n_gpu, data_parallel=data, expert_parallel=expert)
        return layout(replace(rows()[0], deployment=own))

    assert (named(1, 1, 1), named(8, 1, 1), named(8, 1, 8)) == ("one device", "tensor parallel", "expert parallel")
    assert (named(8, 8, 8), named(8, 8, 1)) == ("data and expert parallel", "data parallel")


def test_architectures_are_alike_by_task_device_and_kind_and_count_once() -> None:
    dense = [o for o in rows() if o.model_name == "acme/Dense-1B" and o.device.name == "h100-sxm"]
    (experts, *_), others = ([o for o in rows() if o.model_name == n] for n in ("acme/Experts-3B", "acme/Wide-2B"))
    assert alike(dense[0], dense) == "1" and alike(dense[0], [*dense, *others]) == "2"
    assert alike(dense[0], []) == alike(experts, dense) == "0"
    assert alike(replace(dense[0], deployment=dense[0].deployment._replace(workload="chat")), dense) == "0"


def test_the_document_gives_a_table_and_a_picture(tmp_path: Path) -> None:
    write(tmp_path, tiny())
    assert json.loads((tmp_path / "learning_curve.json").read_text()) == tiny()
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    assert [table.row_count > 0 for table in tables(tiny())] == [True] * 3


def test_the_published_curve_has_the_present_shape_and_scores_every_row_equally_often() -> None:
    found = json.loads(RESULT.read_text())
    assert shape(found) == shape(tiny())
    plan = Plan()
    assert found["plan"] == {**vars(plan), "sizes": list(plan.sizes), "recipe": vars(plan.recipe)}
    for points in found["curve"].values():
        assert [point["architectures"] for point in points] == list(plan.sizes)
        for point in points:
            left = found["architectures"] - point["architectures"]
            assert point["pooled"]["n"] * found["architectures"] == found["rows"] * plan.draws * left
            assert len(point["mape"]["draws"]) == plan.draws
