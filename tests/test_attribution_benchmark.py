"""The attribution benchmark: its truth adds up, its rivals get a fair share of the same joules, and ours errs less."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.attribution import BASE, Campaign, main, mean, part_of, serve, synthetic_trace
from benchmarks.attribution_methods import METHODS, OURS, Counter, Remembering, SimulatedCounter, Weighing, attributed
from benchmarks.simulated_card import PerfectPredictor, Physics
from benchmarks.simulated_serving import QUIET_SECONDS, Engine, Serving, Shared
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.testing import FakeClock
from llmco2_vllm.training.traffic import Served

TRACE = synthetic_trace(30.0, seed=7)
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "dtype": "bfloat16",
}


def physics(seed: int = 0) -> Physics:
    return Physics.drawn(ModelSpec.from_config(MODEL), device_by_name("h100-sxm"), seed)


@cache
def quick() -> dict[str, Any]:
    found = Campaign(TRACE, (BASE,), 30.0, 1).run()
    return found[BASE.name][0]


@cache
def served() -> Serving:
    return serve(BASE.model, TRACE, 0)


LENGTHS = st.lists(
    st.tuples(st.floats(0, 0.3), st.integers(1, 300), st.integers(1, 20)),
    min_size=1,
    max_size=15,
)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(4, 64))
def test_every_request_is_served_whole_within_the_limits_of_the_scheduler(
    lengths: list[tuple[float, int, int]], most: int, budget: int
) -> None:
    arrival, prompt, output = np.array(sorted(lengths)).T
    serving = Engine(physics(), max_num_seqs=most, max_num_batched_tokens=budget).serve(Served(arrival, prompt, output))
    step, request, prefill, decode, context, samples = serving.entries.T
    count = len(lengths)
    assert (np.bincount(request, prefill, count) == prompt).all()
    assert (np.bincount(request, samples, count) == output).all()
    assert (np.bincount(request, decode, count) == output - 1).all()
    assert np.bincount(step).max() <= most
    assert np.bincount(step, prefill + decode).max() <= budget
    assert (serving.begin[1:] >= serving.end[:-1]).all() and (serving.seen > serving.end).all()
    assert (serving.scheduled <= serving.begin).all() and (np.diff(serving.scheduled) >= 0).all()
    for one in range(count):
        mine = request == one
        assert (context[mine] == np.concatenate([[0], (prefill + decode)[mine].cumsum()[:-1]])).all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from(Shared), st.integers(0, 5))
def test_the_truth_gives_every_joule_of_every_step_to_somebody(
    lengths: list[tuple[float, int, int]], shared: Shared, seed: int
) -> None:
    serving = Engine(physics(seed), max_num_batched_tokens=64).serve(Served(*np.array(sorted(lengths)).T))
    truth = serving.truth(shared)
    assert truth.sum() == pytest.approx(serving.joules.sum(), rel=1e-9)
    assert (truth[0] > 0).all() and ((truth[1] > 0) == (serving.output > 1)).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_card_draws_between_idle_and_its_limit_and_longer_batches_draw_longer(seed: int) -> None:
    card = Physics.drawn(ModelSpec.from_config({**MODEL, "num_hidden_layers": 32}), device_by_name("h100-sxm"), seed)
    before = 0.0
    for tokens in (1, 64, 1024, 8192):
        truth = card.step(BatchShape(prefill=PhaseShape(1, tokens, tokens * (tokens + 1) // 2, tokens, 1)))
        assert card.idle_watts < sum(truth.joules) / truth.seconds <= 1.01 * card.device.power_limit_watts
        assert truth.seconds >= before
        before = truth.seconds


def test_rates_of_the_perfect_predictor_are_the_truth_of_a_step() -> None:
    batch = BatchShape(PhaseShape(2, 300, 50_000, 400, 1), PhaseShape(5, 5, 900, 900, 5))
    estimate, truth = PerfectPredictor(physics()).estimate(batch), physics().step(batch)
    assert estimate.energy_joules == pytest.approx(sum(truth.joules))
    assert estimate.duration_seconds == truth.seconds


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 200), st.integers(1, 60), st.floats(0.9, 1.1))
def test_the_counter_shows_the_true_joules_late_times_its_gain_in_whole_millijoules(
    tick: int, ticks: int, gain: float
) -> None:
    clock = FakeClock()
    counter = Counter(0.05, lag_seconds=0.03, gain=gain)
    meter = SimulatedCounter(served(), counter, clock)
    values = []
    for at in (tick, tick + ticks):
        clock.now_seconds = 0.05 * at + 0.01
        values.append(meter.read().energy_joules)
    true = np.diff(served().energy(0.05 * np.array([tick, tick + ticks]) - 0.03))[0]
    assert values[0] is not None and values[1] is not None
    assert values[1] - values[0] == pytest.approx(gain * true, abs=2e-3)


def test_joules_of_requests_idle_and_rest_are_those_of_the_counter() -> None:
    result = quick()
    assert abs(result["conservation_residual"]) < 1e-9


def test_ours_errs_at_least_three_times_less_than_a_share_by_tokens() -> None:
    methods = quick()["methods"]
    ours, tokens = methods[OURS], methods["token share"]
    assert ours["median_error"] <= 0.05
    assert 3 * ours["median_error"] <= tokens["median_error"]
    assert 3 * ours["p90_error"] <= tokens["p90_error"]


def test_with_perfect_prices_what_is_left_is_the_error_of_windows_alone() -> None:
    serving = served()
    weighed = Weighing(serving, Counter(), Remembering(PerfectPredictor(serving.physics)), 0).run()
    own, truth = attributed(serving, weighed)[OURS].sum(axis=0), serving.truth().sum(axis=0)
    assert np.median(np.abs(own / truth - 1)) < 0.01
    assert own.sum() == pytest.approx(truth.sum(), rel=0.01)


def test_rivals_hand_out_the_joules_of_the_windows_in_which_somebody_was_there_once_and_the_whole_gpu_many_times() -> (
    None
):
    serving = served()
    weighed = Weighing(serving, Counter(), Remembering(PerfectPredictor(serving.physics)), 0).run()
    found = attributed(serving, weighed)
    some = [
        window
        for window in weighed.windows
        if window.end_seconds > serving.begin[0] and window.begin_seconds < serving.seen[-1]
    ]
    joules = sum(window.energy_joules or 0.0 for window in some)
    assert some[0].begin_seconds >= QUIET_SECONDS - 0.2
    for method in ("token share", "time share", "equal split"):
        assert 0.98 * joules <= found[method].sum() <= joules * (1 + 1e-9)
    assert found["whole GPU to each"].sum() > 2 * joules


def test_the_same_seed_gives_the_same_figures_and_another_one_other_figures() -> None:
    again = Campaign(TRACE, (BASE,), 30.0, 1).run()[BASE.name][0]
    assert again == quick()
    other = Campaign(part_of(TRACE, 10, 1), (BASE,), 10.0, 2).run()[BASE.name]
    assert other[0]["methods"] != other[1]["methods"]


def test_means_go_into_mappings_and_an_unknown_figure_stays_unknown() -> None:
    assert mean([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}]) == {"a": 2.0, "b": None}


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["--quick", "--seconds", "60", "--json", "--write", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "attribution.json").read_text())
    assert printed["targets_met"] and set(printed["scenes"]["base"]["methods"]) == set(METHODS)
    assert (tmp_path / "attribution.png").stat().st_size > 10_000


def test_a_folder_without_the_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--data", str(tmp_path)])
    assert "--data: " in capsys.readouterr().err
