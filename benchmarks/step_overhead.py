"""Time our hook adds to each scheduler step, over vLLM's real scheduler classes.

    python -m benchmarks.step_overhead [--requests 1 8 64 256] [--steps 400] [--device h100-sxm] [--metered] [--json]

One scheduler with the hook runs steady decode, steady decode with stop strings in every request (the
front end must know the figures at each output), then mixed steps (8 prefills join and 8 requests leave
each step). ``added`` is the time a step waits for our hooks in schedule() and update_from_output(), taken around each
of them with a clock whose own cost is subtracted; ``scheduler`` is those two without them. ``meanwhile`` is what we do
in get_grammar_bitmask(), while the devices run the step: GPUs, and workers in other processes, do not wait for it.
The hook is the product's: predictor, ledgers, outbox. With --device the steps are priced as that GPU's, by the
network; without it as this host's, by the Roofline. With --metered a window of a simulated meter ends every 100 ms, is
split over its steps and settled, as with a GPU's counter; the sampler's own thread is not part of the step.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import deque
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmco2_vllm import assemble
from llmco2_vllm.config import Settings
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.meters.discover import Discovery
from llmco2_vllm.vllm_plugin import register

HOOKS = ("scheduled", "executed", "attach", "freed")
MEANWHILE = "running"
TICK_SECONDS = 0.1


class TickingMeter:
    """In place of the sampler: a window of 100 ms at 400 W, whenever one is over."""

    fault = None

    def __init__(self) -> None:
        self.windows: deque[MeterWindow] = deque()
        self._begin = monotonic()

    def state(self) -> dict[str, Any]:
        """One device."""
        return {"devices": [{"scope": "gpu"}]}

    def tick(self) -> None:
        """End a window if it is due."""
        now = monotonic()
        if now - self._begin >= TICK_SECONDS:
            self.windows.append(MeterWindow(0, self._begin, now, 400.0 * (now - self._begin), 0.05))
            self._begin = now


class Stopwatch:
    """Adds up the time spent inside the hook's entry points during one step: what it waits for, and the rest."""

    def __init__(self, hook: Any) -> None:
        self.nanoseconds = self.meanwhile = 0
        self.own = self._own_cost()
        for name in (*HOOKS, MEANWHILE):
            setattr(hook, name, self._timed(getattr(hook, name), name == MEANWHILE))

    def _timed(self, function: Any, meanwhile: bool) -> Any:
        def timed(*args: Any) -> None:
            begin = perf_counter_ns()
            function(*args)
            spent = perf_counter_ns() - begin - self.own
            if meanwhile:
                self.meanwhile += spent
            else:
                self.nanoseconds += spent

        return timed

    @staticmethod
    def _own_cost() -> int:
        laps = []
        for _ in range(2000):
            begin = perf_counter_ns()
            laps.append(perf_counter_ns() - begin)
        return int(median(laps))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(
    folder: Path, requests: int, arguments: argparse.Namespace, mixed: int = 0, stop: bool = False
) -> dict[str, Any]:
    """Run one scheduler and time its steps; ``mixed`` prompts of 128 tokens join each step."""
    from tests.vllm_plugin import harness

    config = harness.make_config(
        folder, Settings(device=arguments.device), max_num_seqs=requests + 64, max_num_batched_tokens=32768
    )
    meter = TickingMeter() if arguments.metered else None
    assemble.open_meter = lambda *_: Discovery(meter, "none" if meter is None else "ticking", None)  # type: ignore
    scheduler = harness.make_scheduler(config, blocks=400_000)
    engine = harness.Engine(scheduler)
    for i in range(requests):
        # In mixed runs the first to leave do so one batch of eight after the other.
        length = 6000 if not mixed else 20 + (i // mixed)
        sampling = {"stop": ["a string that never comes"], "detokenize": True} if stop else {}
        scheduler.add_request(harness.make_request(f"r{i}", 64 + i % 64, max_tokens=length, **sampling))
    for _ in range(12):
        engine.step()
    watch = Stopwatch(scheduler.llmco2_hook)
    added, meanwhile, plain = [], [], []
    for step in range(arguments.steps):
        for i in range(mixed):
            lifetime = max(requests // mixed, 2)
            scheduler.add_request(harness.make_request(f"s{step}-{i}", 128, max_tokens=lifetime))
        watch.nanoseconds = watch.meanwhile = 0
        if meter is not None:
            meter.tick()
        begin = perf_counter_ns()
        output = scheduler.schedule()
        middle = perf_counter_ns()
        scheduler.get_grammar_bitmask(output)
        answer = engine._answer(output)
        resumed = perf_counter_ns()
        scheduler.update_from_output(output, answer)
        total = middle - begin + perf_counter_ns() - resumed
        added.append(watch.nanoseconds / 1e3)
        meanwhile.append(watch.meanwhile / 1e3)
        plain.append((total - watch.nanoseconds) / 1e3)
    return {
        "kind": "mixed" if mixed else "stop" if stop else "steady",
        "requests": requests,
        "steps": arguments.steps,
        "predictor": scheduler.llmco2_hook.monitor.predictor.name,
        "added_p50_us": round(median(added), 1),
        "added_p99_us": round(percentile(added, 0.99), 1),
        "meanwhile_p50_us": round(median(meanwhile), 1),
        "meanwhile_p99_us": round(percentile(meanwhile, 0.99), 1),
        "scheduler_p50_us": round(median(plain), 1),
        "ratio_p50": round(median(a / p for a, p in zip(added, plain, strict=True)), 3),
        "windows": 0 if meter is None else scheduler.llmco2_hook.monitor.metering.attributor.totals.windows,
        "failures": dict(scheduler.llmco2_hook.guard.failures),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", help="a GPU of the catalog, to price with the network")
    parser.add_argument("--metered", action="store_true", help="with a simulated meter of 100 ms windows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    register()
    from tests.vllm_plugin import harness

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = harness.model_folder(Path(name))
        for requests in arguments.requests:
            rows.append(measure(folder, requests, arguments))
            if requests >= 64:
                rows.append(measure(folder, requests, arguments, stop=True))
                rows.append(measure(folder, requests, arguments, mixed=8))
    steady = {row["requests"]: row["added_p50_us"] for row in rows if row["kind"] == "steady"}
    low, high = min(steady), max(steady)
    growth = (steady[high] - steady[low]) / (high - low) if high > low else 0.0
    if arguments.json:
        print(json.dumps({"rows": rows, "growth_us_per_request": round(growth, 4)}))
        return
    names = "".join(f"{name:>15}" for name in ("added p50", "added p99", "meanwhile p50", "p99", "scheduler p50"))
    print(f"{'kind':8}{'running':>8}{names}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['kind']:8}{row['requests']:>8}{row['added_p50_us']:>12} us{row['added_p99_us']:>12} us"
            f"{row['meanwhile_p50_us']:>12} us{row['meanwhile_p99_us']:>12} us"
            f"{row['scheduler_p50_us']:>12} us{row['ratio_p50']:>8}"
        )
    print(f"growth in steady decode: {growth:.4f} us per running request")


if __name__ == "__main__":
    main()
