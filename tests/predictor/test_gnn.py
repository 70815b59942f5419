"""Laws of the learned predictor, held by the bundle that ships."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Estimate, Predictor
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.gnn import GnnPredictor
from tests.core.published import PUBLISHED

BUNDLE = Bundle.load()
ALONE = Topology()
MODELS = ["Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-R1-0528"]
DEVICES = ["h100-sxm", "b200", "a100-80-sxm", "l4"]


def predictor(name: str, device: str = "h100-sxm", topology: Topology = ALONE, **changes: Any) -> GnnPredictor:
    model = ModelSpec.from_config({**PUBLISHED[name][0], **changes})
    return GnnPredictor(model, device_by_name(device), topology, BUNDLE)


def decode(requests: int, context: int) -> BatchShape:
    pairs = requests * context
    return BatchShape(decode=PhaseShape(requests, requests, pairs, pairs, requests))


def prefill(prompts: int, tokens: int) -> PhaseShape:
    return PhaseShape(prompts, prompts * tokens, prompts * tokens * (tokens + 1) // 2, prompts * tokens, prompts)


def assert_rates_rebuild(batch: BatchShape, estimate: Estimate) -> None:
    for phase, rates, joules in (
        (batch.prefill, estimate.prefill, estimate.prefill_joules),
        (batch.decode, estimate.decode, estimate.decode_joules),
    ):
        per_token, per_pair, per_sample = rates
        total = phase.tokens * per_token + phase.pairs * per_pair + phase.samples * per_sample
        assert total == pytest.approx(joules, rel=1e-9, abs=1e-12)
        assert min(rates) >= 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_it_keeps_the_protocol_on_any_model_and_device(name: str, device: str) -> None:
    found = predictor(name, device)
    assert isinstance(found, Predictor)
    for batch in (decode(1, 10), decode(256, 4000), BatchShape(prefill(3, 700), decode(20, 500).decode)):
        estimate = found.estimate(batch)
        assert_rates_rebuild(batch, estimate)
        watts = estimate.energy_joules / estimate.duration_seconds
        spec = device_by_name(device)
        assert spec.idle_power_watts * 0.8 < watts < spec.power_limit_watts * 1.2
        assert 0 < estimate.lower_ratio <= 1 <= estimate.upper_ratio


shapes = st.builds(
    lambda prompts, tokens, requests, context: BatchShape(
        prefill(prompts, prompts and tokens), decode(requests, context)[1]
    ),
    st.integers(0, 8),
    st.integers(1, 4000),
    st.integers(0, 512),
    st.integers(1, 8000),
)


@settings(max_examples=200, deadline=None)
@given(shapes, st.sampled_from(MODELS))
def test_every_joule_of_a_step_has_a_payer(batch: BatchShape, name: str) -> None:
    estimate = CACHED[name].estimate(batch)
    assert_rates_rebuild(batch, estimate)
    assert (estimate.energy_joules > 0) == (batch.tokens > 0)


CACHED = {name: predictor(name) for name in MODELS}


def test_zero_tokens_cost_nothing() -> None:
    estimate = predictor("Qwen/Qwen3-8B").estimate(BatchShape())
    assert estimate.energy_joules == estimate.duration_seconds == 0.0


@pytest.mark.parametrize("device", ["h100-sxm", "b200"])
@pytest.mark.parametrize("name", MODELS)
def test_energy_grows_with_requests_context_and_prompt(name: str, device: str) -> None:
    found = predictor(name, device)
    by_requests = [found.estimate(decode(n, 1000)).energy_joules for n in (1, 4, 16, 64, 256)]
    by_context = [found.estimate(decode(64, n)).energy_joules for n in (128, 1024, 8192, 65536)]
    by_prompt = [found.estimate(BatchShape(prefill(1, n))).energy_joules for n in (64, 512, 4096, 32768)]
    for series in (by_requests, by_context, by_prompt):
        assert series == sorted(series)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "openai/gpt-oss-20b"])
def test_energy_grows_with_layers(name: str) -> None:
    layers = PUBLISHED[name][0]["num_hidden_layers"]
    changes = [{"num_hidden_layers": n, "layer_types": None} for n in (layers + 2, 2 * layers, 4 * layers)]
    series = [predictor(name, **change).estimate(decode(32, 1000)).energy_joules for change in changes]
    assert series == sorted(series)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_twice_as_large_takes_less_than_two_batches(name: str) -> None:
    found = predictor(name)
    for requests in (1, 8, 64):
        one, two = found.estimate(decode(requests, 1000)), found.estimate(decode(2 * requests, 1000))
        assert two.energy_joules < 2 * one.energy_joules


def test_tensor_parallelism_splits_the_work_and_adds_network() -> None:
    batch = decode(32, 1000)
    plans = [predictor("Qwen/Qwen3-8B", topology=Topology(tensor_parallel=n)) for n in (1, 2, 4, 8)]
    seconds = [plan.estimate(batch).duration_seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert all(later > earlier / 2 for earlier, later in pairwise(seconds))
    assert plans[0].estimate(batch).energy_joules < plans[3].estimate(batch).energy_joules


def test_what_it_was_not_trained_on_is_out_of_distribution() -> None:
    batch = decode(8, 500)
    assert predictor("Qwen/Qwen3-8B").estimate(batch).in_distribution
    assert not predictor("Qwen/Qwen3-8B", "l4").estimate(batch).in_distribution
    assert not predictor("Qwen/Qwen3-8B", model_type="never-heard-of").estimate(batch).in_distribution
    with_images = decode(8, 500)._replace(encoder_tokens=5)
    assert not predictor("Qwen/Qwen3-8B").estimate(with_images).in_distribution


def test_the_name_says_method_version_and_device() -> None:
    assert predictor("Qwen/Qwen3-8B").name == f"{BUNDLE.version}-h100-sxm"


def test_serving_imports_neither_torch_nor_our_training_code() -> None:
    code = (
        "import sys; import llmco2_vllm.predictor.gnn; from llmco2_vllm.predictor.bundle import Bundle; Bundle.load();"
        " bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'torch_geometric', 'scipy')"
        " or m.startswith('llmco2_vllm.training')]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
