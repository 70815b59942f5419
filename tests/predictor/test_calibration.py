import json
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.predictor.calibration import RooflineCalibration


@pytest.fixture
def content() -> dict[str, Any]:
    """The shipped file as parsed JSON, free to be spoilt."""
    parsed: dict[str, Any] = json.loads(json.dumps(RooflineCalibration.load().to_dict()))
    return parsed


def test_the_shipped_file_says_where_it_comes_from() -> None:
    shipped = RooflineCalibration.load()
    assert shipped.version == "roofline/2"
    assert {"data", "command", "left_out", "attribution"} <= set(shipped.provenance)
    assert shipped.kinds["cpu"].calibrated_devices == ()
    assert "h100-sxm" in shipped.kinds["gpu"].calibrated_devices


def test_the_shipped_interval_is_the_left_out_error_and_others_are_wider() -> None:
    shipped = RooflineCalibration.load()
    gpu, energy = shipped.kinds["gpu"], shipped.provenance["left_out"]["step_energy"]
    assert tuple(gpu.decode) == (min(1, energy["quantile_05_ratio"]), max(1, energy["quantile_95_ratio"]))
    assert gpu.unknown.lower_ratio < gpu.prefill.lower_ratio < gpu.decode.lower_ratio
    assert gpu.unknown.upper_ratio > gpu.prefill.upper_ratio > gpu.decode.upper_ratio


def test_a_calibration_survives_the_way_to_a_file_and_back(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    assert RooflineCalibration.load(path) == RooflineCalibration.load()


@pytest.mark.parametrize("key", ["schema", "version", "kinds", "provenance"])
def test_a_missing_key_is_named(content: dict[str, Any], key: str) -> None:
    del content[key]
    with pytest.raises(ValueError, match=key):
        RooflineCalibration.from_dict(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("compute_efficiency", 0),
        ("compute_efficiency", 1.2),
        ("bandwidth_efficiency", "fast"),
        ("step_overhead_seconds", -1),
        ("layer_overhead_seconds", float("nan")),
        ("static_power_ratio", 1.0),
        ("memory_power_ratio", None),
    ],
)
def test_an_impossible_coefficient_is_named(content: dict[str, Any], key: str, value: object) -> None:
    content["kinds"]["gpu"]["coefficients"][key] = value
    with pytest.raises(ValueError, match=key):
        RooflineCalibration.from_dict(content)


@pytest.mark.parametrize("value", [[0.5], [1.1, 1.2], [0.5, 0.9], [0, 2], ["a", "b"], 3, None])
def test_an_impossible_interval_is_named(content: dict[str, Any], value: object) -> None:
    content["kinds"]["gpu"]["prefill"] = value
    with pytest.raises(ValueError, match="prefill"):
        RooflineCalibration.from_dict(content)


@pytest.mark.parametrize("text", ["", "not json", "[]", "3", '{"schema": 2}'])
def test_a_file_that_is_no_calibration_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="calibration"):
        RooflineCalibration.load(path)


def test_a_version_with_a_comma_would_break_ledgers(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="version"):
        RooflineCalibration.from_dict({**content, "version": "roofline,1"})
