"""``llmco2 predict`` and ``llmco2 train`` as typed in a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmco2_vllm.cli.main import main
from llmco2_vllm.predictor.bundle import Bundle
from tests.core.published import PUBLISHED


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-8B"][0]))
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def predict(model: Path, **options: object) -> dict[str, Any]:
    values = {"device": "h100-sxm", "batch": 8, "prompt": 500, "output": 100, **options}
    flags = [text for key, value in values.items() for text in (f"--{key}", value)]
    result = run("predict", "--model", model, *flags, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_prefill_and_decode_add_up_and_lie_in_their_interval(model: Path) -> None:
    found = predict(model)
    assert found["basis"] == "predicted" and found["predictor"].startswith("gnn/")
    assert found["total"]["joules"] == pytest.approx(found["prefill"]["joules"] + found["decode"]["joules"])
    assert found["per_request"]["joules"] == pytest.approx(found["total"]["joules"] / 8)
    for row in (found["prefill"], found["decode"], found["total"]):
        assert row["interval_joules"][0] <= row["joules"] <= row["interval_joules"][1]


def test_more_output_takes_more_energy_and_a_folder_is_as_good_as_its_config(model: Path) -> None:
    series = [predict(model, output=n)["decode"]["joules"] for n in (1, 2, 50, 1000)]
    assert series == sorted(series) and series[0] == 0.0
    assert predict(model / "config.json") == predict(model)


def test_grams_follow_intensity_and_pue(model: Path) -> None:
    found = predict(model, intensity=360, pue=1.5)
    assert found["total"]["carbon_grams"] == pytest.approx(found["total"]["joules"] * 360 * 1.5 / 3.6e6)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--device", "abacus"], "allowed: cpu"),
        (["--batch", "0"], "--batch"),
        (["--predictor", "no/such/file"], "no/such/file"),
    ],
)
def test_a_wrong_option_is_one_clear_line(model: Path, flags: list[str], reason: str) -> None:
    base = ["predict", "--model", model, "--device", "h100-sxm", "--prompt", 10, "--output", 10]
    result = run(*base, *flags)
    assert result.exit_code != 0
    assert reason in result.output and "Traceback" not in result.output


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    result = run("predict", "--model", tmp_path, "--device", "h100-sxm", "--prompt", 10, "--output", 10)
    assert result.exit_code != 0 and "expected an object" in result.output


def test_training_writes_a_bundle_that_serves(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("torch_geometric")
    table = tmp_path / "rows.csv"
    table.write_text(training_rows())
    out = tmp_path / "b.npz"
    result = run("train", table, "--model-configs", sizes(tmp_path), "--write", out, "--steps", 3)
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(out)
    assert bundle.provenance["architectures"] == 3 and bundle.provenance["attribution"]
    found = predict(model, predictor=out)
    assert found["predictor"] == "gnn/1-h100-sxm"


def test_training_on_too_little_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    table = tmp_path / "rows.csv"
    head, row, *_ = training_rows().splitlines()
    table.write_text(f"{head}\n{row}\n")
    result = run("train", table, "--model-configs", sizes(tmp_path), "--write", tmp_path / "b.npz")
    assert result.exit_code != 0 and "three architectures" in result.output


COLUMNS = (
    "task,model,arch,gpu,n_gpu,tp,ep,dp,precision,total_params_b,active_params_b,max_num_seqs,avg_batch,avg_out_len,"
    "j_per_token,j_per_request,power_w,itl_med_ms,itl_p90_ms,itl_p95_ms,itl_p99_ms,tok_s,w_per_gpu,j_per_step,"
    "implied_step_ms"
)


def training_rows() -> str:
    """Three invented architectures at two batch sizes; times and powers that agree with each other."""
    lines = [COLUMNS]
    for size in (1, 2, 3):
        for batch in (8, 64):
            step_ms, watts, tokens = 4.0 * size + 0.1 * batch, 300.0 + batch, 500.0
            joules = watts * step_ms / 1e3
            rate = 1e3 * batch / step_ms
            energy = f"{joules / batch},{joules / batch * tokens},{watts}"
            tail = f"{energy},{step_ms * 0.97},9,9,9,{rate},{watts},{joules},{step_ms}"
            lines.append(f"lm-arena-chat,m{size},Dense,H100,1,1,1,1,bfloat16,8,8,{batch},{batch},{tokens},{tail}")
    return "\n".join(lines) + "\n"


def sizes(folder: Path) -> Path:
    entry = {
        "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 8192, "vocab": 32000, "tie_embeddings": False,
        "mlp": "swiglu", "attn": "gqa", "params_total_b_calc": 8, "params_active_b_calc": 8,
    }  # fmt: skip
    path = folder / "model_configs.json"
    path.write_text(json.dumps({f"m{n}": {"layers": 8 * n, "hidden": 1024 * n, **entry} for n in (1, 2, 3)}))
    return path
