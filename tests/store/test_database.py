"""The file: what goes in comes out, versions move forward whole or not at all, pruning follows coverage."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.store_kill import made_sample
from llmco2_vllm.core.coverage import cells
from llmco2_vllm.store import database, reading
from llmco2_vllm.store.database import KEPT_RATIO, MIGRATIONS, NAMES, UnsuitableFileError, connect, insert, prune
from llmco2_vllm.store.parquet import read_parquet, to_table, write_parquet
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample
from tests.store.made import SAMPLES, same, sound

TEN = [made_sample(number) for number in range(10)]


def filled(file: Path, samples: list[Sample]) -> Path:
    with closing(connect(file)) as connection:
        insert(connection, samples)
    return file


def rare(number: int) -> Sample:
    """A sample of one long prefill, unlike any made by number."""
    steps = np.zeros((1, len(STEP_COLUMNS)))
    steps[0, :8] = [1.0, 0.1, 30.0, 1, 4000, 8e6, 4000, 1]
    return replace(made_sample(number), steps=steps)


@given(st.lists(SAMPLES, max_size=6))
@settings(deadline=None, max_examples=60)
def test_what_was_stored_is_read_exactly_and_parquet_changes_nothing(samples: list[Sample]) -> None:
    wanted = list({sample.content_key: sample for sample in samples}.values())
    with TemporaryDirectory() as name:
        file = filled(Path(name) / "samples.sqlite", samples)
        found = list(reading.samples(file))
        assert len(found) == len(wanted) and all(map(same, found, wanted))
        exported = Path(name) / "samples.parquet"
        assert write_parquet(found, exported) == to_table(file).num_rows == len(wanted)
        assert all(map(same, read_parquet(exported), wanted))
        assert len(list(read_parquet(exported))) == len(wanted)


def test_columns_are_those_of_a_sample_and_no_other_text_has_a_place(tmp_path: Path) -> None:
    with closing(connect(tmp_path / "a.sqlite")) as connection:
        columns = {row[1]: row[2] for row in connection.execute("PRAGMA table_info(samples)")}
        assert [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == [
            "samples"
        ]
    regime = {name for name in columns if name.startswith("mean_")}
    assert columns.keys() == {"id", "content_key", *NAMES, "relative_error", *regime, "steps"} and len(regime) == 4
    texts = {name for name, kind in columns.items() if kind == "TEXT"}
    assert texts == {column.name for column in database.COLUMNS if column.kind is str}


def test_a_sample_given_again_is_stored_once(tmp_path: Path) -> None:
    with closing(connect(tmp_path / "a.sqlite")) as connection:
        assert insert(connection, TEN + TEN) == 10
        assert insert(connection, [*TEN, made_sample(10)]) == 1
        assert database.count(connection) == 11


def test_samples_are_read_in_order_with_numbers_and_by_choice(tmp_path: Path) -> None:
    doubtful = replace(TEN[4], doubt="device lost")
    file = filled(tmp_path / "a.sqlite", [*TEN[:4], doubtful, *TEN[5:]])
    assert [s.began_epoch_seconds for s in reading.samples(tmp_path / "a.sqlite")] == [1.7e9 + n for n in range(10)]
    assert len(list(reading.samples(file, trusted_only=True))) == 9
    assert len(list(reading.samples(file, since_epoch_seconds=1.7e9 + 8))) == 2
    last = reading.latest(file, 2)
    assert [stored.number for stored in last] == [9, 10] and same(last[1].sample, TEN[9])
    again = reading.sample(file, 5)
    assert again is not None and same(again, doubtful) and reading.sample(file, 99) is None


def test_a_reader_sees_what_a_writer_committed_and_hinders_nobody(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    with closing(connect(file)) as writer:
        insert(writer, TEN)
        found = reading.samples(file)
        next(found)
        insert(writer, [made_sample(10)])
        assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert len(list(found)) >= 9


def test_a_file_of_an_older_version_is_brought_up_to_date_and_keeps_its_samples(tmp_path: Path) -> None:
    file = filled(tmp_path / "a.sqlite", TEN)
    newer = (*MIGRATIONS, ("ALTER TABLE samples ADD COLUMN rack TEXT NOT NULL DEFAULT ''",), ("CREATE TABLE b (x)",))
    with closing(connect(file, newer)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 2,)
        assert connection.execute("SELECT COUNT(*), MAX(rack) FROM samples").fetchone() == (10, "")
        assert insert(connection, [*TEN, made_sample(10)]) == 1
    assert sound(file)


def test_a_migration_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    file = filled(tmp_path / "a.sqlite", TEN)
    broken = (*MIGRATIONS, ("ALTER TABLE samples ADD COLUMN rack TEXT", "DROP TABLE samples", "NOT SQL"))
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        connect(file, broken)
    assert all(map(same, reading.samples(file), TEN)) and len(list(reading.samples(file))) == 10
    with closing(connect(file)) as connection:
        assert "rack" not in {row[1] for row in connection.execute("PRAGMA table_info(samples)")}


def test_a_newer_or_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    newer, foreign = filled(tmp_path / "newer.sqlite", TEN), tmp_path / "foreign.sqlite"
    connect(newer, (*MIGRATIONS, ())).close()
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE samples (mine)")
    for file, message in ((newer, "version 2, this package reads up to 1"), (foreign, "a file of another program")):
        before = file.read_bytes()
        with pytest.raises(UnsuitableFileError, match=message):
            connect(file)
        with pytest.raises(UnsuitableFileError, match=message):
            list(reading.samples(file))
        assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 99])
def test_a_file_that_holds_no_samples_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.sqlite"
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(reading.samples(file))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.sqlite: ") as raised:
        list(reading.samples(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", range(4))
def test_pruning_brings_the_file_below_its_capacity_and_not_far_below(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples = [made_sample(int(number), seed) for number in draw.permutation(600)]
    with closing(connect(tmp_path / "a.sqlite")) as connection:
        insert(connection, samples)
        before = database.used_bytes(connection)
        assert prune(connection, before) == 0 and database.count(connection) == 600
        capacity = before // 2
        gone = prune(connection, capacity)
        assert gone and database.count(connection) == 600 - gone
        assert 0.7 * capacity < database.used_bytes(connection) <= capacity
        assert (tmp_path / "a.sqlite").stat().st_size <= before
    assert sound(tmp_path / "a.sqlite") and KEPT_RATIO < 1


def test_pruning_keeps_a_sample_of_every_cell_and_the_newest_of_it(tmp_path: Path) -> None:
    samples = [rare(0), rare(1), *(made_sample(number) for number in range(2, 600))]
    with closing(connect(tmp_path / "a.sqlite")) as connection:
        insert(connection, samples)
        prune(connection, database.used_bytes(connection) * 2 // 3)
    found = list(reading.samples(tmp_path / "a.sqlite"))
    kept = {sample.content_key for sample in found}
    cell = cells([sample.regime for sample in samples])
    newest = {int(number): sample for number, sample in zip(cell, samples, strict=True)}
    assert {sample.content_key for sample in newest.values()} <= kept and len(kept) < 600


def test_a_sample_in_doubt_goes_before_an_older_one_that_is_trusted(tmp_path: Path) -> None:
    like = [replace(TEN[0], began_epoch_seconds=1.0 + n, doubt="" if n % 2 else "device lost") for n in range(400)]
    with closing(connect(tmp_path / "a.sqlite")) as connection:
        insert(connection, like)
        prune(connection, database.used_bytes(connection) * 2 // 3)
        left = dict(connection.execute("SELECT doubt, COUNT(*) FROM samples GROUP BY doubt"))
    assert left[""] == 200 and 0 < left["device lost"] < 200


def test_a_file_larger_than_its_capacity_shrinks(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    with closing(connect(file)) as connection:
        insert(connection, [made_sample(number) for number in range(600)])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        before = file.stat().st_size
        prune(connection, before // 4)
    assert file.stat().st_size <= before // 4 and sound(file)
