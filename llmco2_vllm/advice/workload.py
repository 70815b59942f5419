"""Workloads: how long prompts and outputs are, from a shipped summary or a file of requests.

Shipped: ``data/workloads/NAME.csv``, cells of a trace with their mean lengths and number of requests; its source and
licence in ``sources.toml`` beside it.
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.training.table import Row, RowError, open_text, read_table

FloatArray = NDArray[np.float64]
# Accepted names of each column; the first is ours, the others are of traces and of OpenAI's usage object.
PROMPT_COLUMNS = ("prompt_tokens", "input_tokens")
OUTPUT_COLUMNS = ("output_tokens", "completion_tokens")
ARRIVAL_COLUMNS = ("arrival_seconds", "t_s")
# Of one row: the columns of prompt, output and, when there is one, arrival.
Keys = tuple[str, str, str | None]


@dataclass(frozen=True)
class Workload:
    """Requests by length.

    prompt_tokens, output_tokens, shares: (n,) each, the last of all requests, sum 1.
    requests_per_second: mean rate of arrival; None when no arrivals are known.
    """

    name: str
    prompt_tokens: FloatArray
    output_tokens: FloatArray
    shares: FloatArray
    requests_per_second: float | None = None
    source: str = ""

    @property
    def prompt_mean(self) -> float:
        """Mean prompt tokens of a request."""
        return float(self.shares @ self.prompt_tokens)

    @property
    def output_mean(self) -> float:
        """Mean output tokens of a request."""
        return float(self.shares @ self.output_tokens)

    @property
    def prefill_pairs(self) -> float:
        """Mean (query, key) pairs of a request's prefill: E[p (p + 1) / 2]."""
        return float(self.shares @ (self.prompt_tokens * (self.prompt_tokens + 1) / 2))

    @property
    def decode_context(self) -> float:
        """Mean context of a decode step, its own token included: E[(o - 1) (p + o / 2)] / E[o - 1].

        Longer outputs are met in more steps. Requests of one output token never decode: then the mean prompt.
        """
        steps = self.output_tokens - 1
        total = float(self.shares @ steps)
        each = self.prompt_tokens + self.output_tokens / 2
        return float(self.shares @ (steps * each)) / total if total > 0 else self.prompt_mean + 1

    @property
    def longest(self) -> float:
        """Most tokens that a single request caches."""
        return float((self.prompt_tokens + self.output_tokens).max())

    def prefill_steps(self, tokens_per_step: int) -> float:
        """Mean number of steps over which a prompt is prefilled, E[ceil(p / tokens_per_step)]."""
        return float(self.shares @ np.ceil(self.prompt_tokens / tokens_per_step))

    def summarised(self, levels: int) -> Workload:
        """The same as at most ``levels`` x ``levels`` cells: quantiles of the prompt, and in each those of the output.

        Each cell has the mean lengths of its requests, so that the means of both stay as they are.
        """
        cells = [
            cell
            for column in _parts(np.argsort(self.prompt_tokens, kind="stable"), levels)
            for cell in _parts(column[np.argsort(self.output_tokens[column], kind="stable")], levels)
        ]
        shares = np.array([self.shares[cell].sum() for cell in cells])
        prompt, output = (
            np.array([self.shares[cell] @ tokens[cell] for cell in cells]) / shares
            for tokens in (self.prompt_tokens, self.output_tokens)
        )
        return Workload(self.name, prompt, output, shares, self.requests_per_second, self.source)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not known is left out."""
        found = {
            "name": self.name,
            "prompt_tokens_mean": self.prompt_mean,
            "output_tokens_mean": self.output_mean,
            "requests_per_second": self.requests_per_second,
            "source": self.source or None,
        }
        return {key: value for key, value in found.items() if value is not None}


def _parts(order: NDArray[np.intp], levels: int) -> list[NDArray[np.intp]]:
    return [part for part in np.array_split(order, levels) if len(part)]


@cache
def sources() -> Mapping[str, Mapping[str, Any]]:
    """Documents behind the shipped workloads by name: title, url, year, licence, notice."""
    text = files("llmco2_vllm").joinpath("data", "workloads", "sources.toml").read_text("utf-8")
    found: Mapping[str, Mapping[str, Any]] = tomllib.loads(text)["source"]
    return found


def open_workload(name: str) -> Workload:
    """The shipped workload called ``name``, or the file of that path.

    Raises ValueError in one line that lists the shipped ones, or names the line and key of a file; OSError.
    """
    if name in sources():
        return _shipped(name)
    path = Path(name).expanduser()
    if not path.is_file():
        names = ", ".join(sources())
        raise ValueError(f"workload={name!r} is not possible; allowed: {names}, or a .csv or .jsonl file")
    return read_workload(path)


def _shipped(name: str) -> Workload:
    text = files("llmco2_vllm").joinpath("data", "workloads", f"{name}.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    prompt, output, requests = (
        np.array([float(row[key]) for row in rows]) for key in ("prompt_tokens", "output_tokens", "requests")
    )
    known = sources()[name]
    return Workload(name, prompt, output, requests / requests.sum(), known["requests_per_second"], known["title"])


def read_workload(path: Path) -> Workload:
    """Requests of a file: CSV (gzip or not) with a header, or JSON lines (.jsonl).

    Keys: prompt_tokens (or input_tokens), output_tokens (or completion_tokens), and with arrival_seconds (or t_s) in
    every row the rate. Raises OSError, and ValueError in one line that names the line and key.
    """
    prompt, output, arrivals = [], [], []
    for row, (prompt_key, output_key, arrival_key) in _lines(path):
        try:
            prompt.append(row.count(prompt_key))
            output.append(row.count(output_key))
            if arrival_key is not None:
                arrivals.append(row.number_or_zero(arrival_key))
        except RowError as error:
            raise ValueError(f"{path}: line {row.line}, {error}") from None
    if not prompt:
        raise ValueError(f"{path}: holds no request")
    count = len(prompt)
    span = max(arrivals) - min(arrivals) if len(arrivals) == count else 0.0
    rate = (count - 1) / span if span > 0 else None
    lengths = np.array(prompt, dtype=np.float64), np.array(output, dtype=np.float64)
    return Workload(path.name, *lengths, np.full(count, 1 / count), rate, f"file:{path.name}")


def _lines(path: Path) -> Iterator[tuple[Row, Keys]]:
    """Rows, each with the accepted names of its columns. Raises ValueError that names the file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path)
        return
    try:
        table = read_table(path)
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path}: is not CSV; allowed: .csv, .csv.gz, .jsonl") from None
    keys = _keys(table.columns, str(path))
    if table.bad_rows:
        raise ValueError(f"{path}: {table.bad_rows[0]}")
    yield from ((row, keys) for row in table.rows)


def _json_lines(path: Path) -> Iterator[tuple[Row, Keys]]:
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(f"{path}: line {line} is no JSON object")
            fields = {str(key): str(value) for key, value in found.items() if value is not None}
            yield Row(line, fields), _keys(fields, f"{path}: line {line}")


def _keys(there: Iterable[str], where: str) -> Keys:
    """The accepted names that are there; None for an arrival that is not. Raises ValueError."""
    known = set(there)
    names = (PROMPT_COLUMNS, OUTPUT_COLUMNS, ARRIVAL_COLUMNS)
    prompt, output, arrival = (next((name for name in group if name in known), None) for group in names)
    if prompt is None or output is None:
        missing = PROMPT_COLUMNS if prompt is None else OUTPUT_COLUMNS
        raise ValueError(f"{where}: {missing[0]} is missing; allowed: {' or '.join(missing)}")
    return prompt, output, arrival
