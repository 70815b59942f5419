"""One file of samples as its writer holds it: opened when needed, opened anew when moved, set aside when damaged.

Several processes may write the same file. SQLite's locks order their commits; a lock on the folder orders what SQLite
does not know of: making, migrating and setting aside. SQLite's state does not survive a fork, so a process
whose parent held the file open refuses to open it again.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llmco2_vllm.store.database import UnsuitableFileError, connect, count, insert, prune, used_bytes
from llmco2_vllm.store.sample import Sample

Identity = tuple[int, int]
# Process that opened each file, by device and inode; what a fork copies of it is the parent's.
_OPENED: dict[Identity, int] = {}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Contents(NamedTuple):
    """What a file holds after a commit: samples, and the bytes they fill. added: samples that were not there before."""

    added: int
    samples: int
    used_bytes: int


class StoreFile:
    """The file at ``path``. To be used by one thread. Raises sqlite3.Error and OSError as they come."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.path = path
        self._capacity_bytes = capacity_bytes
        self._connection: sqlite3.Connection | None = None
        self._identity: Identity | None = None

    def write(self, samples: Sequence[Sample]) -> Contents:
        """Commit the samples, those already there once; then prune a file above its capacity.

        Raises UnsuitableFileError too. Samples may be given again after a failure.
        """
        if self._connection is not None and _identity(self.path) != self._identity:
            self.close()  # moved or removed under our hands
        connection = self._connection or self._open()
        added = insert(connection, samples)
        while used_bytes(connection) > self._capacity_bytes and prune(connection, self._capacity_bytes):
            pass  # pages do not empty in proportion to what was in them
        return Contents(added, count(connection), used_bytes(connection))

    def close(self) -> None:
        """Let go of the file; the next write opens it again. Does not raise."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:
                return  # damaged: what was committed is in the file or its log
            _OPENED.pop(self._identity or (0, 0), None)

    def set_aside(self) -> Path | None:
        """Rename the damaged file to ``*.corrupt-N``; None when another process has replaced it already."""
        self.close()
        with folder_lock(self.path.parent):
            if self._identity is None or _identity(self.path) != self._identity:
                return None
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.corrupt-{number}")).exists():
                number += 1
            # The log first: beside a new file of the old name it would be played into that.
            for suffix in ("-wal", "-shm", ""):
                source = self.path.with_name(self.path.name + suffix)
                if source.exists():
                    source.rename(aside.with_name(aside.name + suffix))
            return aside

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.path.parent):
            self._identity = _identity(self.path)
            if self._identity and _OPENED.get(self._identity, os.getpid()) != os.getpid():
                raise UnsuitableFileError(f"{self.path}: held open by the process this one was forked from")
            connection = connect(self.path)
            self._identity = _identity(self.path)
        if self._identity is not None:
            _OPENED[self._identity] = os.getpid()
        self._connection = connection
        return connection


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error says that the file's content is broken, rather than its disk or its locks."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time, among those that ask; gone with its holder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
