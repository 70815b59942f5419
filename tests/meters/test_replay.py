"""A recording is replayed as it was recorded; a file that cannot be used says where."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.meters.base import MeterUnavailableError
from llmco2_vllm.meters.replay import ReplayMeter
from llmco2_vllm.testing import FakeClock
from tests.meters.virtual import Bench, Steps, tiled


def recording(path: Path, seconds: float = 20.0, tick: float = 0.1) -> list[tuple[float, float]]:
    energy = Steps(seconds + 5)
    rows = [(1000 + k * tick, energy(1000 + k * tick)) for k in range(round(seconds / tick))]
    text = "time_seconds,energy_joules,power_watts\n" + "".join(f"{t:.6f},{e:.3f},400\n" for t, e in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return rows


@pytest.mark.parametrize("name", ["edges.csv", "edges.csv.gz"])
def test_the_sampler_finds_the_recorded_edges_and_energies(tmp_path: Path, name: str) -> None:
    rows = recording(tmp_path / name)
    bench = Bench()
    meter = bench.add(ReplayMeter(tmp_path / name, bench.clock))
    windows = bench.run(meter.end_seconds - bench.clock())
    steps = np.array([b[1] - a[1] for a, b in pairwise(rows)])
    assert tiled(windows) and {w.doubt for w in windows} == {Doubt.NONE}
    assert np.mean([np.abs(steps - (w.energy_joules or 0.0)).min() < 0.002 for w in windows]) > 0.95
    assert bench.state["tick_seconds"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_seconds,energy_joules\n1,2\n", "1 rows"),
        ("time_seconds,joules\n1,2\n2,3\n", "row 2: energy_joules=None"),
        ("time_seconds,energy_joules\n1,2\n2,x\n", "row 3: energy_joules='x'"),
        ("time_seconds,energy_joules\n1,2\n1,3\n", "row 3: time_seconds is not later"),
    ],
)
def test_a_file_that_is_no_recording_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "edges.csv").write_text(text)
    with pytest.raises(MeterUnavailableError, match=message):
        ReplayMeter(tmp_path / "edges.csv", FakeClock())


@pytest.mark.parametrize("name", ["absent.csv", "broken.csv.gz"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(MeterUnavailableError, match=name):
        ReplayMeter(tmp_path / name, FakeClock())
