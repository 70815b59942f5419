"""LLMCarbon: its published rows, the Megatron-LM runs behind its polynomials, and the laws of its equations."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core import llmcarbon
from llmco2_vllm.core.carbon import operational_grams
from llmco2_vllm.core.embodied import Holding, chip_grams, grams_per_second
from llmco2_vllm.core.embodied_catalog import constant
from llmco2_vllm.core.llmcarbon import Architecture, Fleet
from llmco2_vllm.core.units import convert, giga, tera


class Row(NamedTuple):
    """A published training run; the last five are what must come out, as printed."""

    name: str
    parameters: float
    tokens: float
    fleet: Fleet
    pue: float
    intensity: float
    days: float
    megawatt_hours: float
    tonnes: float
    published_tonnes: float
    deviation_percent: float


def fleet(devices: float, watts: float, teraflops: float, efficiency: float) -> Fleet:
    return Fleet(devices, watts, tera(teraflops), efficiency)


ROWS = [
    Row("T5", 11e9, 600e9, fleet(512, 310, 123, 0.37), 1.12, 545, 19.67, 83.92, 45.74, 46.7, -2.06),
    Row("GPT-3", 175e9, 300e9, fleet(10000, 330, 125, 0.197), 1.1, 429, 14.81, 1289.85, 553.34, 552.1, 0.23),
    Row("GShard", 2.3e9, 1e12, fleet(1000, 288, 123, 0.39), 1.09, 177, 3.33, 25.09, 4.44, 4.3, 3.26),
    Row("Switch", 7.41e9, 2e12, fleet(1000, 245, 123, 0.28), 1.1, 330, 29.88, 193.28, 63.78, 59.1, 7.92),
    Row("XLM", 0.55e9, 7e12, fleet(512, 342, 125, 0.212), 1.1, 413, 19.71, 91.09, 37.62, 39.0, -3.54),
]
# Parameters (1e9), TFLOP/s per device, tensor and pipeline ranks, devices, batch: Narayanan et al., SC 2021, table 1.
MEGATRON = [
    (1.7, 137, 1, 1, 32, 512),
    (3.6, 138, 2, 1, 64, 512),
    (7.5, 142, 4, 1, 128, 512),
    (18.4, 135, 8, 1, 256, 1024),
    (39.1, 138, 8, 2, 512, 1536),
    (76.1, 140, 8, 4, 1024, 1792),
    (145.6, 148, 8, 8, 1536, 2304),
    (310.1, 155, 8, 16, 1920, 2160),
    (529.6, 163, 8, 35, 2520, 2520),
    (1008, 163, 8, 64, 3072, 3072),
]
A100_BYTES = giga(80)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_published_training_runs_are_reproduced_to_the_printed_digits(row: Row) -> None:
    seconds = llmcarbon.compute_seconds(llmcarbon.training_flops(row.parameters, row.tokens), row.fleet)
    joules = llmcarbon.fleet_joules(row.fleet, seconds)
    tonnes = convert(operational_grams(joules, row.intensity, row.pue), "g", "t")
    assert round(convert(seconds, "s", "day"), 2) == row.days
    assert round(convert(joules * row.pue, "J", "MWh"), 2) == row.megawatt_hours
    assert round(tonnes, 2) == row.tonnes
    assert round(100 * (tonnes / row.published_tonnes - 1), 2) == row.deviation_percent


def test_the_embodied_carbon_of_xlm_is_0_648_tonnes() -> None:
    memory = {name: constant(f"llmcarbon.memory.{name}").to("g/byte") for name in ("dram", "ssd")}
    parts = [
        Holding(chip_grams("cpu"), 5, 64),
        Holding(giga(256) * memory["dram"], 5, 64),
        Holding(giga(32768) * memory["ssd"], 5, 64),
        Holding(chip_grams("v100"), 5, 512),
        Holding(constant("llmcarbon.server.other").to("g/part"), 5, 64),
    ]
    grams = grams_per_second(parts) * convert(20.4, "day", "s")
    kilograms = 64 * 1.47 + 64 * 256 * 0.4 + 64 * 32768 * 0.018 + 512 * 8.15 * 1.2 + 64 * 111.6 * 1.2
    assert convert(grams, "g", "kg") == pytest.approx(kilograms * 20.4 / (5 * 365))
    assert convert(grams, "g", "t") == pytest.approx(0.6480, rel=1e-4)


@pytest.mark.parametrize(("billions", "teraflops"), [run[:2] for run in MEGATRON])
def test_the_throughput_of_megatrons_runs_is_fitted_within_two_percent(billions: float, teraflops: float) -> None:
    _, pipeline = llmcarbon.model_parallelism(billions * 1e9, A100_BYTES)
    fitted = llmcarbon.throughput_flops_per_second(billions * 1e9, pipeline)
    assert convert(fitted, "FLOP/s", "TFLOP/s") == pytest.approx(teraflops, rel=0.02)
    assert llmcarbon.efficiency_ratio(billions * 1e9, A100_BYTES) == pytest.approx(fitted / tera(312))


@pytest.mark.parametrize(("billions", "tensor"), [(run[0], run[2]) for run in MEGATRON])
def test_tensor_ranks_are_those_of_megatrons_runs(billions: float, tensor: int) -> None:
    assert llmcarbon.model_parallelism(billions * 1e9, A100_BYTES)[0] == tensor


@pytest.mark.parametrize(("billions", "devices", "batch"), [(run[0], run[4], run[5]) for run in MEGATRON[5:]])
def test_devices_and_batch_of_the_large_runs_are_fitted_within_a_quarter(
    billions: float, devices: int, batch: int
) -> None:
    layout = llmcarbon.optimal_parallelism(billions * 1e9, A100_BYTES)
    assert layout.devices == layout.tensor * layout.pipeline * layout.data == pytest.approx(devices, rel=0.15)
    assert layout.batch == pytest.approx(batch, rel=0.25)


@given(st.floats(1e6, 5e12), st.floats(8, 300), st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_hold_the_model_and_tensor_ranks_stay_inside_the_node(
    parameters: float, gigabytes: float, node: int
) -> None:
    tensor, pipeline = llmcarbon.model_parallelism(parameters, giga(gigabytes), node)
    held = 0.03e9 * gigabytes
    assert 1 <= tensor <= node
    assert tensor * pipeline * held >= parameters * (1 - 1e-9)
    assert pipeline == 1 or tensor == node


@pytest.mark.parametrize(
    ("parameters", "pipeline", "key"),
    [
        (1e9, 1, "efficiency_ratio"),
        (40e9, 1, "efficiency_ratio"),
        (2e9, 2, "efficiency_ratio"),
        (2e12, 64, "efficiency_ratio"),
    ],
)
def test_a_model_outside_of_the_fit_is_refused_and_told_what_to_give(
    parameters: float, pipeline: int, key: str
) -> None:
    with pytest.raises(ValueError, match=f"is fitted on .* parameters, this model has .*; give {key}"):
        llmcarbon.throughput_flops_per_second(parameters, pipeline)


def test_the_number_of_devices_of_a_small_model_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"number of devices is fitted on .*; give devices"):
        llmcarbon.optimal_parallelism(18e9, A100_BYTES)


@pytest.mark.parametrize(
    ("billions", "hidden", "layers"),
    [(1.7, 2304, 24), (18.4, 6144, 40), (145.6, 12288, 80), (529.6, 20480, 105), (1008, 25600, 128)],
)
def test_the_parameters_of_megatrons_models_follow_from_their_sizes(billions: float, hidden: int, layers: int) -> None:
    model = Architecture(layers, hidden, vocabulary=51200, sequence=2048)
    assert llmcarbon.base_parameters(model) == pytest.approx(billions * 1e9, rel=0.03)


sizes = st.builds(
    Architecture, st.integers(1, 200), st.integers(64, 30000), st.integers(1000, 300000), st.integers(128, 10000),
    st.integers(1, 512), st.floats(0, 1),
)  # fmt: skip


@given(sizes)
def test_a_mixture_of_one_expert_is_the_dense_model_and_more_experts_only_add(model: Architecture) -> None:
    base, total = llmcarbon.base_parameters(model), llmcarbon.total_parameters(model)
    assert total >= base
    if model.experts == 1 or model.moe_layer_ratio == 0:
        assert total == base
    feed_forward = 8 * model.layers * model.hidden**2
    assert total - base == pytest.approx(model.moe_layer_ratio * (model.experts - 1) * feed_forward, rel=1e-6, abs=1)


@given(st.floats(1e6, 1e13), st.floats(1, 1e14))
def test_a_token_trained_on_takes_three_times_one_that_is_served(parameters: float, tokens: float) -> None:
    trained, served = llmcarbon.training_flops(parameters, tokens), llmcarbon.inference_flops(parameters, tokens)
    assert trained == pytest.approx(3 * served) and served == 2 * parameters * tokens


@given(st.floats(1e18, 1e26), st.integers(1, 20000), st.floats(1, 50))
def test_more_devices_at_one_efficiency_are_faster_and_use_the_same_energy(
    flops: float, devices: int, times: float
) -> None:
    few, many = fleet(devices, 300, 125, 0.3), fleet(devices * times, 300, 125, 0.3)
    seconds = llmcarbon.compute_seconds(flops, few), llmcarbon.compute_seconds(flops, many)
    assert seconds[1] == pytest.approx(seconds[0] / times)
    assert llmcarbon.fleet_joules(few, seconds[0]) == pytest.approx(llmcarbon.fleet_joules(many, seconds[1]))


def test_a_terabyte_on_ssd_for_an_hour_takes_1_2_watt_hours() -> None:
    joules = llmcarbon.storage_joules(tera(1), 3600, "ssd")
    assert convert(joules, "J", "kWh") == pytest.approx(1.2e-3)
    assert llmcarbon.storage_joules(tera(1), 3600, "hdd", replicas=2) == pytest.approx(joules * 2 * 0.65 / 1.2)


def test_an_unknown_medium_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'tape' is not in the catalog; allowed: ssd, hdd"):
        llmcarbon.storage_joules(1, 1, "tape")
