"""Record what one GPU's counter does, at rest, under load and while an engine serves, for figures and for tests.

    python -m benchmarks.gpu_record --write FOLDER [--device 0] [--seconds 30] [--json]
        [--model DIR [--points B,P,D ...]] [--point-seconds 6] [--engine JSON] [--carbon JSON] [--multiprocessing]
    python -m benchmarks.gpu_record --write FOLDER --shim [--points B,P,D ...]

Two parts. The meter's is what benchmarks/meter_resolution.py measures. The other one, with ``--model``, serves
operating points on an offline engine with the plugin on; weights and prompts are random. FOLDER then holds

- ``meter.json``: tick, lag, part-time test, errors of windows, duration of calls.
- ``edges-meter.csv.gz``, ``edges-serving.csv.gz``: every change of the counter and of the power, with the phase it
  fell in; llmco2_vllm/meters/replay.py reads them.
- ``samples.parquet``: the windows with their steps (llmco2 samples import), or ``samples.sqlite.gz`` without pyarrow.
- ``points.csv``, ``requests.csv.gz``: when each point ran; what every request was told it took.
- ``provenance.json``: device, driver, library, versions, settings, what became of each part, digests of the files.

A part that fails leaves the files of the others, and its own as far as it got. ``--shim`` runs all of it against the
simulated libnvidia-ml.so.1 of the tests, with a tiny model on vLLM's CPU engine. What is simulated is found out from
the library that answers, not from the name of the device, and is not written to a folder named after a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import platform
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmco2_vllm
from benchmarks.gpu_edges import EdgeRecorder, write_table
from benchmarks.gpu_points import ENGINE_FILE, POINTS, POINTS_FILE, REQUESTS_FILE, SAID, Plan, Point
from benchmarks.gpu_provenance import (
    FILE,
    SIMULATED,
    Identity,
    RefusedError,
    check_folder,
    described,
    read_identity,
    title_of,
    write_provenance,
)
from benchmarks.meter_resolution import measure, shim_environment
from llmco2_vllm.config import ENVIRONMENT_PREFIX
from llmco2_vllm.meters.base import MeterError
from llmco2_vllm.store import reading
from llmco2_vllm.store.database import FILE_NAME

METER_FILE, METER_EDGES, SERVING_EDGES = "meter.json", "edges-meter.csv.gz", "edges-serving.csv.gz"
PARQUET_FILE, SQLITE_FILE, LOG_FILE = "samples.parquet", f"{FILE_NAME}.gz", "engine.log"
REQUESTS = f"{REQUESTS_FILE}.gz"
FILES = (METER_FILE, METER_EDGES, SERVING_EDGES, PARQUET_FILE, SQLITE_FILE, POINTS_FILE, REQUESTS)
# While the engine serves, its own meter reads too and is the one that counts: twenty looks a tick will do.
LOOKS_PER_TICK, LEAST_LOOK_SECONDS, LOOK_SECONDS = 20, 0.002, 0.005
ENGINE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
LOG_LINES, LOG_SECONDS = 3, 0.2
DONE, ABSENT = "done", "not asked for"

Say = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Say]:
    """Says what goes on: a line that changes on a terminal, else a line each; plain lines where rich is missing."""
    begin = time.monotonic()
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda text: print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(f"{time.monotonic() - begin:.0f} s: {text}")


@dataclass
class Recording:
    """A recording as it grows. parts: what became of each. look_seconds: between looks at the counter under serving."""

    folder: Path
    device: int
    identity: Identity
    arguments: argparse.Namespace
    say: Say
    parts: dict[str, str] = field(default_factory=dict)
    look_seconds: float = LOOK_SECONDS

    def part(self, name: str, work: Callable[[], str | None]) -> None:
        """Do a part, and write down what became of it; only being stopped goes further."""
        self.parts[name] = "stopped before its end"
        try:
            self.parts[name] = work() or DONE
        except Exception as error:
            message = " ".join(str(error).split())
            self.parts[name] = f"failed: {type(error).__name__}: {message}"
            self.say(f"{name} {self.parts[name]}")
        finally:
            self.write()

    def write(self) -> None:
        """The provenance of what is there."""
        engine = self._engine()
        packages = {name: installed(name) for name in ("nvidia-ml-py", "numpy", "pyarrow")}
        command = ["python", "-m", "benchmarks.gpu_record", *self.arguments.command]
        provenance = {
            "schema": 1,
            **described(self.identity),
            "weights": "random",
            "predictor": engine.get("predictor"),
            "versions": {"llmco2_vllm": llmco2_vllm.__version__, "python": platform.python_version(), **packages},
            "engine": engine,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            "settings": {k: v for k, v in vars(self.arguments).items() if k not in ("write", "command", "json")},
            "parts": self.parts,
        }
        write_provenance(self.folder, json.loads(json.dumps(provenance, default=str)), FILES)

    def _engine(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.folder / ENGINE_FILE).read_text())
            return found
        return {}

    # -- the parts ------------------------------------------------------------------------

    def meter(self) -> None:
        """Tick, lag, part-time test, windows, calls; and the edges meanwhile."""
        result: dict[str, Any] = {}
        with EdgeRecorder(self.device, self.folder / METER_EDGES) as edges:

            def mark(phase: str) -> None:
                self.say(f"meter: {phase}")
                edges.mark(phase)

            try:
                measure(self.device, self.arguments.seconds, mark, result)
            except SystemExit as error:
                raise RuntimeError(str(error)) from None
            finally:
                devices = result.get("state", {}).get("devices") or [{}]
                tick = devices[0].get("tick_seconds")
                self.look_seconds = max(LEAST_LOOK_SECONDS, tick / LOOKS_PER_TICK) if tick else LOOK_SECONDS
                result["marks"] = edges.marks
                (self.folder / METER_FILE).write_text(json.dumps(result, indent=1) + "\n")

    def serving(self) -> None:
        """The operating points, in a process of its own, so that what befalls an engine ends there."""
        log = self.folder / LOG_FILE
        with EdgeRecorder(self.device, self.folder / SERVING_EDGES, self.look_seconds) as edges:
            edges.mark("start")
            try:
                self._serve(log)
            finally:
                edges.marks += phases(self.folder / POINTS_FILE)
                self._compress_requests()
        log.unlink()

    def _serve(self, log: Path) -> None:
        """Run the child. Raises RuntimeError with the end of its log, which stays."""
        limit, said = self.arguments.engine_seconds, 0
        command = [sys.executable, "-m", "benchmarks.gpu_points", self._plan().json()]
        end = time.monotonic() + limit
        with log.open("w") as kept:
            child = subprocess.Popen(
                command, stdout=kept, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True
            )
        try:
            while child.poll() is None and time.monotonic() < end:
                time.sleep(LOG_SECONDS)
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(SAID)]
                for line in lines[said:]:
                    self.say(f"serving: {line}")
                said = len(lines)
        finally:
            with suppress(ProcessLookupError):  # with its workers, which may outlive it
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        if status:
            tail = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-LOG_LINES:]
            late = f"not done after {limit:g} s; " if time.monotonic() >= end else ""
            raise RuntimeError(f"{late}exit status {status}, see {LOG_FILE}: {' / '.join(tail)}")

    def _plan(self) -> Plan:
        own = self.arguments
        points = tuple(Point.parse(text) for text in own.points) or POINTS
        name = self.identity.name if SIMULATED in os.environ else None
        return Plan(self.folder.absolute(), own.model, points, own.point_seconds, own.engine, own.carbon, name)

    def _environment(self) -> dict[str, str]:
        """Free of settings of the plugin: the plan alone decides."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
        own = {**ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(self.arguments.multiprocessing))}
        if SIMULATED in os.environ:
            own |= CPU_ENVIRONMENT
        elif self.device:
            own |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(self.device)}
        return {**inherited, **own}

    def _compress_requests(self) -> None:
        plain = self.folder / REQUESTS_FILE
        if plain.is_file():
            header, *rows = (line.split(",") for line in plain.read_text().splitlines())
            write_table(self.folder / REQUESTS, header, rows)
            plain.unlink()

    def samples(self) -> str:
        """The windows, out of the store that the plugin wrote."""
        store = self.folder / FILE_NAME
        if importlib.util.find_spec("pyarrow") is None:
            count = copy_store(store, self.folder / SQLITE_FILE)
            told = f"{DONE}: {count} windows as {SQLITE_FILE}, pyarrow is missing"
        else:
            from llmco2_vllm.store.parquet import write_parquet

            told = f"{DONE}: {write_parquet(reading.samples(store), self.folder / PARQUET_FILE)} windows"
        for file in self.folder.glob(f"{FILE_NAME}*"):
            if file.name != SQLITE_FILE:
                file.unlink()
        return told


def phases(points: Path) -> list[tuple[float, str]]:
    """When points began and ended, as marks of an edge recording."""
    marks: list[tuple[float, str]] = []
    if points.is_file():
        _, *rows = (line.split(",") for line in points.read_text().splitlines())
        for batch, prompt, output, repetition, begin, end, _ in rows:
            name = Point(int(batch), int(prompt), int(output)).name
            marks += [(float(begin), name if repetition != "0" else f"warm-up {name}"), (float(end), "between")]
    return marks


def copy_store(store: Path, packed: Path) -> int:
    """The store as one compressed file, as of now; how many windows are in it. Raises as ``reading.samples``."""
    with reading.reading(store) as source, closing(sqlite3.connect(":memory:")) as copy:
        source.backup(copy)
        packed.write_bytes(gzip.compress(copy.serialize(), mtime=0))
        return int(copy.execute("SELECT COUNT(*) FROM samples").fetchone()[0])


def installed(package: str) -> str | None:
    """Version of a package, None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record(arguments: argparse.Namespace) -> dict[str, str]:
    """All parts; what became of them. Raises RefusedError before anything is measured."""
    folder: Path = arguments.write
    if (folder / FILE).exists():
        raise RefusedError(f"{folder}: holds a recording already; choose another folder")
    try:
        identity = read_identity(arguments.device)
    except MeterError as error:
        raise RefusedError(f"no GPU to record: {error}") from None
    check_folder(folder, identity.simulated, identity.name)
    wanted = arguments.model is not None or bool(arguments.points)
    if wanted and arguments.model is None and SIMULATED not in os.environ:
        raise RefusedError("--points needs --model, a folder with the config.json of a model")
    folder.mkdir(parents=True, exist_ok=True)
    with progress() as say:
        recording = Recording(folder, arguments.device, identity, arguments, say)
        say(f"recording {title_of(described(identity))}")
        recording.part("meter", recording.meter if arguments.seconds else lambda: ABSENT)
        recording.part("serving", recording.serving if wanted else lambda: ABSENT)
        recording.part("samples", recording.samples if wanted else lambda: ABSENT)
    (folder / ENGINE_FILE).unlink(missing_ok=True)  # it is in the provenance
    return recording.parts


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ``command`` is the line itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--write", type=Path, required=True, metavar="FOLDER", help="where the recording goes")
    add("--device", type=int, default=0, help="index of the GPU, in PCI order")
    add("--seconds", type=float, default=30.0, help="of constant power in the meter's part; 0: leave it out")
    add("--model", type=Path, metavar="DIR", help="folder with a config.json: serve it with random weights")
    add("--points", nargs="+", default=[], metavar="B,P,D", help="operating points: batch,prompt,output tokens")
    add("--point-seconds", type=float, default=6.0, help="how long each point is repeated")
    add("--engine", type=json.loads, default={}, metavar="JSON", help="more options of vllm.LLM")
    add("--carbon", type=json.loads, default={}, metavar="JSON", help="more settings of the plugin")
    add("--multiprocessing", action="store_true", help="the engine core in a process of its own")
    add("--engine-seconds", type=float, default=480.0, help="when serving is given up")
    add("--shim", action="store_true", help="against the simulated library of the tests")
    add("--json", action="store_true", help="print what became of the parts as one JSON object")
    arguments = parser.parse_args(argv, argparse.Namespace(command=argv))
    for text in arguments.points:
        try:
            Point.parse(text)
        except ValueError as error:
            parser.error(f"--points: {error}")
    return arguments


def simulate(arguments: argparse.Namespace) -> int:
    """Run this program again with the shim in place of NVML."""
    check_folder(arguments.write, True, "")
    with shim_environment() as environ:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_record", *arguments.command], env=environ
        ).returncode


def main(argv: list[str] | None = None) -> int:
    """Command line: 1 where a part failed or we were stopped, 2 where nothing was recorded."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    # A time limit ends us by a signal: what is there then is written down on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.shim and SIMULATED not in os.environ:
            return simulate(arguments)
        parts = record(arguments)
    except RefusedError as error:
        print(f"gpu_record: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu_record: stopped; {arguments.write} holds what there was", file=sys.stderr)
        return 1
    print(json.dumps(parts) if arguments.json else "\n".join(f"{name}: {told}" for name, told in parts.items()))
    return int(any(told.startswith("failed") for told in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
