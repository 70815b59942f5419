"""Small tables with invented numbers in the columns of the public ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

DENSE: dict[str, Any] = {
    "layers": 8,
    "hidden": 1024,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "intermediate": 4096,
    "vocab": 32000,
    "tie_embeddings": False,
    "qk_norm": True,
}
EXPERTS = {**DENSE, "experts": 16, "topk": 2, "moe_intermediate": 512, "shared_experts": 0, "moe_layers": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "acme/Dense-1B": DENSE,
    "acme/Dense-1B-Chat": {**DENSE, "vocab": 33000},
    "acme/Wide-2B": {**DENSE, "hidden": 2048, "intermediate": 8192},
    "acme/Deep-2B": {**DENSE, "layers": 20},
    "acme/Experts-3B": EXPERTS,
    # The MLP width of a model whose layers all have experts is unused; published ones differ.
    "acme/Experts-3B-Coder": {**EXPERTS, "intermediate": 3000},
    "Qwen/Experts-3B-FP8": EXPERTS,
    "meta-llama/Dense-1B-FP8": DENSE,
}
V3 = {
    "task": "gpqa",
    "model": "acme/Dense-1B",
    "arch": "Dense Transformer",
    "gpu": "H100",
    "n_gpu": 1,
    "tp": 1,
    "ep": 1,
    "dp": 1,
    "precision": "bfloat16",
    "max_num_seqs": 32,
    "avg_batch": 31.5,
    "avg_out_len": 600,
    "power_w": 400,
    "itl_med_ms": 9.5,
    "tok_s": 3150,
}
V2 = {
    "task": "llm_text_generation/chat",
    "gpu": "NVIDIA A100-SXM4-40GB",
    "model": "mistralai/Mistral-7B-Instruct-v0.3",
    "tp": 1,
    "pp": 1,
    "max_bs": 64,
    "avg_bs": 60,
    "avg_out": 300,
    "j_req": 90,
    "tpot_s": 0.05,
    "tok_s": 1000,
    "extra": "",
}
SPLITWISE = {
    "model": "llama2-70b",
    "hardware": "a100-80gb",
    "tensor_parallel": 8,
    "prompt_size": 512,
    "batch_size": 4,
    "token_size": 128,
    "n": 5,
    "prompt_ms": 400,
    "token_ms": 45,
    "e2e_ms": 6000,
    "avg_power_frac": 0.6,
    "peak_power_frac": 0.9,
}
LLMCO2 = {
    "split": "train",
    "model": "meta-llama/Llama-2-7b-hf",
    "batch_size": 1,
    "prompt_tokens": 400,
    "output_tokens": 100,
    "prefill_energy_raw": 0.04,
    "decode_energy_raw": 1.1,
}


def write(path: Path, base: dict[str, Any], *changes: dict[str, Any]) -> Path:
    """A table with one row per change of ``base``."""
    lines = [",".join(base), *(",".join(str(value) for value in {**base, **change}.values()) for change in changes)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sweep() -> list[dict[str, Any]]:
    """Rows of a v3 table: models x devices x batch limits, with times and powers that grow plausibly."""
    rows = []
    names = ("acme/Dense-1B", "acme/Dense-1B-Chat", "acme/Wide-2B", "acme/Deep-2B", "acme/Experts-3B")
    for (place, name), gpu, batch in itertools.product(enumerate(names), ("H100", "B200"), (8, 32, 128, 512)):
        speed = 1.0 if gpu == "H100" else 0.6
        step = speed * (4e-3 + 1e-3 * place + 3e-5 * batch)
        watts = (250 if gpu == "H100" else 400) + 60 * batch**0.25
        changes = {"model": name, "gpu": gpu, "max_num_seqs": batch, "avg_batch": batch, "power_w": watts}
        rows.append({**changes, "itl_med_ms": 1e3 * step, "tok_s": batch / step})
    return rows
