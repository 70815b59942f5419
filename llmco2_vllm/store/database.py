"""The file of samples: its schema and migrations, and what is done inside it. SQLite, standard library.

One table, one row a sample: identities and joules as columns, ``steps`` a deflated array (store/sample.py). WAL mode
with ``synchronous=NORMAL``: what was committed survives any end of the process; a power cut may take the last commits
but never harms the file. The file belongs on a local disk, as WAL does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.coverage import worth_keeping
from llmco2_vllm.store.sample import COLUMNS, Sample, pack_steps

FILE_NAME: Final = "samples.sqlite"
# "llmc": tells our files from other programs'.
APPLICATION_ID: Final = 0x6C6C6D63
# What turns a file of version n into n + 1; an empty file is version 0. Written out, since it must never change.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY,
            content_key BLOB NOT NULL UNIQUE,
            began_epoch_seconds REAL NOT NULL,
            duration_seconds REAL NOT NULL,
            energy_joules REAL NOT NULL,
            sigma_joules REAL NOT NULL,
            idle_seconds REAL NOT NULL,
            idle_joules REAL,
            predicted_joules REAL,
            device TEXT NOT NULL,
            devices INTEGER NOT NULL,
            scope TEXT NOT NULL,
            meter TEXT NOT NULL,
            predictor TEXT NOT NULL,
            tensor_parallel INTEGER NOT NULL,
            pipeline_parallel INTEGER NOT NULL,
            data_parallel INTEGER NOT NULL,
            expert_parallel INTEGER NOT NULL,
            model_fingerprint TEXT NOT NULL,
            engine INTEGER NOT NULL,
            engine_version TEXT NOT NULL,
            package_version TEXT NOT NULL,
            sm_clock_mhz REAL,
            temperature_celsius REAL,
            doubt TEXT NOT NULL,
            feature_version TEXT NOT NULL,
            relative_error REAL,
            mean_prefill_sequences REAL NOT NULL,
            mean_prefill_tokens REAL NOT NULL,
            mean_decode_sequences REAL NOT NULL,
            mean_context_tokens REAL NOT NULL,
            steps BLOB NOT NULL
        )""",
    ),
)
NAMES: Final = tuple(column.name for column in COLUMNS)
_REGIME = ("mean_prefill_sequences", "mean_prefill_tokens", "mean_decode_sequences", "mean_context_tokens")
_WRITTEN = ("content_key", *NAMES, "relative_error", *_REGIME, "steps")
_INSERT = (
    f"INSERT INTO samples ({', '.join(_WRITTEN)}) VALUES ({', '.join('?' * len(_WRITTEN))}) "
    "ON CONFLICT (content_key) DO NOTHING"
)
# Room made at once, so that pruning is rare.
KEPT_RATIO = 7 / 8
# A row beside its steps, about; only the proportion to them matters.
_ROW_BYTES = 400
BUSY_SECONDS = 5.0
_WAL_BYTES = 4 << 20
_ROWS_AT_ONCE = 1000


class UnsuitableFileError(ValueError):
    """A file that is to be left as it is: of a newer version, or of another program."""


def connect(path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> sqlite3.Connection:
    """Open the file for writing; make or migrate it as needed.

    Raises UnsuitableFileError, and sqlite3.Error when it cannot be opened or is damaged.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        version = checked_version(connection, path, len(migrations))
        if not version:
            # Heeded before there is a table. A window of a second takes 2 to 3 KB: of pages smaller than that most
            # belong to one sample alone and are free when it goes, those shared by several would stay half empty.
            connection.execute("PRAGMA page_size = 1024")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_BYTES // 1024}").fetchall()
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}").fetchall()
        if version < len(migrations):
            _migrate(connection, path, migrations)
    except BaseException:
        connection.close()
        raise
    return connection


def checked_version(connection: sqlite3.Connection, path: Path, newest: int = len(MIGRATIONS)) -> int:
    """Version of an open file, 0 when it is empty. Raises UnsuitableFileError, and sqlite3.Error when it is damaged."""
    version, application, tables = (
        _number(connection, question)
        for question in ("PRAGMA user_version", "PRAGMA application_id", "SELECT COUNT(*) FROM sqlite_master")
    )
    if application != APPLICATION_ID and (tables or version or application):
        raise UnsuitableFileError(f"{path}: a file of another program; choose another folder")
    if version > newest:
        raise UnsuitableFileError(
            f"{path}: version {version}, this package reads up to {newest}; upgrade it or choose another folder"
        )
    return version


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]) -> None:
    # All or nothing: the version is part of the transaction.
    with transaction(connection):
        for statements in migrations[checked_version(connection, path, len(migrations)) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what happens inside, or none of it. The write lock is taken first, so that reading cannot be outdated."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk may have rolled back already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def insert(connection: sqlite3.Connection, samples: Sequence[Sample]) -> int:
    """Commit samples, leaving out those the file holds already; how many were new. Raises sqlite3.Error."""
    rows = [(s.content_key, *s.values, s.relative_error, *s.regime, pack_steps(s.steps)) for s in samples]
    with transaction(connection):
        before = connection.total_changes
        connection.executemany(_INSERT, rows)
        return connection.total_changes - before


def count(connection: sqlite3.Connection) -> int:
    """Samples in the file."""
    return _number(connection, "SELECT COUNT(*) FROM samples")


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the file that hold something; pages that were freed are filled again before it grows."""
    pages = _number(connection, "PRAGMA page_count") - _number(connection, "PRAGMA freelist_count")
    return pages * _number(connection, "PRAGMA page_size")


def prune(connection: sqlite3.Connection, capacity_bytes: int) -> int:
    """Bring a file above its capacity to 7/8 of it by coverage; how many samples went. Raises sqlite3.Error.

    Samples in doubt count as older than any other. A file within its capacity is left as it is.
    """
    with transaction(connection):
        used = used_bytes(connection)
        if used <= capacity_bytes:
            return 0
        table = _regimes(connection)
        if not len(table):
            return 0
        sizes = table[:, 1] + _ROW_BYTES
        room = KEPT_RATIO * capacity_bytes * sizes.sum() / used
        kept = worth_keeping(table[:, 3:], table[:, 2], room, sizes)
        gone = [(int(number),) for number in table[~kept, 0]]
        connection.executemany("DELETE FROM samples WHERE id = ?", gone)
    # Only a file larger than it may be gives pages back; others use them again.
    if _number(connection, "PRAGMA page_count") * _number(connection, "PRAGMA page_size") > capacity_bytes:
        # A script is stepped to its end, which a statement without columns is not.
        connection.executescript("PRAGMA incremental_vacuum")
    return len(gone)


def _regimes(connection: sqlite3.Connection) -> NDArray[np.float64]:
    """Number, size of the steps, error (NaN if unknown) and regime of all samples, shape (n, 7), oldest first."""
    rows = connection.execute(
        f"SELECT id, length(steps), relative_error, {', '.join(_REGIME)} FROM samples "
        "ORDER BY doubt = '', began_epoch_seconds, id"
    )
    # In pieces: turning all of it into an array at once would hold up every other thread.
    parts = [np.zeros((0, 3 + len(_REGIME)))]
    while piece := rows.fetchmany(_ROWS_AT_ONCE):
        parts.append(np.array(piece, dtype=np.float64))
    return np.concatenate(parts)


def _number(connection: sqlite3.Connection, question: str) -> int:
    return int(connection.execute(question).fetchone()[0])
