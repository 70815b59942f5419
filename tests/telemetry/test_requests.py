"""The request log keeps exactly the last requests, for one process or several."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.telemetry.requests import RequestLog

ids = st.text(min_size=1, max_size=8)


@given(st.integers(1, 8), st.lists(st.tuples(ids, st.text(max_size=20)), max_size=40))
def test_the_log_holds_exactly_the_last_distinct_ids_up_to_its_capacity(
    capacity: int, finished: list[tuple[str, str]]
) -> None:
    log = RequestLog(capacity=capacity)
    model: dict[str, str] = {}
    for response_id, annotation in finished:
        log.remember(response_id, annotation)
        model[response_id] = annotation
        if len(model) > capacity:
            del model[next(iter(model))]
        assert len(log) == len(model)
    for response_id, _ in finished:
        assert log.find(response_id) == model.get(response_id)
    log.close()


def test_an_unknown_id_is_not_found() -> None:
    assert RequestLog().find("chatcmpl-1") is None


def test_a_log_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        RequestLog(capacity=0)


def _write(path: str, name: str, count: int) -> None:
    log = RequestLog(path)
    for number in range(count):
        while True:
            try:
                log.remember(f"{name}-{number}", f'{{"by":"{name}"}}')
                break
            except sqlite3.OperationalError:  # the other process held the lock for longer than the short wait
                continue
    log.close()


def test_processes_that_share_a_file_see_each_others_requests(tmp_path: Path) -> None:
    path = str(tmp_path / "requests.db")
    context = multiprocessing.get_context("spawn")
    RequestLog(path).close()
    writers = [context.Process(target=_write, args=(path, name, 200)) for name in ("first", "second")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    log = RequestLog(path)
    assert len(log) == 400
    assert all(log.find(f"{name}-{n}") == f'{{"by":"{name}"}}' for name in ("first", "second") for n in range(200))


def test_a_shared_file_keeps_its_capacity_over_both_writers(tmp_path: Path) -> None:
    first, second = RequestLog(tmp_path / "log.db", capacity=10), RequestLog(tmp_path / "log.db", capacity=10)
    for number in range(30):
        (first if number % 3 else second).remember(str(number), "{}")
    assert len(first) == len(second) == 10
    assert [n for n in range(30) if first.find(str(n))] == list(range(20, 30))


def test_a_database_that_cannot_be_written_raises_an_sqlite_error(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log.db")
    other = sqlite3.connect(tmp_path / "log.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        log.remember("a", "{}")
    other.rollback()
    log.remember("a", "{}")
    assert log.find("a") == "{}"


@given(st.lists(st.tuples(ids, st.text(max_size=20)), max_size=20), st.integers(0, 12))
def test_the_last_are_the_newest_first_each_with_the_time_it_first_came(
    finished: list[tuple[str, str]], most: int
) -> None:
    clock = iter(range(len(finished)))
    log = RequestLog(capacity=8, clock=lambda: float(next(clock)))
    model: dict[str, tuple[float, str]] = {}
    for at, (response_id, annotation) in enumerate(finished):
        log.remember(response_id, annotation)
        model[response_id] = (model.get(response_id, (float(at), ""))[0], annotation)
        if len(model) > 8:
            del model[next(iter(model))]
    assert log.last(most) == list(model.values())[::-1][:most]
    log.close()
