from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Predictor, Rates
from llmco2_vllm.core.hardware import DeviceSpec, Topology, device_by_name
from llmco2_vllm.core.kernels import DRIVERS, Kernel, KernelKind, Payer
from llmco2_vllm.core.ledgers import LedgerBook, RequestCharge, RequestSlice
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.core.roofline import Ceilings, Work, least_time_seconds
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.predict import RooflinePredictor, efficiencies, overhead_seconds

CALIBRATION = RooflineCalibration.load()
H100 = device_by_name("h100-sxm")
CPU = DeviceSpec("cpu", "cpu", {"fp32": 3e11, "bf16": 3e11, "fp16": 3e11}, 2e10, 16e9, 20.0, 10.0, cores=2)
DENSE = ModelSpec(32, 4096, 32, 8, 128, 14336, 128256)
MOE = ModelSpec(
    48, 2048, 32, 4, 128, 6144, 151936, experts=128, experts_per_token=8, moe_intermediate=768, moe_layers=48
)
SLIDING = replace(DENSE, sliding_window=1024, sliding_layers=26)
MODELS = {"dense": DENSE, "moe": MOE, "sliding": SLIDING, "fp8": replace(DENSE, weight_bytes=1.0, compute_dtype="fp8")}
PREDICTORS = {
    **{name: RooflinePredictor(model, H100, Topology(), CALIBRATION) for name, model in MODELS.items()},
    "tensor_parallel": RooflinePredictor(MOE, H100, Topology(4, 2, 2, True), CALIBRATION),
    "cpu": RooflinePredictor(DENSE, CPU, Topology(), CALIBRATION),
}

requests = st.tuples(st.integers(0, 8000), st.integers(0, 2000), st.integers(0, 4), st.integers(0, 1)).filter(
    lambda row: row[1] + row[2] > 0
)
batches = st.lists(requests, min_size=1, max_size=12)
predictors = st.sampled_from(sorted(PREDICTORS))


def shape(rows: list[tuple[int, int, int, int]]) -> BatchShape:
    slices = []
    for context, prefill, decode, sampled in rows:
        charge = RequestCharge(context, context + prefill, context + prefill)
        pairs = charge.slice(prefill + decode)[-2:]
        slices.append(RequestSlice(charge, prefill, decode, sampled * (prefill > 0), *pairs))
    return LedgerBook().shape(slices)


def shared(phase: PhaseShape, rates: Rates) -> float:
    return (
        phase.tokens * rates.per_token_joules
        + phase.pairs * rates.per_pair_joules
        + phase.samples * rates.per_sample_joules
    )


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_batch_without_tokens_costs_nothing(name: str) -> None:
    estimate = PREDICTORS[name].estimate(BatchShape())
    assert estimate.energy_joules == estimate.duration_seconds == 0.0


@given(predictors, batches)
def test_the_rates_add_up_to_the_joules_of_each_phase(name: str, rows: list[tuple[int, int, int, int]]) -> None:
    batch = shape(rows)
    estimate = PREDICTORS[name].estimate(batch)
    assert shared(batch.prefill, estimate.prefill) == pytest.approx(estimate.prefill_joules, rel=1e-12)
    assert shared(batch.decode, estimate.decode) == pytest.approx(estimate.decode_joules, rel=1e-12)
    assert estimate.energy_joules > 0
    assert estimate.lower_ratio <= 1 <= estimate.upper_ratio


def slow_estimate(
    model: ModelSpec, device: DeviceSpec, topology: Topology, batch: BatchShape
) -> tuple[float, float, dict[Payer, float]]:
    """(seconds, joules, joules by payer) kernel by kernel, straight from the definitions."""
    predictor = RooflinePredictor(model, device, topology, CALIBRATION)
    c = CALIBRATION.kinds[device.kind].coefficients
    drivers = dict(zip(DRIVERS, predictor.graph.drivers(batch), strict=True))
    span = device.power_limit_watts - device.idle_power_watts
    static = device.idle_power_watts + c.static_power_ratio * span
    step, sequence = overhead_seconds(predictor.graph, c)
    overhead = step + sequence * (batch.prefill.sequences + batch.decode.sequences)
    times, uses = dict.fromkeys(Payer, 0.0), dict.fromkeys(Payer, 0.0)
    times[Payer.TOKENS] = overhead

    def amount(kernel: Kernel, *quantities: str) -> float:
        terms = [getattr(kernel, quantity) for quantity in quantities]
        return float(kernel.repeat * sum(value * drivers[driver] for term in terms for driver, value in term.items()))

    for kernel in predictor.graph.kernels:
        work = Work(
            amount(kernel, "flops"),
            amount(kernel, "weight_bytes", "activation_bytes", "kv_bytes"),
            amount(kernel, "network_bytes"),
        )
        peak, bandwidth = device.peak_flops(kernel.dtype), device.memory_bandwidth_bytes_per_second
        compute, memory, link = efficiencies(kernel.kind, c)
        sent = (device.link_bytes_per_second or bandwidth) * link
        times[kernel.payer] += least_time_seconds(work, Ceilings(peak * compute, bandwidth * memory, sent))
        uses[kernel.payer] += c.compute_power_ratio * span * work.flops / peak
        uses[kernel.payer] += c.memory_power_ratio * span * work.memory_bytes / bandwidth
    joules = {payer: topology.tensor_parallel * (static * times[payer] + uses[payer]) for payer in Payer}
    seconds, own = sum(times.values()), sum(uses.values())
    headroom = device.power_limit_watts - static
    stretched = max(seconds, own / headroom) if headroom else seconds
    factor = topology.tensor_parallel * (static * stretched + own) / sum(joules.values())
    return stretched, sum(joules.values()) * factor, {payer: value * factor for payer, value in joules.items()}


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from([Topology(), Topology(4), Topology(2, 2), Topology(2, 1, 4, True)]),
    st.booleans(),
    batches,
)
def test_the_matrix_path_equals_a_loop_over_kernels(
    name: str, topology: Topology, on_cpu: bool, rows: list[tuple[int, int, int, int]]
) -> None:
    batch, model, device = shape(rows), MODELS[name], CPU if on_cpu else H100
    seconds, joules, by_payer = slow_estimate(model, device, topology, batch)
    estimate = RooflinePredictor(model, device, topology, CALIBRATION).estimate(batch)
    assert estimate.duration_seconds == pytest.approx(seconds, rel=1e-9)
    assert estimate.energy_joules == pytest.approx(joules, rel=1e-9)
    attention = estimate.prefill.per_pair_joules * batch.prefill.pairs
    assert attention == pytest.approx(by_payer[Payer.PREFILL_PAIRS], rel=1e-9, abs=1e-12)
    attention = estimate.decode.per_pair_joules * batch.decode.pairs
    assert attention == pytest.approx(by_payer[Payer.DECODE_PAIRS], rel=1e-9, abs=1e-12)


@given(predictors, batches, requests)
def test_one_more_request_never_lowers_the_energy(
    name: str, rows: list[tuple[int, int, int, int]], more: tuple[int, int, int, int]
) -> None:
    predictor = PREDICTORS[name]
    before, after = predictor.estimate(shape(rows)), predictor.estimate(shape([*rows, more]))
    assert after.energy_joules >= before.energy_joules * (1 - 1e-12)
    assert after.duration_seconds >= before.duration_seconds * (1 - 1e-12)


@given(predictors, batches, st.integers(1, 5000))
def test_a_longer_context_never_lowers_the_energy(name: str, rows: list[tuple[int, int, int, int]], more: int) -> None:
    predictor = PREDICTORS[name]
    longer = [(context + more, new, decoded, sampled) for context, new, decoded, sampled in rows]
    assert predictor.estimate(shape(longer)).energy_joules >= predictor.estimate(shape(rows)).energy_joules


@given(batches)
def test_more_layers_take_more_energy(rows: list[tuple[int, int, int, int]]) -> None:
    deeper = RooflinePredictor(replace(DENSE, layers=33), H100, Topology(), CALIBRATION)
    assert deeper.estimate(shape(rows)).energy_joules > PREDICTORS["dense"].estimate(shape(rows)).energy_joules


@given(predictors, batches)
def test_two_batches_together_never_take_more_than_apart(name: str, rows: list[tuple[int, int, int, int]]) -> None:
    predictor = PREDICTORS[name]
    alone, together = predictor.estimate(shape(rows)), predictor.estimate(shape(rows + rows))
    assert together.energy_joules <= 2 * alone.energy_joules * (1 + 1e-12)


@given(predictors, batches)
def test_power_stays_between_idle_and_the_limit(name: str, rows: list[tuple[int, int, int, int]]) -> None:
    estimate = PREDICTORS[name].estimate(shape(rows))
    device = CPU if name == "cpu" else H100
    watts = estimate.energy_joules / estimate.duration_seconds / (4 if name == "tensor_parallel" else 1)
    assert device.idle_power_watts < watts <= device.power_limit_watts * (1 + 1e-9)


def test_a_cpu_draws_the_power_of_all_its_cores_while_it_works() -> None:
    estimate = PREDICTORS["cpu"].estimate(shape([(100, 0, 1, 0)]))
    assert estimate.energy_joules == pytest.approx(CPU.power_limit_watts * estimate.duration_seconds)


def test_a_decode_step_of_an_8b_model_takes_about_its_weights_over_the_bandwidth() -> None:
    estimate = PREDICTORS["dense"].estimate(shape([(500, 0, 1, 0)]))
    streamed = 2 * (DENSE.non_embedding_parameters + DENSE.embedding_parameters)
    least = streamed / H100.memory_bandwidth_bytes_per_second
    assert least < estimate.duration_seconds < 2.5 * least


def test_a_split_model_is_faster_but_not_by_the_number_of_devices() -> None:
    batch = shape([(0, 2000, 0, 1)] * 4)
    alone = PREDICTORS["dense"].estimate(batch)
    split = RooflinePredictor(DENSE, H100, Topology(tensor_parallel=4), CALIBRATION).estimate(batch)
    assert alone.duration_seconds / 4 < split.duration_seconds < alone.duration_seconds
    assert split.energy_joules > alone.energy_joules


def test_both_phases_share_the_streamed_weights_by_their_tokens() -> None:
    estimate = PREDICTORS["dense"].estimate(shape([(0, 300, 0, 1), (900, 0, 1, 0)]))
    assert estimate.prefill.per_token_joules == estimate.decode.per_token_joules
    assert estimate.prefill.per_sample_joules == estimate.decode.per_sample_joules


def test_a_phase_that_is_absent_has_no_energy() -> None:
    estimate = PREDICTORS["dense"].estimate(shape([(900, 0, 1, 0)]))
    assert estimate.prefill_joules == 0.0
    assert estimate.prefill == Rates()


def test_what_was_not_calibrated_is_out_of_distribution_and_less_certain() -> None:
    batch = shape([(900, 0, 1, 0)])
    known = PREDICTORS["dense"].estimate(batch)
    assert known.in_distribution
    generic = RooflinePredictor(replace(DENSE, generic=True), H100, Topology(), CALIBRATION)
    elsewhere = RooflinePredictor(DENSE, device_by_name("l4"), Topology(), CALIBRATION)
    unsure = [
        PREDICTORS["dense"].estimate(batch._replace(encoder_tokens=64)),
        generic.estimate(batch),
        elsewhere.estimate(batch),
        PREDICTORS["cpu"].estimate(batch),
    ]
    for estimate in unsure:
        assert not estimate.in_distribution
        assert estimate.lower_ratio < known.lower_ratio
        assert estimate.upper_ratio > known.upper_ratio


def test_a_prefill_step_is_less_certain_than_a_decode_step() -> None:
    predictor = PREDICTORS["dense"]
    prefill, decode = predictor.estimate(shape([(0, 500, 0, 1)])), predictor.estimate(shape([(500, 0, 1, 0)]))
    assert prefill.upper_ratio > decode.upper_ratio
    assert prefill.in_distribution


def test_a_pooling_model_pays_for_no_samples() -> None:
    predictor = RooflinePredictor(replace(DENSE, has_lm_head=False), H100, Topology(), CALIBRATION)
    estimate = predictor.estimate(shape([(0, 500, 0, 0)]))
    assert estimate.prefill.per_sample_joules == 0.0
    assert estimate.energy_joules > 0


def test_the_name_tells_method_version_and_device_without_a_comma() -> None:
    predictor = PREDICTORS["dense"]
    assert isinstance(predictor, Predictor)
    assert predictor.name == "roofline/2-h100-sxm"
    odd = RooflinePredictor(DENSE, replace(H100, name="a,b"), Topology(), CALIBRATION)
    assert "," not in odd.name


def test_collectives_exist_only_between_devices() -> None:
    kinds = {kernel.kind for kernel in PREDICTORS["dense"].graph.kernels}
    assert KernelKind.COLLECTIVE not in kinds
    assert KernelKind.COLLECTIVE in {kernel.kind for kernel in PREDICTORS["tensor_parallel"].graph.kernels}
