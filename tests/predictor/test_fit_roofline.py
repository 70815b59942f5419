"""The fit's own vectorised equations are those of the shipped predictor, and it finds coefficients again."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fit_roofline.py"
DENSE = {
    "layers": 36, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288,
    "vocab": 151936, "tie_embeddings": False, "attn": "gqa",
}  # fmt: skip
MOE = {
    "layers": 24, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "intermediate": 2880, "vocab": 201088,
    "tie_embeddings": False, "attn": "gqa+sinks", "experts": 32, "topk": 4, "moe_intermediate": 2880,
    "moe_layers": 24, "sliding_window": 128, "sliding_pattern": "alternating",
}  # fmt: skip
LATENT = {**DENSE, "attn": "mla"}


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_roofline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def record(**changes: Any) -> dict[str, Any]:
    row = {
        "task": "lm-arena-chat", "model": "dense", "gpu": "H100", "n_gpu": 1, "ep": 1, "precision": "bfloat16",
        "avg_batch": 64, "avg_out_len": 600, "implied_step_ms": 15.0, "itl_med_ms": 14.0, "w_per_gpu": 520.0,
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        *(record(model=model, gpu=gpu, n_gpu=n, ep=n if model == "moe" else 1, avg_batch=batch)
          for model in ("dense", "moe") for gpu in ("H100", "B200") for n in (1, 4) for batch in (8, 128, 2048)),
        record(implied_step_ms=100.0),
        record(model="latent"),
        record(task="video-chat"),
    ]  # fmt: skip
    with (tmp_path / "mlenergy_v3.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "model_configs.json").write_text(json.dumps({"dense": DENSE, "moe": MOE, "latent": LATENT}))
    return tmp_path


def test_stalled_rows_other_tasks_and_layers_the_graph_does_not_know_are_left_out(
    fit: ModuleType, folder: Path
) -> None:
    rows = fit.load_rows(folder)
    assert len(rows) == 24
    assert len({fit.architecture(row) for row in rows}) == 2


def test_the_fit_prices_rows_as_the_shipped_predictor_does(fit: ModuleType, folder: Path) -> None:
    rows = fit.load_rows(folder)
    np.testing.assert_allclose(fit.Table(rows).predict(fit.START), fit.predict(rows, fit.START), rtol=1e-9)


def test_the_fit_comes_near_coefficients_that_made_the_data(
    fit: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fit.load_rows(folder)
    truth = fit.replace(fit.START, bandwidth_efficiency=0.5, step_overhead_seconds=5e-3, static_power_ratio=0.4)
    made = fit.predict(rows, truth)
    monkeypatch.setattr(fit, "targets", lambda rows: made)
    before, after = fit.Table(rows).loss(fit.START), fit.Table(rows).loss(fit.fit(rows))
    assert after < 0.2 * before
