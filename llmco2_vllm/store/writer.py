"""SampleStore: what the engine hands its samples to. Its failures end here.

``append`` puts a sample on a bounded queue; one thread commits what is there every half second. A sample leaves the
queue only after its commit, so a failure that passes (a full disk, a lock held too long) loses none until the
queue is full; then the newest are dropped and counted. After a failure the thread tries again at
growing intervals. The store is off for good when the file is of a newer version or another program's, is damaged
again and again, or our own code fails.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections import deque
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Final

from llmco2_vllm.store.database import FILE_NAME, UnsuitableFileError
from llmco2_vllm.store.file import Contents, StoreFile, is_damage
from llmco2_vllm.store.sample import Sample

logger = logging.getLogger("vllm.llmco2")
CAPACITY_BYTES: Final = 256 << 20
LEAST_CAPACITY_BYTES: Final = 1 << 16
# Samples that wait for their commit: at two a second, some minutes of a disk that is full.
QUEUE_SAMPLES: Final = 1024
PERIOD_SECONDS: Final = 0.5
MOST_PERIOD_SECONDS: Final = 60.0
# Damaged files set aside by one process before it believes the disk to be at fault.
MOST_DAMAGED: Final = 3


class _Mark:
    """Set after the next attempt to commit; ``committed`` says how that went."""

    def __init__(self) -> None:
        self.done = Event()
        self.committed = False


class SampleStore:
    """Samples of one engine, kept in ``folder`` beside those of other engines of the host.

    Nothing is opened before the first ``append``, and after a fork a child begins anew: what waited belongs to the
    parent. A child forked while its parent's file was open stores nothing.
    """

    def __init__(self, folder: Path, capacity_bytes: int = CAPACITY_BYTES, queue_samples: int = QUEUE_SAMPLES) -> None:
        for name, value, least in (
            ("capacity_bytes", capacity_bytes, LEAST_CAPACITY_BYTES),
            ("queue_samples", queue_samples, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value!r} is not possible; allowed: {least} or more")
        self.path = Path(folder) / FILE_NAME
        self._capacity_bytes, self._queue_samples = capacity_bytes, queue_samples
        self._begin()

    def _begin(self) -> None:
        """The state of this process."""
        self._owner = os.getpid()
        self._lock = Lock()  # held for moments alone, never during a commit
        self._wake = Event()
        self._queue: deque[Sample] = deque()
        self._marks: list[_Mark] = []
        self._thread: Thread | None = None
        self._contents: Contents | None = None
        self._dropped = self._failures = self._damaged = 0
        self._last_error: str | None = None
        self._failing = self._off = self._closing = False
        self._said: set[str] = set()

    def _claim(self) -> None:
        # A lock copied by a fork may be held by a thread that is not there.
        if self._owner != os.getpid():
            self._begin()

    def append(self, sample: Sample) -> None:
        """Have a sample committed within a second. Neither waits for the disk nor raises."""
        try:
            self._claim()
            with self._lock:
                if self._off or self._closing or len(self._queue) >= self._queue_samples:
                    self._dropped += 1
                    return
                self._queue.append(sample)
                if self._thread is None:
                    thread = Thread(target=self._run, name="llmco2-samples", daemon=True)
                    thread.start()
                    self._thread = thread
        except Exception as error:
            self._switch_off(error)

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        """Wait for a commit; whether all that was appended before, and not dropped, is in the file."""
        self._claim()
        with self._lock:
            if not self._queue:
                return not self._off
            mark = _Mark()
            self._marks.append(mark)
        self._wake.set()
        mark.done.wait(timeout_seconds)
        return mark.committed

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Commit what waits and let go of the file; what cannot be committed is dropped. Does not raise."""
        self._claim()
        with self._lock:
            self._closing = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(timeout_seconds)
        with self._lock:
            self._drop_queue()

    def state(self) -> dict[str, Any]:
        """What there is to know for ``GET /carbon``; None is not known yet. active: commits work, as far as known."""
        self._claim()
        contents = self._contents
        return {
            "path": str(self.path),
            "samples": None if contents is None else contents.samples,
            "bytes": None if contents is None else contents.used_bytes,
            "waiting": len(self._queue),
            "dropped": self._dropped,
            "failures": self._failures,
            "last_error": self._last_error,
            "active": not (self._off or self._failing or self._closing),
        }

    # -- the writer thread ----------------------------------------------------------------

    def _run(self) -> None:
        file = StoreFile(self.path, self._capacity_bytes)
        try:
            self._commit_until_closed(file)
        except Exception as error:
            self._switch_off(error)
        finally:
            file.close()

    def _commit_until_closed(self, file: StoreFile) -> None:
        period = PERIOD_SECONDS
        while not self._off:
            self._wake.wait(period)
            self._wake.clear()
            closing = self._closing
            committed = self._attempt(file)
            if closing:
                return
            period = PERIOD_SECONDS if committed else min(2 * period, MOST_PERIOD_SECONDS)

    def _attempt(self, file: StoreFile) -> bool:
        """Commit what waits now; whether that went well."""
        with self._lock:
            batch, marks, self._marks = list(self._queue), self._marks, []
        committed = False
        try:
            committed = not batch or self._commit(file, batch)
        finally:
            with self._lock:
                for _ in range(min(len(batch), len(self._queue)) if committed else 0):
                    self._queue.popleft()
            for mark in marks:
                mark.committed = committed
                mark.done.set()
        return committed

    def _commit(self, file: StoreFile, batch: list[Sample]) -> bool:
        while True:
            try:
                self._contents = file.write(batch)
                self._failing = False
                return True
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    self._fail(file, error)
                    return False
                if not self._replace(file, error):
                    return False
            except OSError as error:
                self._fail(file, error)
                return False
            except UnsuitableFileError as error:
                self._switch_off(error)
                return False

    def _replace(self, file: StoreFile, error: sqlite3.Error) -> bool:
        """Set a damaged file aside; whether to try again with a new one."""
        self._count(error)
        self._damaged += 1
        if self._damaged > MOST_DAMAGED:
            self._switch_off(error)
            return False
        try:
            aside = file.set_aside()
        except OSError as failure:
            self._fail(file, failure)
            return False
        if aside is not None:
            self._say("damaged", f"{self.path} is damaged ({error}) and now {aside.name}; a new file was begun")
        return True

    def _fail(self, file: StoreFile, error: Exception) -> None:
        """A failure that may pass."""
        # Errors of the code, not of the disk, come as these too.
        if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.OperationalError):
            self._switch_off(error)
            return
        file.close()
        self._count(error)
        self._failing = True
        self._say("failing", f"samples cannot be stored in {self.path} ({error}); serving goes on, so do attempts")

    def _switch_off(self, error: Exception) -> None:
        self._count(error)
        self._off = True
        with self._lock:
            self._drop_queue()
        self._say("off", f"samples are no longer stored ({type(error).__name__}: {error}); serving goes on")

    def _drop_queue(self) -> None:
        self._dropped += len(self._queue)
        self._queue.clear()
        for mark in self._marks:
            mark.done.set()
        self._marks.clear()

    def _count(self, error: Exception) -> None:
        self._failures += 1
        self._last_error = f"{type(error).__name__}: {error}"

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.error("llmco2: %s", message)
