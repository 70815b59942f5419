"""Tables in CSV, plain or gzipped: rows with line numbers, fields checked as they are read."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_GZIP_MAGIC = b"\x1f\x8b"


class BadRow(NamedTuple):
    """Why a row was not used. line: counts from 1, header included; column: "" for the row as a whole."""

    line: int
    column: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}, {f'column {self.column}: ' if self.column else ''}{self.reason}"


class RowError(ValueError):
    """A field that cannot be used."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"column {column}: {reason}")
        self.column = column
        self.reason = reason


class LeftOutError(RowError):
    """A row of which it is known that it is no measurement; not an error of the file."""


class Row:
    """One row; its methods return checked fields or raise RowError."""

    def __init__(self, line: int, fields: dict[str, str]) -> None:
        self.line = line
        self._fields = fields

    def text(self, column: str) -> str:
        """A field that is not empty."""
        value = (self._fields.get(column) or "").strip()
        if not value:
            raise RowError(column, "is missing")
        return value

    def number(self, column: str) -> float:
        """A positive, finite number."""
        return self._number(column, positive=True)

    def number_or_zero(self, column: str) -> float:
        """A finite number, zero or more."""
        return self._number(column, positive=False)

    def count(self, column: str) -> int:
        """A positive integer."""
        value = self.number(column)
        if value != int(value):
            raise RowError(column, f"{self.text(column)!r} is not possible; expected a whole number")
        return int(value)

    def _number(self, column: str, positive: bool) -> float:
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            raise RowError(column, f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise RowError(column, f"{text!r} is not possible; expected a {'positive ' if positive else ''}number")
        return value


class Table(NamedTuple):
    """Column names, rows, and rows with more or fewer fields than there are columns."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    bad_rows: tuple[BadRow, ...]


def read_table(path: Path) -> Table:
    """Read a whole table; ValueError when it has no header."""
    rows: list[Row] = []
    bad_rows: list[BadRow] = []
    with open_text(path) as file:
        reader = csv.reader(file)
        columns = tuple(name.strip() for name in next(reader, []))
        if not any(columns):
            raise ValueError(f"{path}: line 1 is no header of column names")
        for fields in reader:
            if len(fields) == len(columns):
                rows.append(Row(reader.line_num, dict(zip(columns, fields, strict=True))))
            elif fields:
                bad_rows.append(BadRow(reader.line_num, "", f"has {len(fields)} fields, the header {len(columns)}"))
    return Table(columns, tuple(rows), tuple(bad_rows))


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file that may be gzipped, whatever its name says."""
    with path.open("rb") as file:
        gzipped = file.read(2) == _GZIP_MAGIC
    stream = gzip.open(path, "rb") if gzipped else path.open("rb")  # noqa: SIM115 - closed with the wrapper
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def read_columns(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Fields of the named columns, row by row, unchecked; ValueError that names a missing column or short line."""
    with open_text(path) as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(f"{path}: line 1, column {missing[0]} is missing")
        places = [header.index(name) for name in columns]
        for fields in reader:
            if len(fields) != len(header):
                raise ValueError(f"{path}: line {reader.line_num} has {len(fields)} fields, the header {len(header)}")
            yield tuple(fields[place] for place in places)
