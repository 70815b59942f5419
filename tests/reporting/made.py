"""Windows, stores and intensity files for tests of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.store_kill import made_sample
from llmco2_vllm.store.database import FILE_NAME, connect, insert
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample

# Midnight of 2026-03-02 in UTC.
BEGIN = datetime(2026, 3, 2, tzinfo=UTC).timestamp()
HOUR = 3600.0
MODEL, OTHER = "0f" * 8, "a1" * 8


def steps(rows: Iterable[tuple[float, int, int]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Whole steps of predicted joules, prefill tokens and decode tokens; 0.1 s each."""
    found = [
        [1.0, 0.1, joules, float(prefill > 0), prefill, 0, 0, 0, float(decode > 0), decode, 0, 0, 0, 0]
        for joules, prefill, decode in rows
    ]
    return np.array(found, dtype=np.float64).reshape(-1, len(STEP_COLUMNS))


def window(hours: float, joules: float, *rows: tuple[float, int, int], model: str = MODEL, idle: float = 0.0) -> Sample:
    """A window of 10 s that begins ``hours`` after BEGIN; ``idle`` joules of its energy are idle."""
    return replace(
        made_sample(0),
        began_epoch_seconds=BEGIN + hours * HOUR,
        duration_seconds=10.0,
        energy_joules=joules,
        sigma_joules=0.01 * joules,
        idle_seconds=10.0 - 0.1 * len(rows),
        idle_joules=idle,
        predicted_joules=sum(row[0] for row in rows),
        model_fingerprint=model,
        steps=steps(rows),
    )


def stored(folder: Path, samples: Sequence[Sample]) -> Path:
    """A folder with a store of these samples."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(connect(folder / FILE_NAME)) as connection:
        insert(connection, samples)
    return folder


def intensity_file(path: Path, values: Sequence[float | None]) -> Path:
    """One row an hour from BEGIN on; None is an empty value."""
    rows = [f"{BEGIN + HOUR * hour:.0f},{'' if value is None else repr(value)}" for hour, value in enumerate(values)]
    path.write_text("\n".join(["epoch_seconds,grams_per_kwh", *rows, ""]))
    return path
