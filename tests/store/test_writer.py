"""SampleStore: what it took is committed or counted, and nothing that goes wrong with the file reaches its caller."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.store_kill import made_sample
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.store import writer
from llmco2_vllm.store.database import FILE_NAME, MIGRATIONS, connect, insert
from llmco2_vllm.store.file import StoreFile
from llmco2_vllm.store.reading import samples
from llmco2_vllm.store.writer import SampleStore
from tests.store.made import same, sound

TEN = [made_sample(number) for number in range(10)]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What our logger says; vLLM's own logging set-up keeps it from the root logger."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collector()
    logging.getLogger("vllm.llmco2").addHandler(handler)
    yield messages
    logging.getLogger("vllm.llmco2").removeHandler(handler)


@pytest.fixture
def slow_clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits only when a flush or the end asks for one."""
    monkeypatch.setattr(writer, "PERIOD_SECONDS", 3600.0)
    monkeypatch.setattr(writer, "MOST_PERIOD_SECONDS", 3600.0)


def append_all(store: SampleStore, numbers: range) -> None:
    for number in numbers:
        store.append(made_sample(number))


def stored(path: Path) -> list[int]:
    return [round(sample.began_epoch_seconds - 1.7e9) for sample in samples(path)]


def in_child(function: Callable[[], bool]) -> bool:
    """Whether a forked child says yes; one that hangs or fails says no."""
    pid = os.fork()
    if not pid:
        answer = 1
        try:
            answer = 0 if function() else 1
        finally:
            os._exit(answer)
    done = threading.Timer(60, os.kill, (pid, 9))
    done.start()
    _, status = os.waitpid(pid, 0)
    done.cancel()
    return status == 0


def test_what_was_flushed_is_in_the_file_and_the_state_says_so(tmp_path: Path, said: list[str]) -> None:
    store = SampleStore(tmp_path / "new" / "folder")
    assert store.state() == {
        "path": str(tmp_path / "new" / "folder" / FILE_NAME),
        "samples": None,
        "bytes": None,
        "waiting": 0,
        "dropped": 0,
        "failures": 0,
        "last_error": None,
        "active": True,
    }
    assert not (tmp_path / "new").exists()
    append_all(store, range(10))
    assert store.flush()
    assert all(map(same, samples(store.path), TEN))
    state = store.state()
    assert (state["samples"], state["waiting"], state["failures"]) == (10, 0, 0) and state["bytes"] > 1000
    store.close()
    assert not store.state()["active"] and not said


@pytest.mark.usefixtures("slow_clockwork")
def test_closing_commits_what_waits_and_later_samples_are_counted_as_dropped(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    append_all(store, range(10))
    store.close()
    store.close()
    append_all(store, range(10, 13))
    assert not list(tmp_path.glob("*-wal")) and store.state()["dropped"] == 3
    assert stored(tmp_path) == list(range(10))


def test_samples_are_committed_without_being_asked_for(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    append_all(store, range(3))
    while store.state()["waiting"]:  # ends by the time limit of the test
        threading.Event().wait(0.05)
    assert stored(tmp_path) == [0, 1, 2]
    store.close()


@pytest.mark.usefixtures("slow_clockwork")
def test_a_full_queue_drops_the_newest_and_counts_them(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, queue_samples=4)
    append_all(store, range(10))
    assert store.state()["waiting"] == 4 and store.state()["dropped"] == 6
    assert store.flush()
    append_all(store, range(10, 12))
    store.close()
    assert stored(tmp_path) == [0, 1, 2, 3, 10, 11]


@pytest.mark.usefixtures("slow_clockwork")
def test_several_threads_lose_nothing(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    threads = [threading.Thread(target=append_all, args=(store, range(50 * n, 50 * n + 50))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert sorted(stored(tmp_path)) == list(range(200)) and store.state()["dropped"] == 0


def test_a_locked_file_makes_nobody_wait_and_loses_nothing(tmp_path: Path, said: list[str]) -> None:
    connect(tmp_path / FILE_NAME).close()
    store = SampleStore(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        append_all(store, range(10))
        assert not store.flush(0.2) and store.state()["waiting"] == 10
        other.execute("ROLLBACK")
    assert store.flush(60)
    store.close()
    assert stored(tmp_path) == list(range(10)) and len(said) <= 1


@pytest.mark.parametrize("folder", ["file/below", "/proc/llmco2"])
def test_a_folder_that_cannot_be_made_is_said_once_and_the_samples_are_counted(
    tmp_path: Path, said: list[str], folder: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = SampleStore(tmp_path / folder, queue_samples=5)
    append_all(store, range(8))
    assert not store.flush() and not store.flush()
    state = store.state()
    assert (state["active"], state["waiting"], state["dropped"]) == (False, 5, 3)
    assert state["failures"] >= 2 and state["last_error"] and state["samples"] is None
    store.close()
    assert store.state()["dropped"] == 8
    assert len(said) == 1 and "samples cannot be stored in" in said[0] and "serving goes on" in said[0]


@pytest.mark.usefixtures("slow_clockwork")
def test_a_folder_that_is_read_only_is_said_once_and_tried_again(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    folder.chmod(0o555)
    for above in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        above.chmod(above.stat().st_mode | 0o011)

    def child() -> bool:
        if os.getuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        store = SampleStore(folder)
        append_all(store, range(5))
        refused = not store.flush() and not store.state()["active"] and len(said) == 1
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o777)
        healed = store.flush() and store.state()["active"] and store.state()["samples"] == 5
        store.close()
        return refused and healed

    assert in_child(child) and stored(folder) == list(range(5))


@pytest.mark.parametrize("damage", ["header", "pages"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, said: list[str], damage: str) -> None:
    file = tmp_path / FILE_NAME
    for earlier in (1, 2):
        with closing(connect(file)) as connection:
            insert(connection, TEN)
        content = file.read_bytes()
        broken = b"\xff" * len(content) if damage == "header" else content[:1024] + b"\xff" * (len(content) - 1024)
        file.write_bytes(broken)
        store = SampleStore(tmp_path)
        append_all(store, range(100, 103))
        assert store.flush() and store.state()["active"] and store.state()["failures"] == 1
        store.close()
        assert stored(tmp_path) == [100, 101, 102] and sound(file)
        assert (tmp_path / f"{FILE_NAME}.corrupt-{earlier}").read_bytes() == broken
        assert len(said) == earlier and f"{FILE_NAME}.corrupt-{earlier}; a new file was begun" in said[-1]
        file.unlink()


def test_a_damaged_file_that_another_process_has_replaced_is_not_set_aside_again(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(b"no database" * 1000)
    one, other = StoreFile(file, 1 << 30), StoreFile(file, 1 << 30)
    for holder in (one, other):
        with pytest.raises(sqlite3.DatabaseError, match="not a database"):
            holder.write(TEN)
    assert one.set_aside() == tmp_path / f"{FILE_NAME}.corrupt-1"
    assert other.set_aside() is None and not file.exists()
    assert one.write(TEN[:4])[:2] == (4, 4)
    assert other.set_aside() is None
    assert other.write(TEN)[:2] == (6, 10)
    one.close()
    other.close()
    assert stored(tmp_path) == list(range(10)) and len(list(tmp_path.glob("*.corrupt-*"))) == 1


def test_the_log_of_a_damaged_file_goes_with_it_and_is_not_played_into_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    with closing(connect(file)) as other:  # holds it open, so that SQLite leaves the log
        insert(other, TEN)
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with file.open("r+b") as damaged:
            damaged.seek(1024)
            damaged.write(b"\xff" * (file.stat().st_size - 1024))
        holder = StoreFile(file, 1 << 30)
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            holder.write([made_sample(10)])
        assert holder.set_aside() == tmp_path / f"{FILE_NAME}.corrupt-1"
        assert (tmp_path / f"{FILE_NAME}.corrupt-1-wal").exists()
        assert [path.name for path in tmp_path.iterdir() if "corrupt" not in path.name] == []
        assert holder.write(TEN)[:2] == (10, 10)
        holder.close()
    assert stored(tmp_path) == list(range(10)) and sound(file)


def test_a_store_whose_files_are_damaged_again_and_again_goes_off(tmp_path: Path, said: list[str]) -> None:
    store, junk = SampleStore(tmp_path), tmp_path / "junk"
    for number in range(writer.MOST_DAMAGED + 1):
        junk.write_bytes(b"no database" * 1000)
        junk.rename(store.path)
        for suffix in ("-wal", "-shm"):  # with its log it would be whole again
            store.path.with_name(FILE_NAME + suffix).unlink(missing_ok=True)
        store.append(made_sample(number))
        assert store.flush() == store.state()["active"] == (number < writer.MOST_DAMAGED)
    assert store.state()["failures"] == writer.MOST_DAMAGED + 2 and store.state()["dropped"] == 1
    store.close()
    assert len(list(tmp_path.glob("*.corrupt-*"))) == writer.MOST_DAMAGED and len(said) == 2


def test_a_file_of_a_newer_version_or_another_program_is_left_alone_and_the_store_is_off(
    tmp_path: Path, said: list[str]
) -> None:
    newer, foreign = tmp_path / "newer", tmp_path / "foreign"
    newer.mkdir()
    foreign.mkdir()
    connect(newer / FILE_NAME, (*MIGRATIONS, ())).close()
    with closing(sqlite3.connect(foreign / FILE_NAME)) as connection:
        connection.execute("CREATE TABLE samples (mine)")
    for number, folder in enumerate((newer, foreign), 1):
        before = (folder / FILE_NAME).read_bytes()
        store = SampleStore(folder)
        append_all(store, range(5))
        assert not store.flush()
        append_all(store, range(5, 8))
        state = store.state()
        assert (state["active"], state["waiting"], state["dropped"], state["failures"]) == (False, 0, 8, 1)
        store.close()
        assert (folder / FILE_NAME).read_bytes() == before
        assert len(said) == number and "choose another folder" in said[-1]


def test_what_is_no_sample_switches_the_store_off_and_goes_no_further(tmp_path: Path, said: list[str]) -> None:
    store = SampleStore(tmp_path)
    append_all(store, range(3))
    assert store.flush()
    store.append("the text of a prompt")  # type: ignore[arg-type]
    assert not store.flush()
    state = store.state()
    assert not state["active"] and state["dropped"] == 1 and stored(tmp_path) == [0, 1, 2]
    store.close()
    assert len(said) == 1 and "no longer stored" in said[0]
    assert "prompt" not in said[0] + state["last_error"]


def test_a_file_moved_or_removed_under_a_writer_is_begun_anew(tmp_path: Path, said: list[str]) -> None:
    store = SampleStore(tmp_path)
    append_all(store, range(5))
    assert store.flush()
    moved = tmp_path / "moved.sqlite"
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / (FILE_NAME + suffix)).rename(tmp_path / f"moved.sqlite{suffix}")
    append_all(store, range(5, 8))
    assert store.flush()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / (FILE_NAME + suffix)).unlink()
    append_all(store, range(8, 10))
    store.close()
    assert stored(moved) == list(range(5)) and stored(tmp_path) == [8, 9]
    assert sound(moved) and sound(store.path) and not said


def test_the_file_stays_within_its_capacity_and_rare_samples_stay_in_it(tmp_path: Path) -> None:
    capacity = 300_000
    store = SampleStore(tmp_path, capacity)
    steps = np.zeros((1, 14))
    steps[0, :8] = [1.0, 0.1, 30.0, 1, 4000, 8e6, 4000, 1]
    identity = ("h100-sxm", 1, "gpu", "nvml", "gnn/1", Topology(), "0f", 0, "vllm 0.32.0", "0.1.0")
    rare = writer.Sample(1.0, 1.0, 40.0, 1.0, 0.1, 8.0, 30.0, *identity, None, None, "", "1", steps)
    store.append(rare)
    for begin in range(0, 1000, 100):
        append_all(store, range(begin, begin + 100))
        assert store.flush()
        assert store.state()["bytes"] <= capacity
    store.close()
    found = list(samples(tmp_path))
    assert store.path.stat().st_size <= 1.5 * capacity and store.state()["bytes"] > 0.7 * capacity
    assert 50 < len(found) < 1001 and rare.content_key in {sample.content_key for sample in found}


@pytest.mark.parametrize(("name", "value", "least"), [("capacity_bytes", 1000, 65536), ("queue_samples", 0, 1)])
def test_an_impossible_size_is_named_with_what_is_allowed(tmp_path: Path, name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} is not possible; allowed: {least} or more"):
        SampleStore(tmp_path, **{name: value})


@pytest.mark.usefixtures("slow_clockwork")
def test_a_store_made_before_a_fork_works_in_both_processes(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)

    def child() -> bool:
        append_all(store, range(100, 110))
        written = store.flush() and store.state()["samples"] == 10
        store.close()
        return written

    store._lock.acquire()  # as another thread may at the moment of the fork
    answer = in_child(child)
    store._lock.release()
    assert answer
    append_all(store, range(10))
    store.close()
    assert sorted(stored(tmp_path)) == [*range(10), *range(100, 110)]


@pytest.mark.usefixtures("slow_clockwork")
def test_a_child_of_a_process_that_holds_the_file_open_stores_nothing_and_harms_nothing(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    append_all(store, range(5))
    assert store.flush()
    append_all(store, range(5, 8))

    def child() -> bool:
        append_all(store, range(100, 110))
        refused = not store.flush() and "forked from" in store.state()["last_error"]
        other = SampleStore(tmp_path)
        other.append(made_sample(200))
        refused &= not other.flush()
        store.close()
        return refused and store.state()["dropped"] == 10

    assert in_child(child)
    append_all(store, range(8, 10))
    store.close()
    assert stored(tmp_path) == list(range(10)) and sound(store.path)
