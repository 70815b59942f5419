"""The last finished requests by response id, for ``GET /carbon/requests/{id}``."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from os import PathLike, fspath

CAPACITY = 10_000
OPEN_TIMEOUT_SECONDS = 5.0  # API servers start together and one of them sets up the file
BUSY_TIMEOUT_MILLISECONDS = 20  # later it is an event loop that waits
_TABLE = """
CREATE TABLE IF NOT EXISTS responses (
    sequence INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    finished_epoch_seconds REAL NOT NULL,
    annotation TEXT NOT NULL
)"""


class RequestLog:
    """Annotations of the last ``capacity`` finished requests in SQLite.

    One API server keeps them in memory; several share a file. It is a cache, so nothing is synced to disk
    and a writer gives up after a short wait for another one. Open it in the process that uses it
    (SQLite connections do not survive a fork) and call it from one thread at a time.
    Every method raises sqlite3.Error when the database cannot be used.
    """

    def __init__(
        self,
        path: str | PathLike[str] = ":memory:",
        capacity: int = CAPACITY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a log keeps at least one request")
        self._capacity, self._clock = capacity, clock
        self._database = sqlite3.connect(fspath(path), timeout=OPEN_TIMEOUT_SECONDS, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = OFF")
        with self._database:
            self._database.execute(_TABLE)
        self._database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MILLISECONDS}")

    def remember(self, response_id: str, annotation_json: str) -> None:
        """Keep the annotation of a finished request; a known id takes the newer one in its old place and time."""
        with self._database:
            self._database.execute(
                "INSERT INTO responses (id, finished_epoch_seconds, annotation) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET annotation = excluded.annotation",
                (response_id, self._clock(), annotation_json),
            )
            # Rows only ever leave at the old end, so sequences have no gaps and this keeps exactly `capacity`.
            self._database.execute(
                "DELETE FROM responses WHERE sequence <= (SELECT MAX(sequence) FROM responses) - ?", (self._capacity,)
            )

    def find(self, response_id: str) -> str | None:
        """The annotation JSON kept for this response id, None when unknown or pushed out by newer ones."""
        row = self._database.execute("SELECT annotation FROM responses WHERE id = ?", (response_id,)).fetchone()
        return None if row is None else str(row[0])

    def last(self, most: int) -> list[tuple[float, str]]:
        """Epoch seconds and annotation JSON of the requests that finished last, newest first, ``most`` at most."""
        return self._database.execute(
            "SELECT finished_epoch_seconds, annotation FROM responses ORDER BY sequence DESC LIMIT ?", (most,)
        ).fetchall()

    def __len__(self) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM responses").fetchone()[0])

    def close(self) -> None:
        """Close the database; the log cannot be used afterwards."""
        self._database.close()
