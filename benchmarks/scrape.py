"""Time our series add to a scrape: prometheus_client's text of a registry, with ours and without.

    python -m benchmarks.scrape [--models 20] [--engines 4] [--rounds 30] [--json]

The registry without ours holds stand-ins for the families that vLLM 0.32 registers, as many series per engine as a
real scrape has. With ours, every family is filled: on healthy engines, and when all that can fail has failed.
The two take turns (A B A B); medians. Asking the engines for their figures before a scrape is not part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# What an engine of vLLM 0.32 shows in /metrics: counters, gauges, histograms and buckets of one.
COUNTERS, GAUGES, HISTOGRAMS, BUCKETS = 28, 18, 16, 15


def of_the_host(models: int, engines: int) -> CollectorRegistry:
    """Stand-ins for the families of vLLM."""
    registry = CollectorRegistry()
    labels = ("model_name", "engine")
    bounds = [2.0**i for i in range(BUCKETS)]
    for number in range(COUNTERS + GAUGES + HISTOGRAMS):
        name = f"host:metric_{number}"
        if number < COUNTERS:
            made = Counter(name, "Stand-in.", labels, registry=registry)
        elif number < COUNTERS + GAUGES:
            made = Gauge(name, "Stand-in.", labels, registry=registry)
        else:
            made = Histogram(name, "Stand-in.", labels, registry=registry, buckets=bounds)
        for model in range(models):
            for engine in range(engines):
                child = made.labels(f"organisation/model-{model}", str(engine))
                child.observe(100.0) if isinstance(made, Histogram) else child.inc(0.3)
    return registry


def measure(models: int, engines: int, rounds: int, broken: bool) -> dict[str, float]:
    """Median milliseconds of a scrape without ours and with, and the series of each."""
    from tests.dashboards.exposition import full

    host, ours = of_the_host(models, engines), full(models, engines, broken)
    texts = {"without": b"", "ours": b""}
    laps: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, registries in (("without", (host,)), ("with", (host, ours))):
            begin = perf_counter()
            made = [generate_latest(registry) for registry in registries]
            laps[name].append(1e3 * (perf_counter() - begin))
            texts.update(zip(("without", "ours"), made, strict=False))
    without, with_ours = median(laps["without"]), median(laps["with"])
    return {
        "models": models,
        "engines": engines,
        "broken": broken,
        "series_without": _series(texts["without"]),
        "series_ours": _series(texts["ours"]),
        "without_milliseconds": without,
        "with_milliseconds": with_ours,
        "added_milliseconds": median(b - a for a, b in zip(laps["without"], laps["with"], strict=True)),
        "ratio": with_ours / without,
    }


def _series(text: bytes) -> int:
    return sum(not line.startswith(b"#") for line in text.splitlines())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    # A process serves one model: what one scrape of it holds, and what all of them together do.
    found = [
        measure(models, arguments.engines, arguments.rounds, broken)
        for models in (1, arguments.models)
        for broken in (False, True)
    ]
    if arguments.json:
        print(json.dumps(found))
        return
    for one in found:
        state = "all has failed" if one["broken"] else "healthy"
        print(
            f"{one['models']:3.0f} models x {one['engines']:.0f} engines, {state}: "
            f"{one['series_ours']:6.0f} series of ours beside {one['series_without']:6.0f}; "
            f"scrape {one['without_milliseconds']:7.2f} ms without, {one['with_milliseconds']:7.2f} with, "
            f"{one['added_milliseconds']:6.2f} added, x {one['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
