"""Kernel and network profiles of Vidur (Agrawal et al., MLSys 2024, arXiv:2405.05465) as structured arrays.

One row per profiled point, in the order of the file; repeated points are kept, they show the noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.training.table import read_columns

Records = NDArray[np.void]
_TEXT, _COUNT, _TIME = "U", "i8", "f8"
# (column of the file, field of the array, dtype). Times are converted from milliseconds to seconds.
_KERNELS = (
    ("gpu", "device", _TEXT),
    ("model", "model", _TEXT),
    ("num_tensor_parallel_workers", "tensor_parallel", _COUNT),
    ("num_tokens", "tokens", _COUNT),
    ("n_head", "heads", _COUNT),
    ("n_kv_head", "kv_heads", _COUNT),
    ("n_embd", "hidden", _COUNT),
    ("n_expanded_embd", "intermediate", _COUNT),
    ("vocab_size", "vocab", _COUNT),
    ("use_gated_mlp", "gated_mlp", "?"),
    ("op", "kernel", _TEXT),
    ("median_ms", "duration_seconds", _TIME),
)
_NETWORK = (
    ("cluster", "cluster", _TEXT),
    ("collective", "collective", _TEXT),
    ("num_workers", "ranks", _COUNT),
    ("size", "size_bytes", _COUNT),
    ("devices_per_node", "devices_per_node", _COUNT),
    ("max_devices_per_node", "max_devices_per_node", _COUNT),
    ("median_ms", "duration_seconds", _TIME),
)


def read_kernels(path: Path) -> Records:
    """GPU time of one kernel of ONE layer on one rank, FP16, shape (rows,).

    Fields: device (a40, a100, h100), model, tensor_parallel, tokens, sizes of the model (heads, kv_heads, hidden,
    intermediate, vocab, gated_mlp), kernel (emb, input_layernorm, attn_pre_proj, attn_rope, attn_post_proj,
    post_attention_layernorm, mlp_up_proj, mlp_act, mlp_down_proj, add) and duration_seconds.
    """
    return _read(path, _KERNELS)


def read_network(path: Path) -> Records:
    """Time of one collective, shape (rows,).

    Fields: cluster (device and links), collective (all_reduce, send_recv), ranks, size_bytes, devices_per_node,
    max_devices_per_node and duration_seconds.
    """
    return _read(path, _NETWORK)


def _read(path: Path, layout: tuple[tuple[str, str, str], ...]) -> Records:
    rows = list(read_columns(path, tuple(column for column, _, _ in layout)))
    if not rows:
        raise ValueError(f"{path}: no rows below the header")
    columns = zip(layout, zip(*rows, strict=True), strict=True)
    arrays = {name: _convert(path, column, kind, fields) for (column, name, kind), fields in columns}
    records = np.empty(len(rows), dtype=[(name, array.dtype) for name, array in arrays.items()])
    for name, array in arrays.items():
        records[name] = array
    return records


def _convert(path: Path, column: str, kind: str, fields: tuple[str, ...]) -> NDArray[Any]:
    if kind == "?":
        return np.array([field == "True" for field in fields])
    if kind == _TEXT:
        return np.array(fields)
    try:
        array = np.array(fields).astype(kind)
    except ValueError as error:
        raise ValueError(f"{path}: column {column}: {error}") from None
    sound = np.isfinite(array) & (array > 0)
    if not sound.all():
        raise ValueError(f"{path}: line {int(np.argmin(sound)) + 2}, column {column}: expected positive numbers")
    return array / 1e3 if kind == _TIME else array
