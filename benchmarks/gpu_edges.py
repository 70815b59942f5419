"""Every change of a GPU's counter and of its power, read in a process of its own and kept with the phase it fell in.

    python -m benchmarks.gpu_edges --device 0 --look 0.002 --write edges.csv      (until its input is closed)

The file is what llmco2_vllm/meters/replay.py reads, with two columns more: ``looked_seconds``, the look before, which
found the old values (the change lies between the two), and ``phase``. The process looks far more often than the
product does, which is why it is no part of it, and does not look at all while calls are timed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import select
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, Self

from llmco2_vllm.meters.base import MeterError, Reading
from llmco2_vllm.meters.nvml import NvmlMeter, open_nvml

COLUMNS = ("time_seconds", "energy_joules", "power_watts", "temperature_celsius", "sm_clock_mhz", "looked_seconds")
VITALS_SECONDS = 1.0
START_SECONDS = 60.0
STOP_SECONDS = 10.0
# Phases of the meter's measurement in which a second reader would lengthen what is measured.
UNWATCHED = "calls"


def record(meter: NvmlMeter, look_seconds: float, file: IO[str], ended: IO[str]) -> None:
    """Write a row for every change until ``ended`` is closed; each second what there is goes to the disk."""
    file.write(",".join(COLUMNS) + "\n")
    last: Reading | None = None
    looked, vitals, due = monotonic(), meter.vitals(), monotonic()
    while not select.select([ended], [], [], look_seconds)[0]:
        now = monotonic()
        if now >= due:
            vitals, due = meter.vitals(), now + VITALS_SECONDS
            file.flush()
        try:
            reading = meter.read()
        except MeterError:
            continue  # the next look may do; the row after it says how long nothing was seen
        if reading.energy_joules is not None and (last is None or reading[1:] != last[1:]):
            values = (*reading, *vitals, looked)
            file.write(",".join("" if value is None else f"{value:.6f}" for value in values) + "\n")
            last = reading
        looked = reading.time_seconds


class EdgeRecorder:
    """Records while it is open, from the first phase on; a context manager.

    path: the ``.csv.gz`` to write. Until the end there is a ``.csv`` beside it, which is left if it does not come.
    """

    def __init__(self, device: int, path: Path, look_seconds: float = 0.002) -> None:
        self.marks: list[tuple[float, str]] = []
        self._path, self._plain = path, path.with_suffix("")
        self._command = [sys.executable, "-m", "benchmarks.gpu_edges", "--device", str(device)]
        self._command += ["--look", str(look_seconds), "--write", str(self._plain)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._plain.is_file():
            compress(self._plain, self._path, self.marks)

    def mark(self, phase: str) -> None:
        """A phase begins. Raises RuntimeError where the recording does not start."""
        if phase.startswith(UNWATCHED):
            self.stop()
        elif self._process is None:
            self._start()
        self.marks.append((monotonic(), phase))

    def stop(self) -> None:
        """End the recording."""
        if self._process is not None and self._process.poll() is None:
            try:
                self._process.communicate(timeout=STOP_SECONDS)  # closes its input
            except subprocess.TimeoutExpired:
                self._process.kill()  # its driver does not answer; the rows are on the disk
                self._process.wait()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], START_SECONDS)[0]
        if not ready or not self._process.stdout.readline():
            self.stop()
            raise RuntimeError(f"the counter's edges are not read ({' '.join(self._command)})")


def compress(plain: Path, path: Path, marks: Sequence[tuple[float, str]]) -> None:
    """Write the rows with the phase of each, in the order of ``marks``, and take the plain file away."""
    times = [time for time, _ in marks]
    with plain.open(newline="") as file:
        header, *rows = csv.reader(file)
    whole = [row for row in rows if len(row) == len(header)]  # the last line may have been cut
    phases = [marks[at - 1][1] if (at := bisect_right(times, float(row[0]))) else "" for row in whole]
    write_table(path, [*header, "phase"], [[*row, phase] for row, phase in zip(whole, phases, strict=True)])
    plain.unlink()


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A gzipped CSV, the same bytes for the same rows."""
    content = BytesIO()
    with gzip.GzipFile("", "wb", fileobj=content, mtime=0) as packed, TextIOWrapper(packed, newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
    path.write_bytes(content.getvalue())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU, in PCI order")
    parser.add_argument("--look", type=float, default=0.002, help="seconds from one look to the next")
    parser.add_argument("--write", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    (meter,) = open_nvml([arguments.device])
    with arguments.write.open("w") as file:
        print("reading", flush=True)
        record(meter, arguments.look, file, sys.stdin)
    meter.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
