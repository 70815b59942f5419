"""What the files of a recording say, in figures: the numbers behind benchmarks/gpu_figures.py, from the files alone."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from itertools import groupby, pairwise
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_points import POINTS_FILE, Point
from benchmarks.gpu_provenance import read_provenance
from benchmarks.gpu_record import METER_EDGES, METER_FILE, PARQUET_FILE, REQUESTS, SERVING_EDGES, SQLITE_FILE
from llmco2_vllm.store.database import FILE_NAME
from llmco2_vllm.store.reading import samples
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample

FloatArray = NDArray[np.float64]
# A change seen later than this after the look before tells too little of its time.
TIGHT_SECONDS = 0.01
# Left out at the begin of a phase: the counter lags, and the tick in which it began belongs to two.
SETTLING_SECONDS = 0.5
LENGTHS_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RAW_SPANS = 400
# About a rise: where power is idle's, and where it is the load's.
BEFORE_SECONDS, AFTER_SECONDS = (-1.3, -0.1), (0.6, 1.7)
MIXES = ("prefill alone", "decode alone", "both")


class MissingError(ValueError):
    """The recording does not hold what a figure shows."""


class Edges(NamedTuple):
    """Rows of an edge file: times and looks in seconds on one clock, joules, watts, phases."""

    time: FloatArray
    energy: FloatArray
    power: FloatArray
    looked: FloatArray
    phase: NDArray[np.str_]

    @property
    def counted(self) -> Edges:
        """Only the rows in which the counter changed."""
        return self.changed(self.energy)

    def changed(self, column: FloatArray) -> Edges:
        """Only the rows in which this column is another one than before; the first one is not known to be."""
        return self.rows(np.flatnonzero(np.nan_to_num(np.diff(column))) + 1)

    def rows(self, which: Any) -> Edges:
        """Some of the rows."""
        return Edges(*(column[which] for column in self))

    def between(self, begin: float, end: float) -> Edges:
        """The rows of a span."""
        return self.rows((self.time >= begin) & (self.time <= end))

    def spans(self) -> Iterator[tuple[str, float, float]]:
        """Phases in order with the time of their first row and of the last one."""
        for phase, rows in groupby(zip(self.phase.tolist(), self.time.tolist(), strict=True), lambda row: row[0]):
            times = [time for _, time in rows]
            yield phase, times[0], times[-1]


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return list(csv.DictReader(StringIO(text)))


@dataclass(frozen=True)
class Recorded:
    """A recording whose provenance was checked."""

    folder: Path
    provenance: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Recorded:
        """Raises RefusedError where it is none, or was changed."""
        return cls(folder, read_provenance(folder))

    @property
    def power_basis(self) -> str:
        """What the power readings are."""
        return str(self.provenance["device"].get("power_basis", "power"))

    @property
    def told(self) -> str:
        """What became of each part."""
        return ", ".join(f"{part}: {told}" for part, told in self.provenance["parts"].items())

    def path(self, name: str) -> Path:
        """A file of it. Raises MissingError that says what became of its part."""
        if name not in self.provenance["files"]:
            raise MissingError(f"there is no {name}; {self.told}")
        return self.folder / name

    def _edges(self, name: str) -> Edges:
        rows = read_table(self.path(name))
        names = ("time_seconds", "energy_joules", "power_watts", "looked_seconds")
        time, energy, power, looked = (np.array([float(row[n] or "nan") for row in rows]) for n in names)
        return Edges(time, energy, power, looked, np.array([row["phase"] for row in rows]))

    @cached_property
    def edges(self) -> Edges:
        """Of the meter's part."""
        return self._edges(METER_EDGES)

    @cached_property
    def serving(self) -> Edges:
        """Of the serving part."""
        return self._edges(SERVING_EDGES)

    @cached_property
    def meter(self) -> dict[str, Any]:
        """What was measured of the meter, as far as it got."""
        found: dict[str, Any] = json.loads(self.path(METER_FILE).read_text())
        return found

    def of_meter(self, name: str) -> Any:
        """One result. Raises MissingError where the measurement did not get so far."""
        if not self.meter.get(name):
            raise MissingError(f"{METER_FILE} has no {name}; {self.meter.get('load', self.told)}")
        return self.meter[name]

    @cached_property
    def samples(self) -> list[Sample]:
        """The windows."""
        if PARQUET_FILE in self.provenance["files"]:
            from llmco2_vllm.store.parquet import read_parquet

            return list(read_parquet(self.path(PARQUET_FILE)))
        with TemporaryDirectory() as name:
            store = Path(name) / FILE_NAME
            store.write_bytes(gzip.decompress(self.path(SQLITE_FILE).read_bytes()))
            return list(samples(store))

    @cached_property
    def requests(self) -> list[dict[str, str]]:
        """What requests were told."""
        return read_table(self.path(REQUESTS))

    @cached_property
    def points(self) -> dict[Point, list[tuple[float, float, float]]]:
        """(begin, end, begin since 1970) of the repetitions of each point, without the warm-up."""
        found: dict[Point, list[tuple[float, float, float]]] = {}
        for row in read_table(self.path(POINTS_FILE)):
            if row["repetition"] != "0":
                times = float(row["begin_seconds"]), float(row["end_seconds"]), float(row["begin_epoch_seconds"])
                found.setdefault(Point(*(int(row[c]) for c in Point._fields)), []).append(times)
        return found


# -- the meter's part ---------------------------------------------------------------------------------------------


def periods(edges: Edges, column: str) -> FloatArray:
    """Seconds from each change of a column to the next, where both were seen in time."""
    found = edges.changed(getattr(edges, column))
    tight = found.time - found.looked <= TIGHT_SECONDS
    return np.diff(found.time)[tight[1:] & tight[:-1]]


def quantiles(values: Sequence[float] | FloatArray) -> dict[str, float]:
    """Of a distribution, and how many there are."""
    if not len(values):
        raise MissingError("nothing was seen in time")
    p5, p50, p95, p99 = np.quantile(values, (0.05, 0.5, 0.95, 0.99)).tolist()
    return {"count": len(values), "p5": p5, "p50": p50, "p95": p95, "p99": p99}


def integral(edges: Edges, begin: float, end: float) -> float:
    """Joules of the power readings between two times; each holds until the next one."""
    inside = edges.time[(edges.time > begin) & (edges.time < end)]
    bounds = np.concatenate([[begin], inside, [end]])
    held = np.searchsorted(edges.time, bounds[:-1], "right") - 1
    return float(edges.power[held] @ np.diff(bounds))


def mean_watts(edges: Edges) -> dict[str, dict[str, float]]:
    """By phase: watts of the counter, of integrated power, and their ratio; from edge to edge, settled."""
    joules: dict[str, list[float]] = {}
    for phase, begin, end in edges.spans():
        settled = begin + min(SETTLING_SECONDS, (end - begin) / 4)
        found = edges.rows((edges.time >= settled) & (edges.time <= end)).counted
        if len(found.time) > 2:
            first, last = found.time[0], found.time[-1]
            row = (found.energy[-1] - found.energy[0], integral(edges, first, last), last - first)
            joules[phase] = [a + b for a, b in zip(joules.get(phase, (0.0, 0.0, 0.0)), row, strict=True)]
    return {
        phase: {"counter_watts": counter / seconds, "integrated_watts": power / seconds, "ratio": counter / power}
        for phase, (counter, power, seconds) in joules.items()
        if power > 0
    }


def waves(recorded: Recorded) -> list[dict[str, float]]:
    """By period: mean power over what the busy share gives, of the counter and of integrated power."""
    watts, rows = mean_watts(recorded.edges), []
    low, high = (watts.get(phase, {}).get("integrated_watts", np.nan) for phase in ("idle", "steady"))
    for row in recorded.of_meter("square_waves"):
        own = watts.get(f"wave {row['period_seconds']:g} s", {}).get("integrated_watts", np.nan)
        integrated = own / (low + row["busy_share"] * (high - low))
        kept = {key: row[key] for key in ("period_seconds", "busy_share", "ratio")}
        rows.append({**kept, "integrated_ratio": float(integrated)})
    return rows


def spread(edges: Edges, phase: str) -> list[dict[str, float]]:
    """By length of span: standard deviation of its power in percent, from edge to edge and between raw readings."""
    found = edges.rows(edges.phase == phase).counted
    if len(found.time) < 4:
        raise MissingError(f"the phase {phase!r} has {len(found.time)} edges")
    generator, rows = np.random.default_rng(0), []
    begin, end, tick = found.time[0], found.time[-1], float(np.median(np.diff(found.time)))
    for length in LENGTHS_SECONDS:
        if 3 * length > end - begin:
            break
        count = max(1, round(length / tick))
        edged = (found.energy[count:] - found.energy[:-count]) / (found.time[count:] - found.time[:-count])
        # Of any length about this one: a multiple of the tick looks better than it is.
        lengths = length * generator.uniform(0.93, 1.07, RAW_SPANS)
        first = generator.uniform(begin, end - lengths)
        at = (np.searchsorted(found.time, times, "right") - 1 for times in (first, first + lengths))
        raw = -np.subtract(*(found.energy[place] for place in at)) / lengths
        rows.append(
            {
                "length_seconds": length,
                "edge_percent": float(100 * edged.std() / edged.mean()),
                "raw_percent": float(100 * raw.std() / raw.mean()),
                "raw_theory_percent": 100 * tick / length / sqrt(6),
            }
        )
    return rows


def rises(recorded: Recorded) -> list[dict[str, float]]:
    """Each rise out of idleness: when it was, and how much later the counter shows it.

    That is where the line through the edges before meets the line through those after.
    """
    counted, rows = recorded.edges.counted, []
    for begin in (time for time, phase in recorded.of_meter("marks") if phase == "rise"):
        lines = []
        for span in (BEFORE_SECONDS, AFTER_SECONDS):
            own = counted.between(begin + span[0], begin + span[1])
            if len(own.time) > 2:
                lines.append(np.polyfit(own.time - begin, own.energy - counted.energy[0], 1))
        if len(lines) == 2 and lines[0][0] != lines[1][0]:
            lag = (lines[0][1] - lines[1][1]) / (lines[1][0] - lines[0][0])
            rows.append({"begin_seconds": begin, "lag_seconds": float(lag)})
    if not rows:
        raise MissingError("no rise out of idleness was recorded")
    return rows


# -- the serving part ---------------------------------------------------------------------------------------------


def mix_of(sample: Sample) -> str:
    """Which phases the steps of a window are of; empty where it has none."""
    of_prefill, of_decode = (sample.steps[:, STEP_COLUMNS.index(f"{p}_tokens")].sum() for p in ("prefill", "decode"))
    if of_prefill and of_decode:
        return MIXES[2]
    return (MIXES[0] if of_prefill else MIXES[1]) if len(sample.steps) else ""


def windows(recorded: Recorded) -> dict[str, FloatArray]:
    """By mix: (measured, predicted) joules of the steps of windows in repetitions, warm-up left out; shape (n, 2)."""
    spans = []
    for times in recorded.points.values():
        (_, _, first), (begin, end, last) = times[0], times[-1]
        spans.append((first, last + end - begin))
    rows: dict[str, list[tuple[float, float]]] = {}
    for sample in recorded.samples:
        begin, end = sample.began_epoch_seconds, sample.began_epoch_seconds + sample.duration_seconds
        known = sample.predicted_joules is not None and sample.idle_joules is not None and not sample.doubt
        if known and (mix := mix_of(sample)) and any(first <= begin and end <= last for first, last in spans):
            measured = sample.energy_joules - (sample.idle_joules or 0.0)
            rows.setdefault(mix, []).append((measured, sample.predicted_joules or 0.0))
    if not rows:
        raise MissingError("no trusted window with steps lies in a point")
    return {mix: np.array(rows[mix]) for mix in MIXES if mix in rows}


def requests(recorded: Recorded) -> dict[Point, FloatArray]:
    """By point: (final measured, predicted, measured at the response) joules of requests; NaN: not known then."""
    known: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in recorded.requests:
        known.setdefault(tuple(row[c] for c in (*Point._fields, "repetition", "request")), {})[row["moment"]] = row
    rows: dict[Point, list[tuple[float, float, float]]] = {}
    for key, moments in known.items():
        final, early = moments.get("final"), moments.get("response", {})
        if final is not None and final["measured_joules"]:
            figures = final["measured_joules"], final["predicted_joules"], early.get("measured_joules") or "nan"
            point = Point(*(int(part) for part in key[:3]))
            rows.setdefault(point, []).append((float(figures[0]), float(figures[1]), float(figures[2])))
    if not rows:
        raise MissingError("no request has a measured figure")
    return {point: np.array(found) for point, found in rows.items()}


def errors(found: FloatArray) -> dict[str, float]:
    """Of (measured, predicted) rows: how many, MAPE in percent, and predicted over measured in sum."""
    measured, predicted = found[:, 0], found[:, 1]
    mape = 100 * np.abs(predicted / measured - 1)[measured > 0].mean()
    return {"count": len(found), "mape_percent": float(mape), "sum_ratio": float(predicted.sum() / measured.sum())}


def points(recorded: Recorded) -> list[dict[str, float]]:
    """By point: what the counter says its repetitions took, and what its requests say when they are final.

    The counter's joules are those from the first repetition to the last, with what lies between two of them.
    """
    counted, told, rows = recorded.serving.counted, requests(recorded), []
    for point, times in recorded.points.items():
        begin, end = times[0][0], times[-1][1]
        before, after = np.interp((begin, end), counted.time, counted.energy).tolist()
        row = {**point._asdict(), "repetitions": len(times), "seconds": end - begin, "counter_joules": after - before}
        row["between_seconds"] = sum(later[0] - earlier[1] for earlier, later in pairwise(times))
        row["joules_per_output_token"] = (after - before) / (len(times) * point.batch * point.output)
        if point in told:
            row["requests_joules"] = float(told[point][:, 0].sum())
        rows.append(row)
    return rows
