"""Invented rows with the columns of the released table; no value is taken from it."""

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import Phase
from llmco2_vllm.training.released import (
    BLOCK_TOKENS,
    PHASES,
    ReleasedRows,
    block_counts,
    block_tokens,
    rooflines,
)

SMALL, LARGE, WIDE = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf", "internlm/internlm-20b"
BATCH = {SMALL: 1, LARGE: 1, WIDE: 2}


def requests(models: tuple[str, ...] = (SMALL,), count: int = 200, seed: int = 0) -> ReleasedRows:
    """Requests drawn at random, every fourth one for validation, with labels of one."""
    draw = np.random.default_rng(seed)
    size = count * len(models)
    return ReleasedRows(
        split=np.where(np.arange(size) % 4, "train", "val"),
        model=np.repeat(models, count),
        batch=np.repeat([BATCH[name] for name in models], count),
        prompt=draw.integers(1, 4000, size),
        output=draw.integers(2, 300, size),
        prefill=np.ones(size),
        decode=np.ones(size),
    )


def values(name: str, phase: Phase, ripple: float = 0.0) -> NDArray[np.float64]:
    """An invented truth by block: twice the Roofline, more at long contexts, with a ripple from block to block."""
    tokens = np.minimum(block_tokens(phase), 4096)
    waves = 1 + ripple * np.sin(tokens / BLOCK_TOKENS[phase])
    return 2 * rooflines(name, BATCH[name], phase) * (1 + tokens / 20000) * waves


def labelled(rows: ReleasedRows, ripple: float = 0.0) -> ReleasedRows:
    """The same requests with labels of the invented truth."""
    found = np.empty((len(rows), 2))
    for name in rows.models:
        own = rows.model == name
        for column, phase in enumerate(PHASES):
            found[own, column] = block_counts(phase, rows.where(own)) @ values(name, phase, ripple)
    return ReleasedRows(**{**vars(rows), "prefill": found[:, 0], "decode": found[:, 1]})
