"""Dataset: observations read from one table of measurements, which is recognised by its header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmco2_vllm.training.configs import Entry, ModelSizes, read_configs
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.profiles import read_kernels, read_network
from llmco2_vllm.training.sources import recognise
from llmco2_vllm.training.table import BadRow, LeftOutError, RowError, read_table

__all__ = ["BadRow", "BadRowsError", "Dataset", "Observation", "read", "read_kernels", "read_network"]

CONFIGS_NAME = "model_configs.json"
_SHOWN = 20


class BadRowsError(ValueError):
    """Rows that cannot be used; ``bad_rows`` has all of them, the message the first twenty."""

    def __init__(self, path: Path, bad_rows: tuple[BadRow, ...]) -> None:
        shown = [f"  {row}" for row in bad_rows[:_SHOWN]]
        if len(bad_rows) > _SHOWN:
            shown.append(f"  and {len(bad_rows) - _SHOWN} more")
        count = "1 bad row" if len(bad_rows) == 1 else f"{len(bad_rows)} bad rows"
        super().__init__("\n".join([f"{path}: {count}", *shown]))
        self.bad_rows = bad_rows


@dataclass(frozen=True)
class Dataset:
    """Observations of one file in its order.

    skipped: bad rows. left_out: rows known to be no measurements, as documented for the source.
    """

    source: str
    observations: tuple[Observation, ...]
    skipped: tuple[BadRow, ...] = ()
    left_out: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.observations)


def read(path: Path, configs: Path | Mapping[str, Entry] | None = None, skip_bad: bool = False) -> Dataset:
    """Read a table, plain or gzipped.

    configs: sizes by model name in the format of model_configs.json, or where they lie; by default the file of
    that name beside the table, if there is one. Raises ValueError for a header of no known table, and BadRowsError
    that lists bad rows, unless ``skip_bad``.
    """
    table = read_table(path)
    try:
        source = recognise(table.columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    sizes = ModelSizes(_entries(path, configs))
    observations, bad_rows, left_out = [], list(table.bad_rows), []
    for row in table.rows:
        try:
            observations.append(source.read(row, sizes))
        except LeftOutError as reason:
            left_out.append(BadRow(row.line, reason.column, reason.reason))
        except RowError as error:
            bad_rows.append(BadRow(row.line, error.column, error.reason))
    skipped = tuple(sorted(bad_rows))
    if skipped and not skip_bad:
        raise BadRowsError(path, skipped)
    return Dataset(source.name, tuple(observations), skipped, tuple(left_out))


def _entries(path: Path, configs: Path | Mapping[str, Entry] | None) -> Mapping[str, Entry]:
    if isinstance(configs, Mapping):
        return configs
    if configs is not None:
        return read_configs(configs)
    beside = path.parent / CONFIGS_NAME
    return read_configs(beside) if beside.exists() else {}
