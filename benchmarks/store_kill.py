"""Whether the sample store keeps its word when its writers are killed: kill -9 at random moments, many times.

    python -m benchmarks.store_kill [--rounds 200] [--seed 0] [--json]

Each round starts two processes that write samples to one folder and say which of them the store has committed, kills
both after a random time, now and then before the file is whole, and checks: SQLite finds the file sound, every sample
said to be committed is there, and all that is there is what was written. Every other round goes on with the
file of the round before. Ends with status 1 when a round fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.store.database import FILE_NAME
from llmco2_vllm.store.reading import samples
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample
from llmco2_vllm.store.writer import SampleStore

ROOT = Path(__file__).resolve().parent.parent
_MOST_AT_ONCE, _MOST_STEPS = 30, 200
# Longest life of a writer after its first words.
_LIFE_SECONDS = 0.4


class Round(NamedTuple):
    """What a round found. committed: samples said to be; missing: of these; wrong: samples nobody wrote."""

    committed: int
    stored: int
    missing: int
    wrong: int
    sound: bool

    @property
    def kept(self) -> bool:
        """Whether the store kept its word."""
        return self.sound and not self.missing and not self.wrong


def made_sample(number: int, engine: int = 0) -> Sample:
    """A sample that its number and engine say all about: a decode batch of up to 200 steps."""
    draw = np.random.default_rng([number, engine])
    steps = np.zeros((int(draw.integers(0, _MOST_STEPS)), len(STEP_COLUMNS)))
    column = {name: steps[:, index] for index, name in enumerate(STEP_COLUMNS)}
    running = int(draw.integers(1, 200))
    column["window_share"][:] = 1.0
    column["duration_seconds"][:] = draw.uniform(0.005, 0.02, len(steps))
    column["predicted_joules"][:] = draw.uniform(1, 5, len(steps))
    for name in ("decode_sequences", "decode_tokens", "decode_samples"):
        column[name][:] = running
    column["decode_pairs"][:] = column["decode_kv_tokens"][:] = running * (1000 + np.arange(len(steps)))
    predicted, metered = float(column["predicted_joules"].sum()), float(draw.uniform(100, 400))
    identity = ("h100-sxm", 1, "gpu", "nvml", "gnn/1", Topology(), "0f" * 16, engine, "vllm 0.32.0", "0.1.0")
    return Sample(1.7e9 + number, 1.0, metered, 1.0, 0.1, 8.0, predicted, *identity, None, 55.0, "", "1", steps)


def write(folder: Path, engine: int) -> None:
    """Store samples 0, 1, 2 ... of an engine until killed; print how many are committed."""
    store, draw, number = SampleStore(folder), np.random.default_rng(engine), 0
    ready = [made_sample(n, engine) for n in range(_MOST_AT_ONCE)]
    os.write(1, b"0\n")
    while True:
        for _ in range(int(draw.integers(1, _MOST_AT_ONCE))):
            store.append(ready[number] if number < len(ready) else made_sample(number, engine))
            number += 1
        if store.flush(60):
            os.write(1, b"%d\n" % number)


def one_round(folder: Path, engines: tuple[int, ...], seconds: float) -> Round:
    """Let writers live for so long, kill them, and look at what they left."""
    command = [sys.executable, "-m", "benchmarks.store_kill", "--folder", str(folder), "--engine"]
    writers = [
        subprocess.Popen([*command, str(engine)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for engine in engines
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "0\n", "the writer did not start"
    time.sleep(seconds)
    for writer in writers:
        writer.kill()
    said = [writer.communicate()[0] for writer in writers]
    # The last line may be cut off.
    committed = [int(text.rpartition("\n")[0].rpartition("\n")[2] or 0) for text in said]
    return examine(folder, dict(zip(engines, committed, strict=True)))


def examine(folder: Path, committed: dict[int, int]) -> Round:
    """Compare the file with what was said to be committed: so many samples of each engine."""
    wanted = {made_sample(number, engine).content_key for engine, n in committed.items() for number in range(n)}
    if not (folder / FILE_NAME).exists():
        return Round(len(wanted), 0, len(wanted), 0, not wanted)
    with closing(sqlite3.connect(folder / FILE_NAME)) as connection:
        sound = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    found = list(samples(folder)) if version else []
    wrong = sum(made_sample(round(s.began_epoch_seconds - 1.7e9), s.engine).content_key != s.content_key for s in found)
    present = {sample.content_key for sample in found}
    return Round(len(wanted), len(found), len(wanted - present), wrong + len(found) - len(present), sound)


def rounds(number: int, seed: int) -> list[Round]:
    """So many rounds; every other one in a new folder."""
    draw, found = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as name:
        for index in range(number):
            folder = Path(name) / str(index // 2)
            found.append(one_round(folder, (2 * index, 2 * index + 1), float(draw.uniform(0, _LIFE_SECONDS))))
    return found


def append_microseconds(calls: int = 2000) -> dict[str, float]:
    """What ``append`` takes its caller, with a writer thread at work: median and 99th percentile."""
    ready, times = [made_sample(number) for number in range(calls)], []
    with tempfile.TemporaryDirectory() as name:
        store = SampleStore(Path(name), queue_samples=calls)
        for sample in ready:
            begin = time.perf_counter_ns()
            store.append(sample)
            times.append((time.perf_counter_ns() - begin) / 1e3)
            time.sleep(0.0005)
        store.close()
    times.sort()
    return {"append_p50_us": round(times[calls // 2], 2), "append_p99_us": round(times[int(0.99 * calls)], 2)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        write(arguments.folder, arguments.engine)
    found = rounds(arguments.rounds, arguments.seed)
    document = {
        "rounds": len(found),
        "kept": sum(one.kept for one in found),
        "committed": sum(one.committed for one in found),
        "missing": sum(one.missing for one in found),
        "wrong": sum(one.wrong for one in found),
        "unsound": sum(not one.sound for one in found),
        "rounds_killed_before_a_commit": sum(not one.committed for one in found),
        **append_microseconds(),
    }
    print(json.dumps(document) if arguments.json else "\n".join(f"{k}={v}" for k, v in document.items()))
    raise SystemExit(0 if document["kept"] == len(found) else 1)


if __name__ == "__main__":
    main()
