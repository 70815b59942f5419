"""What a GPU's energy counter can resolve: its tick, its lag, whether it sees all of the time, what a call takes.

    python -m benchmarks.meter_resolution [--device 0] [--seconds 30] [--json] [--shim]

Runs on any machine with NVML. Power is made by matrix products if torch with CUDA is there; without it only the
tick, the calls and the error of windows at constant power are measured. ``--shim`` runs all of it against the
simulated libnvidia-ml.so.1 of the tests, and says so in its result: such figures are no GPU's.

- tick, jitter: learnt by the product's sampler. lag: from idle to busy, as the product learns it.
- square waves: mean power at a quarter of the time busy, for several periods, over what the busy time and the
  levels of steady load and idleness give. A counter that sees all of the time shows the same for each period.
- windows: standard deviation of the energy of spans of several lengths about their mean, edge to edge as the
  product takes them, and raw as two plain readings would; idle, and busy where there is a load.
- thread: share of one core that the sampler's thread takes.

``python -m benchmarks.gpu_record`` runs the same and keeps every edge of the counter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from benchmarks.gpu_provenance import SIMULATED, read_identity
from llmco2_vllm.meters.discover import Search, open_meter
from llmco2_vllm.meters.nvml import NvmlMeter, open_nvml
from llmco2_vllm.meters.sampler import EdgeSampler

PERIODS_SECONDS = (0.02, 0.05, 0.075, 0.1, 0.125, 0.2, 0.4)
DUTY = 0.25
SETTLING_SECONDS = 0.5
LENGTHS_SECONDS = (0.5, 1.0, 2.0, 5.0)
# Set in the child that reads the shim: the time at which its clock began.
EPOCH = "BENCH_EPOCH"
IDLE_WATTS, BUSY_WATTS = 75.0, 500.0

Load = Callable[[bool], None]
# Told the name of each phase as it begins.
Mark = Callable[[str], None]


def unmarked(phase: str) -> None:
    """Nobody wants to know."""


@contextmanager
def torch_load(index: int) -> Iterator[Load]:
    """Matrix products on a CUDA device while switched on; what it runs is a few milliseconds long."""
    import torch

    with torch.inference_mode():
        a = torch.randn(4096, 4096, device=f"cuda:{index}", dtype=torch.bfloat16)
        on, over = threading.Event(), threading.Event()

        def work() -> None:
            while not over.is_set():
                if on.wait(0.1):
                    a @ a
                    torch.cuda.synchronize(index)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield lambda busy: on.set() if busy else on.clear()
        finally:
            over.set()
            thread.join()


@contextmanager
def simulated_load(control: Path) -> Iterator[Load]:
    """Power levels written to the shim's control file."""
    from tests.nvml_shim.shim import Control

    with Control.attach(control, float(os.environ[EPOCH])) as steered:
        steered.power(IDLE_WATTS)
        yield lambda busy: steered.power(BUSY_WATTS if busy else IDLE_WATTS)


def load_of(index: int) -> Any:
    """A context manager that gives a load, None where there is none."""
    if SIMULATED in os.environ:
        return simulated_load(Path(os.environ[SIMULATED]))
    try:
        import torch
    except ImportError:
        return None
    return torch_load(index) if torch.cuda.is_available() else None


def call_times(meter: NvmlMeter, calls: int) -> list[float]:
    """Microseconds of single readings, 20 ms apart, as the sampler's are."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        meter.read()
        times.append(round(1e6 * (time.perf_counter() - begin), 1))
        time.sleep(0.02)
    return times


def call_microseconds(times: list[float]) -> dict[str, float]:
    """Of how long a reading takes."""
    times = sorted(times)
    return {"p50": round(median(times), 1), "p99": times[int(0.99 * len(times))], "max": times[-1]}


def spans(sampler: EdgeSampler, seconds: float) -> list[dict[str, float]]:
    """Error of spans at constant power by length, in percent: edge to edge, and two raw readings as far apart."""
    end = time.monotonic() + seconds
    sampler.windows.clear()
    time.sleep(max(0.0, end - time.monotonic()))
    windows = list(sampler.windows)
    rows: list[dict[str, float]] = []
    for length in LENGTHS_SECONDS if windows else ():
        count = max(1, round(length / mean(w.duration_seconds for w in windows)))
        groups = [windows[i : i + count] for i in range(0, len(windows) - count + 1, count)]
        watts = [sum(w.energy_joules or 0.0 for w in g) / (g[-1].end_seconds - g[0].begin_seconds) for g in groups]
        stated = [sum(w.sigma_joules**2 for w in (g[0], g[-1])) ** 0.5 / 2**0.5 for g in groups]
        if len(watts) >= 3:
            joules = mean(watts) * length
            row = {"length_seconds": length, "spans": len(watts), "edge_percent": 100 * pstdev(watts) / mean(watts)}
            rows.append({**row, "stated_percent": 100 * mean(stated) / joules})
    return rows


def raw_percent(meter: NvmlMeter, length: float, repeats: int) -> float:
    """Standard deviation in percent of the power from two plain readings ``length`` apart, from any instant."""
    watts = []
    for i in range(repeats):
        time.sleep(0.013 + 0.0171 * (i % 7))
        first = meter.read()
        time.sleep(length * (0.93 + 0.02 * (i % 8)))
        last = meter.read()
        if first.energy_joules is not None and last.energy_joules is not None:
            watts.append((last.energy_joules - first.energy_joules) / (last.time_seconds - first.time_seconds))
    return 100 * pstdev(watts) / mean(watts) if watts else float("nan")


def power_over(sampler: EdgeSampler, seconds: float, work: Callable[[float], float]) -> tuple[float, float]:
    """(mean watts of the counter, share of the time that ``work`` says it was busy) over about ``seconds``.

    It goes on for a while before and after: the ticks at either end, and what the counter lags, are of the same work.
    """
    work(time.monotonic() + SETTLING_SECONDS)
    begin = time.monotonic()
    busy = work(begin + seconds)
    end = time.monotonic()
    work(end + SETTLING_SECONDS)
    energy = sampler.energy_between(begin, end)
    return (energy[0] / (end - begin) if energy else float("nan")), busy / (end - begin)


def square_waves(sampler: EdgeSampler, load: Load, seconds: float, mark: Mark = unmarked) -> list[dict[str, float]]:
    """Mean power by period of a wave, over what its busy share gives between the idle and the busy level."""

    def still(busy: bool) -> Callable[[float], float]:
        def hold(end: float) -> float:
            load(busy)
            time.sleep(max(0.0, end - time.monotonic()))
            return float(busy)

        return hold

    def wave(period: float) -> Callable[[float], float]:
        def drive(end: float) -> float:
            busy = 0.0
            while (begin := time.monotonic()) < end:
                load(True)
                time.sleep(DUTY * period)
                load(False)
                busy += time.monotonic() - begin
                time.sleep(max(0.0, begin + period - time.monotonic()))
            return busy

        return drive

    mark("idle")
    low, _ = power_over(sampler, seconds, still(False))
    mark("steady")
    high, _ = power_over(sampler, seconds, still(True))
    load(False)
    rows = []
    for period in PERIODS_SECONDS:
        mark(f"wave {period:g} s")
        watts, share = power_over(sampler, seconds, wave(period))
        ratio = watts / (low + share * (high - low))
        rows.append({"period_seconds": period, "power_watts": watts, "busy_share": share, "ratio": ratio})
    return rows


def transitions(sampler: EdgeSampler, load: Load, count: int, mark: Mark = unmarked) -> None:
    """Rises out of idleness, told to the sampler as a scheduler would."""
    mark("fall")
    sampler.activity.idle(time.monotonic())
    for _ in range(count):
        time.sleep(1.6)
        mark("rise")
        load(True)
        sampler.activity.busy(time.monotonic())
        time.sleep(1.8)
        mark("fall")
        load(False)
        sampler.activity.idle(time.monotonic())


def measure(index: int, seconds: float, mark: Mark = unmarked, result: dict[str, Any] | None = None) -> dict[str, Any]:
    """All figures of one device. Raises SystemExit with the reason where NVML does not open.

    result: filled as the figures come, so that a failure leaves those that were there. Phases in which single calls
    are timed begin with ``calls``.
    """
    result = {} if result is None else result
    found = open_meter("nvml", [index], Search(answer_seconds=30.0))
    if found.sampler is None:
        raise SystemExit(f"no NVML meter: {found.reason}")
    (meter,) = open_nvml([index])
    try:
        result["simulated"] = read_identity(index).simulated
        at_rest(found.sampler, meter, seconds, mark, result)
        source = load_of(index)
        if source is None:
            result["load"] = "none: torch with CUDA is not there, so lag and part-time test were left out"
        else:
            with source as load:
                under_load(found.sampler, load, seconds, mark, result)
                load(True)
                mark("calls, busy")
                result["busy_call_times"] = call_times(meter, calls_of(seconds))
    finally:
        result["state"] = found.sampler.state()
        found.sampler.stop()
        meter.close()
    return result


def calls_of(seconds: float) -> int:
    """How many single calls are timed."""
    return int(min(300, max(50, 10 * seconds)))


def at_rest(sampler: EdgeSampler, meter: NvmlMeter, seconds: float, mark: Mark, result: dict[str, Any]) -> None:
    """What needs no load: the calls, and windows at constant power."""
    mark("calls, idle")
    result["call_times"] = call_times(meter, calls_of(seconds))
    result["call_microseconds"] = call_microseconds(result["call_times"])
    mark("windows, idle")
    result["windows"] = spans(sampler, seconds)
    mark("raw, idle")
    result["raw_percent_of_1_second"] = raw_percent(meter, 1.0, max(5, int(seconds / 2)))


def under_load(sampler: EdgeSampler, load: Load, seconds: float, mark: Mark, result: dict[str, Any]) -> None:
    """What a load shows: windows, waves and rises."""
    load(True)
    mark("warm-up")
    time.sleep(1.0)
    mark("windows, busy")
    result["busy_windows"] = spans(sampler, seconds)
    load(False)
    result["square_waves"] = square_waves(sampler, load, max(1.0, seconds / 10), mark)
    transitions(sampler, load, 4, mark)
    time.sleep(1.5)


@contextmanager
def shim_environment() -> Iterator[dict[str, str]]:
    """Variables under which a child process reads the shim in place of NVML. Raises SystemExit without a compiler."""
    from tests.nvml_shim import shim

    if shim.compiler() is None:
        raise SystemExit("--shim needs a C compiler, none was found (cc, gcc)")
    with tempfile.TemporaryDirectory() as name, shim.Control(Path(name) / "control") as control:
        settings = shim.Settings(lag=0.03, phase=0.0137)
        environ = shim.environment(shim.build(Path(name)), settings, control=control)
        environ[SIMULATED] = str(control.path)
        yield {**os.environ, **environ, EPOCH: repr(control.epoch)}


def simulate(arguments: argparse.Namespace) -> int:
    """Run this program again with the shim in place of NVML."""
    with shim_environment() as environ:
        command = [sys.executable, "-m", "benchmarks.meter_resolution", "--seconds", str(arguments.seconds)]
        return subprocess.run(command + ["--json"] * arguments.json, env=environ).returncode


def report(result: dict[str, Any]) -> None:
    """Print the figures."""
    state = result["state"]["devices"][0]
    print("SIMULATED: figures of a shim, not of a GPU" if result["simulated"] else f"{state['name']} {state['uuid']}")
    for key in ("basis", "tick_seconds", "lag_seconds", "jitter_seconds", "cross_check_ratio", "reads_per_second"):
        print(f"{key:22}{state[key]}")
    print(f"{'thread_ratio':22}{result['state']['thread_ratio']}")
    print(f"{'call_microseconds':22}{result['call_microseconds']}")
    for row in [*result["windows"], *result.get("busy_windows", [])]:
        print("window " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"raw, 1 s: {result['raw_percent_of_1_second']:.3g} %")
    for row in result.get("square_waves", []):
        print("wave " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if "load" in result:
        print(result["load"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU, in PCI order")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long constant power is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shim", action="store_true", help="against the simulated library of the tests")
    arguments = parser.parse_args()
    if arguments.shim:
        return simulate(arguments)
    result = measure(arguments.device, arguments.seconds)
    if arguments.json:
        print(json.dumps(result))
    else:
        report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
