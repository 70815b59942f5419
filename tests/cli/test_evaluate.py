"""``llmco2 evaluate``: one JSON object with known keys, what is scored, and what becomes of bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from llmco2_vllm.cli.main import main
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.predictor.forward import DEFAULT_DEVICE
from llmco2_vllm.training.network import KernelGraphNetwork
from tests.training import tables
from tests.training.released_rows import labelled, requests

KEYS = ["n", "mape", "median_ape", "eba_5", "eba_10", "eba_30", "bias", "coverage_90"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network."""
    torch.set_num_threads(1)
    devices = (DEFAULT_DEVICE, "h100-sxm")
    arrays = KernelGraphNetwork(devices).parameters_for_serving()
    path = tmp_path_factory.mktemp("bundle") / "gnn.npz"
    Bundle("gnn/test", devices, arrays, dict.fromkeys(("decode", "mixed", "unknown"), Interval(0.5, 2.0))).save(path)
    return path


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(tables.CONFIGS))
    return path


def evaluate(data: Path, *options: Any) -> Result:
    return CliRunner().invoke(main, ["evaluate", "--data", str(data), *map(str, options)], env={"COLUMNS": "140"})


def v3(folder: Path, *changes: dict[str, Any]) -> Path:
    return tables.write(folder / "v3.csv", tables.V3, *changes)


def test_json_is_one_object_with_the_scores_and_nothing_else(tmp_path: Path, configs: Path, bundle: Path) -> None:
    data = v3(tmp_path, *tables.sweep())
    result = evaluate(data, "--model-configs", configs, "--bundle", bundle, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == KEYS and found["n"] == 40 and all(value is not None for value in found.values())
    assert "target: step energy, joules" in result.stderr


def test_a_table_for_people_names_the_target_and_says_what_each_score_is(
    tmp_path: Path, configs: Path, bundle: Path
) -> None:
    result = evaluate(v3(tmp_path, {}), "--model-configs", configs, "--bundle", bundle)
    assert result.exit_code == 0, result.output
    assert "step energy, joules" in result.stdout and all(key in result.stdout for key in KEYS)


def test_sizes_lie_beside_the_table_when_not_given(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "model_configs.json").write_text(json.dumps(tables.CONFIGS))
    assert evaluate(v3(tmp_path, {}), "--bundle", bundle, "--json").exit_code == 0


def test_bad_rows_are_told_with_line_and_reason_and_status_2(tmp_path: Path, configs: Path, bundle: Path) -> None:
    data = v3(tmp_path, {}, {"power_w": "many"}, {"gpu": "abacus"})
    result = evaluate(data, "--model-configs", configs, "--bundle", bundle, "--json")
    assert result.exit_code == 2 and not result.stdout
    assert "line 3, column power_w: 'many' is not a number" in result.stderr and "line 4, column gpu" in result.stderr
    assert "--skip-bad" in result.stderr


def test_bad_rows_are_skipped_when_asked_and_still_told(tmp_path: Path, configs: Path, bundle: Path) -> None:
    data = v3(tmp_path, {}, {"power_w": "many"})
    result = evaluate(data, "--model-configs", configs, "--bundle", bundle, "--json", "--skip-bad")
    assert result.exit_code == 0 and json.loads(result.stdout)["n"] == 1
    assert "skipped line 3, column power_w" in result.stderr


def test_nothing_left_to_score_is_an_error_of_the_table(tmp_path: Path, configs: Path, bundle: Path) -> None:
    data = v3(tmp_path, {"power_w": "many"})
    result = evaluate(data, "--model-configs", configs, "--bundle", bundle, "--skip-bad")
    assert result.exit_code == 2 and "no row" in result.stderr


def test_an_unknown_header_is_an_error_of_the_table(tmp_path: Path, bundle: Path) -> None:
    data = tmp_path / "other.csv"
    data.write_text("a,b\n1,2\n")
    result = evaluate(data, "--bundle", bundle)
    assert result.exit_code == 2 and "fits no known table" in result.stderr


def test_a_file_that_is_no_bundle_is_named(tmp_path: Path, configs: Path) -> None:
    result = evaluate(v3(tmp_path, {}), "--model-configs", configs, "--bundle", configs)
    assert result.exit_code == 1 and "--bundle: bundle: not readable" in result.stderr


@pytest.mark.parametrize(
    ("base", "target", "n"), [(tables.V2, "step energy, joules", 1), (tables.SPLITWISE, "time, seconds", 2)]
)
def test_other_tables_of_measurements_are_recognised(
    tmp_path: Path, bundle: Path, base: dict[str, Any], target: str, n: int
) -> None:
    result = evaluate(tables.write(tmp_path / "t.csv", base, {}), "--bundle", bundle, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == KEYS and json.loads(result.stdout)["n"] == n
    assert f"target: {target}" in result.stderr


def test_released_labels_are_scored_without_a_bundle_and_called_no_energy(tmp_path: Path) -> None:
    rows = labelled(requests(count=60))
    names = ("split", "model", "batch", "prompt", "output", "prefill", "decode")
    table = [dict(zip(tables.LLMCO2, row, strict=True)) for row in zip(*(vars(rows)[n] for n in names), strict=True)]
    result = evaluate(tables.write(tmp_path / "released.csv", tables.LLMCO2, *table), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == KEYS and found["n"] == 15 and found["mape"] < 1
    assert "target: LLMCO2 released labels, unit unknown" in result.stderr
