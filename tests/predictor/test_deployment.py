"""A calibrated predictor: its rates still pay for its joules, it says what it does not know, and it serves no other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.focused_sampling import MODEL as CONFIG
from llmco2_vllm.assemble import Deployment, assemble, check_settings
from llmco2_vllm.config import ConfigError, Settings
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Estimate, Predictor, Rates
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.monitor import empty_batch_costs_nothing
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.deployment import (
    CalibratedPredictor,
    Calibration,
    Identity,
    PhaseCalibration,
    Ratio,
    calibrated,
)
from llmco2_vllm.predictor.predict import RooflinePredictor
from llmco2_vllm.testing import ConstantPredictor

MODEL = ModelSpec.from_config(CONFIG)
HERE = Identity.of(MODEL, "h100-sxm", Topology())

ratios = st.builds(
    Ratio,
    value=st.floats(0.05, 20),
    log_standard_deviation=st.floats(0, 1.5),
    n=st.integers(1, 100),
)
phases = st.none() | st.builds(PhaseCalibration, time_ratio=ratios, energy_ratio=st.none() | ratios)
shapes = st.just(PhaseShape()) | st.builds(
    lambda sequences, each, context: PhaseShape(
        sequences, sequences * each, sequences * each * (context + each), sequences * (context + each), sequences
    ),
    st.integers(1, 64),
    st.integers(1, 512),
    st.integers(0, 4096),
)
batches = st.builds(BatchShape, shapes, shapes, st.integers(0, 10))


def roofline() -> RooflinePredictor:
    return RooflinePredictor(MODEL, device_by_name("h100-sxm"), Topology(), RooflineCalibration.load())


BASES: tuple[Predictor, ...] = (ConstantPredictor(), roofline())


def found(base: Predictor, prefill: PhaseCalibration | None = None, decode: PhaseCalibration | None = None) -> Any:
    return Calibration(
        schema="llmco2-calibration/1",
        created="2026-11-21T12:00:00+00:00",
        predictor=base.name,
        deployment=HERE,
        energy="measured",
        prefill=prefill,
        decode=decode,
    )


def phase(time: float, energy: float | None = None, spread: float = 0.1, n: int = 5) -> PhaseCalibration:
    def ratio(value: float) -> Ratio:
        return Ratio(value=value, log_standard_deviation=spread, n=n)

    return PhaseCalibration(time_ratio=ratio(time), energy_ratio=None if energy is None else ratio(energy))


def paid(shape: PhaseShape, rates: Rates) -> float:
    return shape.tokens * rates[0] + shape.pairs * rates[1] + shape.samples * rates[2]


@given(st.sampled_from(BASES), phases, phases, batches)
def test_the_rates_pay_for_exactly_the_joules_of_each_phase(
    base: Predictor, prefill: PhaseCalibration | None, decode: PhaseCalibration | None, batch: BatchShape
) -> None:
    estimate = CalibratedPredictor(base, found(base, prefill, decode)).estimate(batch)
    if batch.tokens and (prefill or decode):
        assert paid(batch.prefill, estimate.prefill) == estimate.prefill_joules
        assert paid(batch.decode, estimate.decode) == estimate.decode_joules
    assert 0 < estimate.lower_ratio <= 1 <= estimate.upper_ratio < math.inf


@given(st.sampled_from(BASES), batches)
def test_a_calibration_of_nothing_changes_nothing(base: Predictor, batch: BatchShape) -> None:
    assert CalibratedPredictor(base, found(base)).estimate(batch) == base.estimate(batch)


@given(st.sampled_from(BASES), batches)
def test_ratios_of_one_change_neither_joules_nor_seconds(base: Predictor, batch: BatchShape) -> None:
    plain, same = base.estimate(batch), CalibratedPredictor(base, found(base, phase(1), phase(1))).estimate(batch)
    assert same.duration_seconds == plain.duration_seconds
    assert (same.prefill, same.decode) == (plain.prefill, plain.decode)
    assert same.energy_joules == pytest.approx(plain.energy_joules, rel=1e-12)
    assert same.in_distribution == plain.in_distribution


@given(phases, phases)
def test_an_empty_step_stays_free(prefill: PhaseCalibration | None, decode: PhaseCalibration | None) -> None:
    assert empty_batch_costs_nothing(CalibratedPredictor(BASES[1], found(BASES[1], prefill, decode)))


ONE = PhaseShape(2, 20, 400, 40, 2)
PREFILL, DECODE, MIXED = BatchShape(prefill=ONE), BatchShape(decode=ONE), BatchShape(ONE, ONE)


def changed(
    batch: BatchShape, prefill: PhaseCalibration | None, decode: PhaseCalibration | None
) -> tuple[float, float]:
    """Factors on seconds and joules."""
    base = BASES[1]
    plain, new = base.estimate(batch), CalibratedPredictor(base, found(base, prefill, decode)).estimate(batch)
    return new.duration_seconds / plain.duration_seconds, new.energy_joules / plain.energy_joules


def test_where_only_time_was_measured_energy_scales_with_it() -> None:
    assert changed(PREFILL, phase(2), phase(5)) == pytest.approx((2, 2))
    assert changed(DECODE, phase(2), phase(5)) == pytest.approx((5, 5))


def test_measured_energy_scales_apart_from_time() -> None:
    assert changed(PREFILL, phase(2, 3), phase(5, 7)) == pytest.approx((2, 3))
    assert changed(DECODE, phase(2, 3), phase(5, 7)) == pytest.approx((5, 7))


def test_a_phase_that_was_not_measured_stays_as_predicted() -> None:
    base = BASES[1]
    assert CalibratedPredictor(base, found(base, phase(2))).estimate(DECODE) == base.estimate(DECODE)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_mixed_step_lies_between_its_phases(prefill: float, decode: float) -> None:
    low, high = sorted((prefill, decode))
    for factor in changed(MIXED, phase(prefill), phase(decode)):
        assert low * (1 - 1e-9) <= factor <= high * (1 + 1e-9)


def width(estimate: Estimate) -> float:
    return math.log(estimate.upper_ratio / estimate.lower_ratio)


def test_more_points_and_less_spread_narrow_the_interval_and_metered_energy_most() -> None:
    base = ConstantPredictor()

    def of(given: PhaseCalibration) -> float:
        return width(CalibratedPredictor(base, found(base, given, given)).estimate(MIXED))

    assert of(phase(2, n=50)) < of(phase(2, n=5)) < of(phase(2, n=2))
    assert of(phase(2, spread=0.05)) < of(phase(2, spread=0.2))
    assert of(phase(2, 2)) < of(phase(2))
    # Power nobody measured keeps its doubt, however well time is known.
    assert of(phase(2, spread=0, n=1000)) == pytest.approx(math.log(4) * math.sqrt(0.5))


def test_the_interval_of_many_points_is_the_normal_one_of_their_spread() -> None:
    ratio = Ratio(value=1, log_standard_deviation=0.1, n=10**6)
    assert ratio.half_width == pytest.approx(0.16449, rel=1e-4)
    # Student's 95 % quantile of 5 degrees of freedom is 2.015.
    five = Ratio(value=1, log_standard_deviation=1, n=5).half_width / math.sqrt(1 + 1 / 5)
    assert five == pytest.approx(2.015, rel=0.01)


@pytest.mark.parametrize("batch", [PREFILL, DECODE, MIXED])
def test_only_metered_steps_come_into_the_distribution(batch: BatchShape) -> None:
    base = ConstantPredictor(in_distribution=False)

    def known(given: PhaseCalibration | None, shape: BatchShape) -> bool:
        return CalibratedPredictor(base, found(base, given, given)).estimate(shape).in_distribution

    assert known(phase(2, 2), batch)
    assert not known(phase(2), batch)
    assert not known(None, batch)
    assert not known(phase(2, 2), batch._replace(encoder_tokens=1))


def test_its_name_says_that_it_is_calibrated() -> None:
    assert CalibratedPredictor(BASES[1], found(BASES[1])).name == f"{BASES[1].name}+cal"


def test_a_calibration_of_another_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor='constant/1' was measured, this engine has 'roofline/"):
        CalibratedPredictor(BASES[1], found(BASES[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "a100-80"}, "device='h100-sxm' was measured, this engine has 'a100-80'"),
        ({"architecture": "other"}, "architecture="),
        ({"tensor_parallel": 2}, "tensor_parallel=1 was measured, this engine has 2"),
        ({"dtype": "fp16"}, "dtype='bf16'"),
    ],
)
def test_a_calibration_of_another_deployment_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrated(found(BASES[1]), BASES[1], HERE.model_copy(update=change))


def test_other_names_and_versions_are_the_same_deployment() -> None:
    other = HERE.model_copy(update={"model_name": "prod", "vllm_version": "9"})
    assert calibrated(found(BASES[1]), BASES[1], other).estimate(MIXED) == BASES[1].estimate(MIXED)


def test_a_calibration_survives_the_way_to_a_file_and_back(tmp_path: Path) -> None:
    document, path = found(BASES[1], phase(2), phase(3, 4)), tmp_path / "calibration.json"
    document.save(path)
    assert Calibration.load(path) == document
    content = json.loads(path.read_text())
    assert content["schema"] == "llmco2-calibration/1"
    assert "energy_ratio" not in content["prefill"], "what is not known is left out"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[]", r"schema=None .* 'llmco2-calibration/1'"),
        ('{"schema": 1}', "schema=1 "),
        ('{"schema": "llmco2-calibration/1"}', "created"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"calibration: {words}") as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="calibration=") as refused:
        check_settings(Settings(predictor="roofline", calibration=path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [0, -1, "fast", None])
def test_an_impossible_ratio_is_named(tmp_path: Path, value: object) -> None:
    content = found(BASES[1], phase(2)).to_dict()
    content["prefill"]["time_ratio"]["value"] = value
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"calibration: prefill\.time_ratio\.value: "):
        Calibration.load(path)


def engine(path: Path, device: str = "h100-sxm") -> Predictor:
    settings = Settings(predictor="roofline", calibration=path)
    return assemble(settings, Deployment(CONFIG, device, "bfloat16")).monitor.predictor


def test_an_engine_serves_the_calibration_of_its_deployment_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    found(BASES[1], phase(2), phase(3)).save(path)
    predictor = engine(path)
    assert predictor.name.endswith("+cal")
    assert predictor.estimate(DECODE).duration_seconds == 3 * BASES[1].estimate(DECODE).duration_seconds
    with pytest.raises(ValueError, match="device='h100-sxm' was measured"):
        engine(path, "h200-sxm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "h200-sxm"}, "device='h100-sxm' was measured, the setting device is 'h200-sxm'"),
        ({"device": "cpu"}, "device='h100-sxm' was measured, the setting device is 'cpu'"),
        ({"device": "NVIDIA H100 80GB HBM3"}, None),
        ({}, None),
    ],
)
def test_another_device_is_refused_before_the_model_loads(
    tmp_path: Path, change: dict[str, Any], words: str | None
) -> None:
    path = tmp_path / "calibration.json"
    found(BASES[1], phase(2)).save(path)
    settings = Settings(predictor="roofline", calibration=path, **change)
    if words is None:
        check_settings(settings)
    else:
        with pytest.raises(ConfigError, match=words):
            check_settings(settings)


def test_another_predictor_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    found(BASES[0]).save(path)
    with pytest.raises(ConfigError, match=r"predictor='constant/1' was measured, predictions are by 'roofline/"):
        check_settings(Settings(predictor="roofline", calibration=path))
