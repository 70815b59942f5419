"""``llmco2 calibrate`` against a simulated server: what it writes is what is true, and refusals say why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.focused_sampling import MODEL
from llmco2_vllm.cli.main import main
from llmco2_vllm.predictor.deployment import Calibration, PhaseCalibration
from tests.cli.carbon_server import Engine, serving

LIMITS = ("--max-num-seqs", 8, "--max-num-batched-tokens", 256)
SHORT = ("--rounds", 2, "--per-round", 6, "--decode-steps", 16)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """An idle engine of an 8 B model, whose steps take twice and half of what is predicted."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return Engine(time=(2.0, 0.5), root=str(tmp_path))


def run(engine: Engine, *options: Any) -> Result:
    with serving(engine) as url:
        arguments = ["calibrate", "--url", url, *map(str, LIMITS), *map(str, options)]
        return CliRunner().invoke(main, arguments, env={"COLUMNS": "140", "VLLM_API_KEY": ""})


def written(engine: Engine, path: Path, *options: Any) -> Calibration:
    result = run(engine, *SHORT, "-o", path, *options)
    assert result.exit_code == 0, result.output
    return Calibration.load(path)


def ratios(phase: PhaseCalibration | None) -> tuple[float, float | None]:
    """Of time and energy."""
    assert phase is not None
    return phase.time_ratio.value, None if phase.energy_ratio is None else phase.energy_ratio.value


def near(value: float) -> Any:
    return pytest.approx(value, rel=0.05)


def test_the_file_holds_what_is_true_of_the_server_and_no_energy_without_a_meter(
    engine: Engine, tmp_path: Path
) -> None:
    found = written(engine, tmp_path / "calibration.json")
    assert ratios(found.prefill) == (near(2.0), None)
    assert ratios(found.decode) == (near(0.5), None)
    assert found.predictor == "constant/1-h100-sxm"
    assert found.energy == "not measured: simulated"
    assert found.deployment.device == "h100-sxm" and found.deployment.dtype == "bf16"
    assert found.deployment.vllm_version == "0.0"


def test_measured_joules_calibrate_energy_apart_from_time(engine: Engine, tmp_path: Path) -> None:
    metered = Engine(time=(2.0, 0.5), energy=(0.7, 3.0), root=engine.root)
    found = written(metered, tmp_path / "calibration.json", "--rounds", 1, "--per-round", 8)
    assert ratios(found.prefill) == (near(2.0), near(0.7))
    assert ratios(found.decode) == (near(0.5), near(3.0))
    assert found.energy == "measured"


def test_the_points_are_distinct_and_their_seconds_are_those_of_the_steps_that_ran(
    engine: Engine, tmp_path: Path
) -> None:
    points = written(engine, tmp_path / "calibration.json").points
    assert len(points) == 12
    assert len({(p.prefill_sequences, p.prefill_tokens, p.decode_sequences, p.context_tokens) for p in points}) == 12
    for point in points:
        predicted = (point.predicted_prefill_seconds, point.predicted_decode_seconds)
        assert point.observed_seconds == pytest.approx(2.0 * predicted[0] + 0.5 * predicted[1])
        if not point.decode_sequences:
            assert predicted[1] == 0
        elif not point.prefill_sequences:
            assert predicted[0] == 0, "the prefill of what decodes is subtracted"
            assert point.predicted_prefill_joules > 0, "its joules stay with the run"


def test_no_prompt_is_sent_twice_and_every_token_is_of_the_vocabulary(engine: Engine, tmp_path: Path) -> None:
    written(engine, tmp_path / "calibration.json")
    long = [tuple(prompt) for prompt in engine.prompts if len(prompt) >= 16]
    assert len(long) == len(set(long)) > 20
    assert all(0 <= token < MODEL["vocab_size"] for prompt in engine.prompts for token in prompt)
    assert all(len(prompt) < 512 for prompt in engine.prompts)


def test_the_table_says_how_much_nearer_the_prediction_comes(engine: Engine, tmp_path: Path) -> None:
    result = run(engine, *SHORT, "-o", tmp_path / "calibration.json")
    text = " ".join(result.output.split())
    assert "MAPE before" in text and "step time" in text and "step energy" not in text
    told = dict(re.findall(r"(prefill|decode): time x ([0-9.]+) ", text))
    assert {name: float(value) for name, value in told.items()} == {"prefill": near(2.0), "decode": near(0.5)}
    assert "energy: not measured: simulated" in text


def test_json_holds_the_document_and_scores_that_fell(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    result = run(engine, *SHORT, "-o", path, "--json")
    printed = json.loads(result.stdout)
    assert printed["calibration"] == json.loads(path.read_text())
    assert printed["scores"]["time"]["after"]["mape"] < printed["scores"]["time"]["before"]["mape"] / 3


def test_a_plan_sends_no_request(engine: Engine) -> None:
    result = run(engine, "--plan-only", "--per-round", 5, "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["space"] == {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": 512,
        "kv_capacity_tokens": 16000,
    }
    assert len(plan["proposals"]) == 5
    assert "First round" in run(engine, "--plan-only").output
    assert engine.prompts == []


def test_limits_on_the_command_line_narrow_those_of_the_server(engine: Engine) -> None:
    narrow = ("--max-model-len", 100, "--kv-capacity-tokens", 200)
    assert json.loads(run(engine, "--plan-only", "--json", *narrow).stdout)["space"]["max_model_len"] == 100
    wide = ("--max-model-len", 10_000, "--kv-capacity-tokens", 10**9)
    space = json.loads(run(engine, "--plan-only", "--json", *wide).stdout)["space"]
    assert (space["max_model_len"], space["kv_capacity_tokens"]) == (512, 16000)


def test_a_trace_says_what_is_asked_for(engine: Engine, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("t_s,input_tokens,output_tokens\n" + "\n".join(f"{n},{20 + n},40" for n in range(50)))
    model = ("--model", tmp_path / "config.json")
    assert json.loads(run(engine, "--plan-only", "--json", "--trace", trace, *model).stdout)["traffic"] == "trace.csv"


def test_a_budget_ends_it_after_the_mix_that_exceeds_it(engine: Engine, tmp_path: Path) -> None:
    found = written(engine, tmp_path / "calibration.json", "--budget-minutes", 1e-9)
    assert len(found.points) == 1


def failure(engine: Engine, path: Path, *options: Any) -> str:
    result = run(engine, *SHORT, "-o", path, *options)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert not path.exists()
    return result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"running": 3}, "3 other requests are running; calibrate on an idle server, or give --busy-ok"),
        ({"strangers": 1}, "no step mix could be measured; is the server otherwise idle?"),
        ({"predictor": "roofline/1-h100-sxm+cal"}, "is calibrated already"),
        ({"predictor": "roofline/1-abacus"}, "names no device of this version's catalog"),
        ({"active": False}, "no engine predicts, or its hook is off"),
        ({"root": "acme/model"}, "--model: 'acme/model' is no file here; give the model's config.json"),
        ({"root": ""}, "--model: '' is no file here"),
        ({"key": "sesame"}, "status 401; give --api-key"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused_in_one_line(
    engine: Engine, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    for name, value in changes.items():
        setattr(engine, name, value)
    assert words in failure(engine, tmp_path / "calibration.json")


def test_what_was_measured_before_others_came_is_kept(engine: Engine, tmp_path: Path) -> None:
    engine.quiet_prompts = 30
    path = tmp_path / "calibration.json"
    result = run(engine, *SHORT, "-o", path)
    kept = len(Calibration.load(path).points)
    assert result.exit_code == 1 and 1 <= kept < 12
    assert f"the {kept} step mixes measured before are in {path}" in result.stderr


def test_a_busy_server_is_measured_when_that_is_allowed(engine: Engine, tmp_path: Path) -> None:
    engine.running, engine.strangers, engine.key = 1, 1, "sesame"
    options = ("--busy-ok", "--api-key", "sesame", "--rounds", 1, "--per-round", 4)
    assert len(written(engine, tmp_path / "calibration.json", *options).points) == 4


def test_no_server_is_one_line_that_names_its_address(tmp_path: Path) -> None:
    arguments = ["calibrate", "--url", "http://127.0.0.1:1", "-o", str(tmp_path / "c.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "http://127.0.0.1:1/v1/models: ConnectError" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("option", ["--budget-minutes", "--target-error", "--coverage-share"])
def test_a_number_that_is_none_is_refused_before_anything_is_measured(
    engine: Engine, tmp_path: Path, option: str, number: str
) -> None:
    result = run(engine, *SHORT, "-o", tmp_path / "calibration.json", option, number)
    assert result.exit_code == 2 and f"Invalid value for '{option}': " in result.stderr
    assert engine.prompts == []


def test_without_a_file_to_write_nothing_is_measured(engine: Engine) -> None:
    result = run(engine, *SHORT)
    assert result.exit_code == 2 and "-o FILE" in result.stderr
    assert engine.prompts == []
