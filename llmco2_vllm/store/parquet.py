"""Samples as Parquet, for learning elsewhere and for any other tool. Needs pyarrow, which the extra ``samples`` brings.

One row a sample:

================================================  ===================  ===============================================
column                                            type                 meaning
================================================  ===================  ===============================================
began_epoch_seconds                               double               begin of the window, seconds since 1970 UTC
duration_seconds, idle_seconds                    double               of the window; of it without a step
energy_joules, sigma_joules                       double               metered over ``devices``; standard deviation
idle_joules, predicted_joules                     double, may be null  energy put down to idling; predicted of steps
device, scope, meter, predictor                   string               names; what of the device the meter sees
devices, engine                                   int32                number of devices; index of the engine
tensor_parallel, pipeline_parallel                int32                ranks
data_parallel, expert_parallel                    int32, bool          ranks; experts are spread over all of them
model_fingerprint, feature_version                string               digest of the model's sizes; of the features
engine_version, package_version                   string               vLLM's version; ours
sm_clock_mhz, temperature_celsius                 double, may be null  of the device, MHz and degrees Celsius
doubt                                             string               why not to learn from it; empty when trusted
steps                                             list of struct       the steps inside the window, in order
================================================  ===================  ===============================================

Each step has double fields: ``window_share`` (of the step inside the window, 0 to 1), ``duration_seconds``,
``predicted_joules`` (NaN when unknown), for ``prefill_`` and ``decode_`` each ``sequences``, ``tokens``, ``pairs``,
``kv_tokens`` and ``samples``, and ``encoder_tokens``, all counts as in core/batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from llmco2_vllm.store.reading import samples
from llmco2_vllm.store.sample import COLUMNS, STEP_COLUMNS, Sample

_TYPES = {float: pa.float64(), int: pa.int32(), str: pa.string(), bool: pa.bool_()}


def _schema(nullable: bool) -> Any:
    """With ``nullable`` as other tools may write it, which tell less of what cannot be missing."""
    step = pa.struct([pa.field(name, pa.float64(), nullable) for name in STEP_COLUMNS])
    fields = [pa.field(column.name, _TYPES[column.kind], nullable or column.optional) for column in COLUMNS]
    fields.append(pa.field("steps", pa.list_(pa.field("element", step, nullable)), nullable))
    return pa.schema(fields, metadata={"llmco2_samples": "1"})


SCHEMA = _schema(nullable=False)
_READ = _schema(nullable=True)
_ROWS = 256


def to_table(path: Path) -> Any:
    """All samples of a file or folder as a ``pyarrow.Table`` of ``SCHEMA``. Raises as ``reading.samples``."""
    return pa.Table.from_batches(_batches(samples(path)), SCHEMA)


def write_parquet(found: Iterable[Sample], file: Path) -> int:
    """Write samples; how many. Raises OSError and what ``found`` does; a file that was there is then unchanged."""
    written = 0
    with NamedTemporaryFile(dir=file.parent, suffix=".new", delete=False) as unfinished:
        temporary = Path(unfinished.name)
        try:
            with parquet.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
                for batch in _batches(found):
                    writer.write_batch(batch)
                    written += batch.num_rows
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)
    temporary.replace(file)
    return written


def read_parquet(file: Path) -> Iterator[Sample]:
    """Samples of a file of ``SCHEMA``. Raises OSError, and ValueError with one line that names the row."""
    row = 0
    try:
        with parquet.ParquetFile(file) as source:
            missing = [name for name in SCHEMA.names if name not in source.schema_arrow.names]
            if missing:
                raise ValueError(f"column {missing[0]} is missing; expected a file of llmco2 samples export")
            for batch in source.iter_batches(_ROWS, columns=SCHEMA.names):
                for values, steps in _rows(pa.Table.from_batches([batch]).select(_READ.names).cast(_READ)):
                    row += 1
                    yield _checked(row, values, steps)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None


def _checked(row: int, values: tuple[Any, ...], steps: Any) -> Sample:
    try:
        return Sample.from_values(values, steps)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from None


def _batches(found: Iterable[Sample]) -> Iterator[Any]:
    rest = iter(found)
    while chunk := list(islice(rest, _ROWS)):
        columns = zip(*(sample.values for sample in chunk), strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=False)]
        together = np.concatenate([sample.steps for sample in chunk])
        ends = np.cumsum([0, *(len(sample.steps) for sample in chunk)])
        steps = pa.StructArray.from_arrays(
            [pa.array(column) for column in together.T], fields=list(SCHEMA.field("steps").type.value_type)
        )
        arrays.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), steps, type=SCHEMA.field("steps").type))
        yield pa.record_batch(arrays, schema=SCHEMA)


def _rows(table: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(values, steps) of each row."""
    steps = table.column("steps").combine_chunks()
    fields = steps.flatten().flatten()
    together = np.column_stack([field.to_numpy(zero_copy_only=False) for field in fields])
    begin = 0
    columns = [table.column(column.name).to_pylist() for column in COLUMNS]
    for values, length in zip(zip(*columns, strict=True), steps.value_lengths().to_pylist(), strict=True):
        yield values, together[begin : begin + (length or 0)]
        begin += length or 0
