"""``llmco2 plan``: a table or JSON of what to measure next, and errors that name the option."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.focused_sampling import MODEL
from llmco2_vllm.cli.main import main

HEADER = "prefill_sequences,prefill_tokens,decode_sequences,context_tokens"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the config of an 8 B model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def plan(model: Path, *options: Any) -> Result:
    arguments = ["plan", "--model", str(model), "--device", "h100-sxm", *map(str, options)]
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "140"})


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    read: dict[str, Any] = json.loads(result.stdout)
    return read


def test_a_table_says_what_to_measure_and_why(model: Path) -> None:
    result = plan(model, "--count", 6)
    assert result.exit_code == 0
    assert result.output.count("coverage") == 3 and "Measure next" in result.output
    assert "uniform: no traffic given; 0 steps measured" in " ".join(result.output.split())


@pytest.mark.parametrize("as_file", [True, False])
def test_json_holds_as_many_steps_as_asked_within_the_limits_given(model: Path, as_file: bool) -> None:
    path = model / "config.json" if as_file else model
    found = document(plan(path, "--count", 12, "--max-num-seqs", 16, "--max-num-batched-tokens", 2048, "--json"))
    assert len(found["proposals"]) == 12
    for step in found["proposals"]:
        assert step["prefill_sequences"] + step["decode_sequences"] <= 16
        assert step["prefill_sequences"] * step["prefill_tokens"] + step["decode_sequences"] <= 2048
        assert step["predicted_energy_joules"] > 0 and "expected_error_ratio" not in step


def test_the_same_options_give_the_same_plan_and_another_seed_another(model: Path) -> None:
    first = plan(model, "--json").stdout
    assert first == plan(model, "--json").stdout != plan(model, "--json", "--seed", 1).stdout


def test_a_trace_and_measured_steps_lead_to_error_times_traffic(model: Path, tmp_path: Path) -> None:
    trace, measured = tmp_path / "trace.csv", tmp_path / "measured.csv"
    rows = [f"{second},{200 + 10 * (second % 50)},100" for second in range(300)]
    trace.write_text("\n".join(["t_s,input_tokens,output_tokens", *rows]))
    measured.write_text(f"{HEADER},relative_error\n0,0,2,300,-0.4\n1,300,2,300,0.1\n")
    found = document(plan(model, "--trace", trace, "--measured", measured, "--count", 10, "--json"))
    assert found["traffic"] == "trace.csv" and found["measured"] == 2
    reasons = [step["why"] for step in found["proposals"]]
    assert reasons.count("error x traffic") == 8 and reasons.count("coverage") == 2
    assert all(0.05 < step["expected_error_ratio"] < 0.45 for step in found["proposals"])


def test_measured_joules_are_compared_with_the_prediction(model: Path, tmp_path: Path) -> None:
    measured = tmp_path / "measured.csv"
    measured.write_text(f"{HEADER},energy_joules\n0,0,8,1000,1000000\n")
    found = document(plan(model, "--measured", measured, "--json"))
    assert all(step["expected_error_ratio"] == pytest.approx(1, abs=0.01) for step in found["proposals"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER}\n", "column energy_joules is missing; expected prefill_sequences"),
        (f"{HEADER},relative_error\n0,0,2,300,much\n", "line 2, column relative_error: 'much' is not a number"),
        (f"{HEADER},relative_error\n0,0,2,300,inf\n", "'inf' is not possible; expected a finite number"),
        (f"{HEADER},energy_joules\n0,0,2,300,0\n", "line 2, column energy_joules"),
        (f"{HEADER},relative_error\n0,0,2.5,300,0\n", "line 2, column decode_sequences: '2.5' is not possible"),
        (f"{HEADER},relative_error\n0,0,0,0,0\n", "is no step"),
    ],
)
def test_a_faulty_file_of_measured_steps_is_named_by_line_and_column(
    model: Path, tmp_path: Path, text: str, message: str
) -> None:
    measured = tmp_path / "measured.csv"
    measured.write_text(text)
    result = plan(model, "--measured", measured)
    assert result.exit_code == 1 and result.stderr.startswith("Error: --measured: ")
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "abacus"), "--device: device 'abacus' is not in the catalog; allowed: cpu"),
        (("--max-num-batched-tokens", 8), "max_num_batched_tokens=8 is not possible; allowed: max_num_seqs=256 or"),
        (("--max-model-len", 1_000_000), "--tp 1: h100-sxm has room for"),
        (("--kv-capacity-tokens", 100), "kv_capacity_tokens=100 is not possible; allowed: max_model_len=8192 or more"),
    ],
)
def test_an_impossible_option_is_named_with_what_is_allowed(
    model: Path, options: tuple[Any, ...], message: str
) -> None:
    result = plan(model, *options)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_share_that_is_no_number_is_refused_by_the_name_of_its_option(model: Path, number: str) -> None:
    result = plan(model, "--coverage-share", number)
    assert result.exit_code == 2 and "Invalid value for '--coverage-share': " in result.stderr
    assert "in the range 0<=x<=1" in result.stderr


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama"}'])
def test_a_file_that_is_no_model_config_is_refused_by_its_option(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    result = plan(model)
    assert result.exit_code == 1 and result.stderr.startswith("Error: --model: ")
