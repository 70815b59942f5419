"""The store among processes: several writers, writers that are killed, and a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.store_kill import examine, made_sample, rounds
from llmco2_vllm.store.database import FILE_NAME
from llmco2_vllm.store.reading import samples
from tests.store.made import sound

ROOT = Path(__file__).resolve().parents[2]
# Stores 300 samples of one engine, in bursts, and says how the store stands.
WRITER = """
import json, sys, pathlib
from benchmarks.store_kill import made_sample
from llmco2_vllm.store.writer import SampleStore
ready = [made_sample(number, int(sys.argv[2])) for number in range(300)]
print("ready", flush=True); sys.stdin.readline()
store = SampleStore(pathlib.Path(sys.argv[1]))
for number, sample in enumerate(ready):
    store.append(sample)
    if number % 20 == 19: store.flush(60)
store.close(60)
print(json.dumps(store.state()))
"""
# Stores samples on a disk that takes no more, then on one that has room again.
FULL = """
import json, os, resource, sys, pathlib
from benchmarks.store_kill import made_sample
from llmco2_vllm.store.writer import SampleStore
store = SampleStore(pathlib.Path(sys.argv[1]), queue_samples=100)
states = []
def stored(numbers):
    for number in numbers: store.append(made_sample(number))
    states.append({"flushed": store.flush(60), **store.state()})
stored(range(50))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
written = sum(file.stat().st_size for file in pathlib.Path(sys.argv[1]).iterdir() if "shm" not in file.name)
resource.setrlimit(resource.RLIMIT_FSIZE, (written // 2, most))
stored(range(50, 200))
stored(range(200, 210))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
stored(range(300, 310))
stored(range(310, 320))
store.close()
print(json.dumps(states))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_write_one_file_at_once_lose_nothing_even_if_it_is_damaged(
    tmp_path: Path, damaged: bool
) -> None:
    if damaged:
        (tmp_path / FILE_NAME).write_bytes(b"no database" * 1000)
    writers = [start(WRITER, tmp_path, engine) for engine in range(3)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    states = [json.loads(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [state["dropped"] for state in states] == [0, 0, 0]
    assert examine(tmp_path, dict.fromkeys(range(3), 300)).kept and len(list(samples(tmp_path))) == 900
    assert len(list(tmp_path.glob("*.corrupt-*"))) == damaged


def test_what_was_committed_survives_writers_killed_at_random_moments() -> None:
    found = rounds(10, seed=7)
    assert all(one.kept for one in found), found
    assert sum(one.committed for one in found) > 0


def test_a_full_disk_loses_nothing_committed_and_once_there_is_room_takes_what_waited(tmp_path: Path) -> None:
    child = start(FULL, tmp_path)
    answer, said = child.communicate(timeout=120)
    before, full, still, healed, after = json.loads(answer)
    assert before["flushed"] and before["samples"] == 50
    assert not full["flushed"] and not full["active"] and full["failures"] >= 1 and full["last_error"]
    assert full["waiting"] == 100 and full["dropped"] == 50 and still["dropped"] == 60
    assert healed["flushed"] and healed["active"] and healed["samples"] == 150 and healed["dropped"] == 70
    assert after["samples"] == 160 and after["waiting"] == 0
    assert said.count("samples cannot be stored") == 1
    wanted = [made_sample(number).content_key for number in (*range(150), *range(310, 320))]
    assert [sample.content_key for sample in samples(tmp_path)] == wanted and sound(tmp_path / FILE_NAME)
