"""Time series of a user: CSV (gzip or not) or Parquet with one row for each hour, half-hour, ...

The time column is ``datetime_utc``, ``datetime`` (ISO 8601; UTC unless it says otherwise) or ``epoch_seconds``, the
begin of the row's stretch. The value column, g CO2e/kWh, is ``grams_per_kwh`` or the zone's name: one file may hold
many zones side by side. A column ``estimated`` (true, false, 1, 0) is read when there. An empty value is unknown.
"""

from __future__ import annotations

import asyncio
import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind, check_grams
from llmco2_vllm.grid.history import History

TIME_COLUMNS = ("datetime_utc", "datetime", "epoch_seconds")
VALUE_COLUMN = "grams_per_kwh"
ESTIMATED_COLUMN = "estimated"
CHECK_SECONDS = 300.0
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


class SeriesProvider:
    """Figures of a file, each for its own stretch of time and no other: nothing is held over a gap or past the end.

    The file is read again when it was replaced.
    """

    name = "file"

    def __init__(self, path: Path, kind: Kind) -> None:
        """Raises ValueError with one line that names file, row and column."""
        self._path, self._kind = path.expanduser(), kind
        self._stamp = _stamp(self._path)
        self._history = History(read_series(self._path, kind))
        self._failure: str | None = None

    @property
    def kind(self) -> Kind:
        """As stated."""
        return self._kind

    def at(self, epoch_seconds: float) -> Intensity | None:
        """The row of that moment."""
        return self._history.at(epoch_seconds)

    def reason(self, epoch_seconds: float) -> str:
        """Before, after or between its rows."""
        rows = self._history.figures
        if epoch_seconds < (rows[0].valid_from_epoch_seconds or 0.0):
            return f"{self._path.name} begins later"
        return f"{self._path.name} has no row of that time" + (f" ({self._failure})" if self._failure else "")

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        """Rows, and why a newer file was not taken."""
        return {"rows": len(self._history), "failure": self._failure}

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        """Read the file again when it has changed; one that cannot be read leaves what was known."""
        try:
            stamp = await asyncio.to_thread(_stamp, self._path)
            if stamp != self._stamp:
                self._history = History(await asyncio.to_thread(read_series, self._path, self._kind))
                self._stamp = stamp
            self._failure = None
        except ValueError as error:
            self._failure = str(error)
        except Exception as error:
            self._failure = f"failed ({type(error).__name__})"
        return CHECK_SECONDS


def _named(path: Path) -> str:
    """The file in an error message."""
    return f"intensity_file={str(path)!r}"


def read_series(path: Path, kind: Kind) -> list[Intensity]:
    """The rows of ``path`` as figures of ``kind``, ascending. Raises ValueError as SeriesProvider."""
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{_named(path)} has no rows")
    time_column, value_column = _columns(path, list(rows[0]), kind.zone)
    found: list[tuple[float, float | None, bool]] = []
    for number, row in enumerate(rows, 1):
        try:
            value = _value(row[value_column], value_column)
            estimated = _TRUTH[str(row.get(ESTIMATED_COLUMN, False)).strip().lower()]
            found.append((_begin(row[time_column], time_column), value, estimated))
        except KeyError:
            raise ValueError(f"{_named(path)}, row {number}: estimated is neither true nor false") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{_named(path)}, row {number}: {error}") from None
        if number > 1 and found[-1][0] <= found[-2][0]:
            raise ValueError(f"{_named(path)}, row {number}: {time_column} is not later than in the row before")
    if all(value is None for _, value, _ in found):
        raise ValueError(f"{_named(path)} has no value in column {value_column!r}")
    return _figures(found, kind, path.name)


def _figures(rows: Sequence[tuple[float, float | None, bool]], kind: Kind, name: str) -> list[Intensity]:
    """Each row lasts until the next one, at most the file's usual step; a lone row lasts an hour."""
    steps = [later[0] - earlier[0] for earlier, later in pairwise(rows)]
    usual = median(steps) if steps else 3600.0
    ends = [begin + min(step, usual) for (begin, _, _), step in zip(rows, [*steps, usual], strict=True)]
    return [
        Intensity(
            value, kind.zone, kind.method, kind.basis, f"file:{name}", estimated, begin, end, factors=kind.factors
        )
        for (begin, value, estimated), end in zip(rows, ends, strict=True)
        if value is not None
    ]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    except OSError as error:
        reason = error.strerror or "damaged"
        raise ValueError(f"{_named(path)} cannot be read ({reason}); allowed: .csv, .csv.gz, .parquet") from None
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error):
        raise ValueError(f"{_named(path)} is not CSV; allowed: .csv, .csv.gz, .parquet") from None


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{_named(path)} needs pyarrow to be read; install it or give CSV") from None
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException:
        raise ValueError(f"{_named(path)} is not Parquet; allowed: .csv, .csv.gz, .parquet") from None
    return rows


def _columns(path: Path, names: Sequence[str], zone: str | None) -> tuple[str, str]:
    """The columns of time and value. Raises ValueError that names what is there."""
    times = [name for name in TIME_COLUMNS if name in names]
    if not times:
        raise ValueError(f"{_named(path)} has no column of time; allowed: {', '.join(TIME_COLUMNS)}")
    if zone is not None and zone in names:
        return times[0], zone
    if VALUE_COLUMN in names:
        return times[0], VALUE_COLUMN
    columns = [str(name) for name in names if name not in (*TIME_COLUMNS, ESTIMATED_COLUMN)]
    close = difflib.get_close_matches(zone or "", columns)
    hint = f"; near: {', '.join(close)}" if close else ""
    listed = ", ".join(columns[:20]) or "none"
    raise ValueError(f"zone={zone!r} is no column of {_named(path)}; allowed: {VALUE_COLUMN} or one of {listed}{hint}")


def _begin(value: Any, column: str) -> float:
    """Epoch seconds; a time without a zone is UTC. Raises ValueError."""
    if column == "epoch_seconds":
        seconds = float(value)
        if not abs(seconds) < 1e11:
            raise ValueError(f"epoch_seconds={value!r} is not possible; allowed: seconds since 1970")
        return seconds
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _value(value: Any, column: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return check_grams(float(value), column)


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced. Raises ValueError when there is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(
            f"{_named(path)} cannot be read ({error.strerror}); allowed: .csv, .csv.gz, .parquet"
        ) from None
    return found.st_mtime_ns, found.st_size, found.st_ino
