"""Time our series add to a scrape: by their prepared lines, and by prometheus_client.

    python -m benchmarks.scrape [--models 20] [--engines 4] [--rounds 30] [--json]

The server answers with the text of a host whose families are those vLLM 0.32 registers, made beforehand, and with
ours. What is timed is the whole answer through the middleware's part for ``/metrics``; less the same of a server
without ours. All ways take turns (A B C A B C); medians. Before each turn, outside of the time, nothing happens
(unchanged); or every engine tells of work and finished requests, which moves all that moves on a healthy engine
(busy); or every kind of fault and failure comes too (failing). Asking the engines for their figures is not part of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmco2_vllm.vllm_plugin.scrape import Scrapes

# What an engine of vLLM 0.32 shows in /metrics: counters, gauges, histograms and buckets of one.
COUNTERS, GAUGES, HISTOGRAMS, BUCKETS = 28, 18, 16, 15
STATES = ("unchanged", "busy", "failing")
FULLEST_LEVEL = 9  # of the library


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


class Server:
    """Answers scrapes; ``ours`` is rendered by the library unless that leaves it out."""

    def __init__(self, ours: CollectorRegistry, host_text: bytes, compressed: bool) -> None:
        self._ours = ours
        self._compressed = compressed
        self._host = gzip.compress(host_text) if compressed else host_text
        self._headers = [(b"content-type", b"text/plain")] + [(b"content-encoding", b"gzip")] * compressed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One scrape."""
        text = generate_latest(self._ours)
        ours = gzip.compress(text, FULLEST_LEVEL) if self._compressed and text else text
        length = (b"content-length", str(len(ours) + len(self._host)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*self._headers, length]})
        if ours:
            await send({"type": "http.response.body", "body": ours, "more_body": True})
        await send({"type": "http.response.body", "body": self._host})


def seconds(answer: Callable[..., Any]) -> tuple[float, bytes]:
    """Of one scrape, and its body."""
    from tests.vllm_plugin.asgi import body_of, collecting, nothing, run, scope

    out: list[Any] = []
    coroutine = answer(scope("/metrics", "GET"), nothing, collecting(out))
    begin = perf_counter()
    run(coroutine)
    return perf_counter() - begin, body_of(out)


def measure(models: int, engines: int, rounds: int, state: str) -> dict[str, Any]:
    """Median milliseconds that ours add, of the lines and of the library, and how many series they are."""
    from tests.dashboards.exposition import servers, work
    from tests.vllm_plugin.asgi import FakeFrontEnd

    registry, recorders = servers(models, engines, broken=state == "failing")
    front_end, host_text = FakeFrontEnd(), generate_latest(of_the_host(models, engines))
    ways: dict[str, Callable[..., Any]] = {}
    for encoding, compressed in (("plain", False), ("gzip", True)):
        server, bare = (Server(r, host_text, compressed) for r in (registry, CollectorRegistry()))
        scrapes = Scrapes(server)
        ways[f"without_{encoding}"] = bare
        ways[f"lines_{encoding}"] = lambda *a, scrapes=scrapes: scrapes.answer(front_end, *a)
        ways[f"library_{encoding}"] = server
    laps: dict[str, list[float]] = {name: [] for name in ways}
    before, changed, moment = b"", 0, 0
    for lap in range(rounds + 1):
        for name, answer in ways.items():
            moment += 1
            if state != "unchanged":
                for recorder in recorders:
                    for engine in range(engines):
                        work(recorder, engine, moment, state == "failing")
            spent, body = seconds(answer)
            if lap:  # the first has all lines to begin
                laps[name].append(1e3 * spent)
            if name == "lines_plain":
                lines = body.removesuffix(host_text).splitlines()
                assert body == generate_latest(registry) + host_text, "not the text of the library"
                changed = sum(a != b for a, b in zip(before, lines, strict=False))
                before = lines
    assert not front_end.failures
    return {
        "models": models,
        "engines": engines,
        "state": state,
        "series_host": _series(host_text.splitlines()),
        "series": _series(before),
        "series_changed": changed,
        "megabytes": sum(map(len, before)) / 1e6,
    } | {
        f"{way}_added_milliseconds": median(laps[way]) - median(laps[f"without_{way.partition('_')[2]}"])
        for way in ways
        if not way.startswith("without")
    }


def _series(lines: list[bytes]) -> int:
    return sum(not line.startswith(b"#") for line in lines)


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
        measure(models, arguments.engines, arguments.rounds, state)
        for models in (1, arguments.models)
        for state in STATES
    ]
    if arguments.json:
        print(json.dumps(found))
        return
    for one in found:
        print(
            f"{one['models']:3.0f} models x {one['engines']:.0f} engines, {one['state']:9s}: "
            f"{one['series_changed']:6.0f} of {one['series']:6.0f} series changed; added "
            f"{one['lines_plain_added_milliseconds']:7.2f} ms by lines, "
            f"{one['library_plain_added_milliseconds']:7.2f} by the library; gzip "
            f"{one['lines_gzip_added_milliseconds']:7.2f} and {one['library_gzip_added_milliseconds']:7.2f}"
        )


if __name__ == "__main__":
    main()
