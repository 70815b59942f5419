"""Samples for tests: one by its number is benchmarks.store_kill.made_sample; here are any that are possible."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample

NUMBERS = st.floats(0, 1e300)
MAYBE = st.one_of(st.none(), NUMBERS)
COUNTS = st.integers(0, 2**31 - 1)
TEXTS = st.text(st.characters(categories=("L", "M", "N", "P", "S"), include_characters=" "), max_size=20)
SIZES = st.integers(1, 4096)
TOPOLOGIES = st.builds(Topology, SIZES, SIZES, SIZES, st.booleans())


@st.composite
def step_arrays(draw: st.DrawFn) -> Any:
    """Any steps: shares of 0 to 1, counts and seconds of 0 or more, predictions that may be unknown."""
    count = draw(st.integers(0, 4))
    value = st.floats(0, 1e18)
    row = [st.floats(0, 1), value, st.one_of(value, st.just(float("nan"))), *[value] * (len(STEP_COLUMNS) - 3)]
    rows = draw(st.lists(st.tuples(*row), min_size=count, max_size=count))
    return np.array(rows, dtype=np.float64).reshape(count, len(STEP_COLUMNS))


SAMPLES = st.builds(
    Sample,
    *[NUMBERS] * 5,
    *[MAYBE] * 2,
    TEXTS,
    COUNTS,
    *[TEXTS] * 3,
    TOPOLOGIES,
    TEXTS,
    COUNTS,
    *[TEXTS] * 2,
    MAYBE,
    st.one_of(st.none(), st.floats(-1e300, 1e300)),
    *[TEXTS] * 2,
    step_arrays(),
)


def same(found: Sample, wanted: Sample) -> bool:
    """Whether all fields are equal to the last bit; not by the key that the store itself compares by."""
    return found.values == wanted.values and found.steps.tobytes() == wanted.steps.tobytes()


def sound(file: Path) -> bool:
    """Whether SQLite finds nothing wrong with the file."""
    with closing(sqlite3.connect(file)) as connection:
        found: list[tuple[str]] = connection.execute("PRAGMA integrity_check").fetchall()
        return found == [("ok",)]
