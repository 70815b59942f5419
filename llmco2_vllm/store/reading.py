"""Reading samples, beside a running writer or from a file that was copied."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from llmco2_vllm.store.database import BUSY_SECONDS, FILE_NAME, MIGRATIONS, NAMES, checked_version
from llmco2_vllm.store.sample import Sample, unpack_steps

_ROWS = 256
_SELECT = f"SELECT id, {', '.join(NAMES)}, steps FROM samples"


class Stored(NamedTuple):
    """A sample and its number in the file."""

    number: int
    sample: Sample


def store_path(path: Path) -> Path:
    """The file itself, or the one inside a folder of samples."""
    return path / FILE_NAME if path.is_dir() else path


def samples(path: Path, trusted_only: bool = False, since_epoch_seconds: float = 0.0) -> Iterator[Sample]:
    """Samples of a file or folder in the order they were stored; trusted_only leaves out those in doubt.

    No transaction is held between them, so that a slow reader does not keep the writer's log from being folded in;
    samples that come or go meanwhile may or may not be among them. Raises FileNotFoundError, and ValueError with one
    line when the file cannot be read.
    """
    condition = "id > ? AND began_epoch_seconds >= ?" + (" AND doubt = ''" if trusted_only else "")
    with reading(path) as connection:
        last = 0
        while True:
            rows = connection.execute(
                f"{_SELECT} WHERE {condition} ORDER BY id LIMIT {_ROWS}", (last, since_epoch_seconds)
            ).fetchall()
            if not rows:
                return
            for row in rows:
                yield _stored(row).sample
            last = rows[-1][0]


def latest(path: Path, most: int) -> list[Stored]:
    """The last samples stored, oldest first. Raises as ``samples``."""
    with reading(path) as connection:
        rows = connection.execute(f"{_SELECT} ORDER BY id DESC LIMIT ?", (most,)).fetchall()
        return [_stored(row) for row in reversed(rows)]


def sample(path: Path, number: int) -> Sample | None:
    """One sample by its number; None when the file holds no such. Raises as ``samples``."""
    with reading(path) as connection:
        row = connection.execute(f"{_SELECT} WHERE id = ?", (number,)).fetchone()
        return None if row is None else _stored(row).sample


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write. Raises as ``samples``, inside the block too."""
    file = store_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; samples are stored there while a meter is open")
    try:
        with closing(sqlite3.connect(_address(file), uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as found:
            version = checked_version(found, file)
            if version < len(MIGRATIONS):
                raise ValueError(f"{file}: version {version}, to be read once a writer has brought it up to date")
            yield found
    except sqlite3.Error as error:
        raise ValueError(f"{file}: not readable as samples ({error})") from None


def _address(file: Path) -> str:
    address = f"file:{quote(str(file.absolute()))}?mode=ro"
    log = file.with_name(f"{file.name}-wal")
    # Beside a file in a folder that is read-only SQLite cannot put its index of the log; without a log it needs none.
    unwatched = not os.access(file.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    return f"{address}&immutable=1" if unwatched else address


def _stored(row: tuple[Any, ...]) -> Stored:
    number, *values, steps = row
    try:
        return Stored(number, Sample.from_values(values, unpack_steps(steps)))
    except ValueError as error:
        raise ValueError(f"sample {number}: {error}") from None
