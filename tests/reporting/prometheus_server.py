"""A server on this machine with the shape of Prometheus's query_range answers, and what it was asked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean
from threading import Thread
from urllib.parse import parse_qs, urlsplit

LIMIT_POINTS = 11_000
Labels = tuple[tuple[str, str], ...]


def labels(**names: str) -> Labels:
    """A key for ``Scraped.series``."""
    return tuple(sorted(names.items()))


@dataclass
class Scraped:
    """series: by metric and labels, what a query tells at the end of each hour (its number). broken: sent instead."""

    series: dict[str, dict[Labels, Mapping[int, float]]] = field(default_factory=dict)
    asked: list[Mapping[str, str]] = field(default_factory=list)
    broken: tuple[int, bytes] | None = None
    url: str = ""

    def add(self, metric: str, values: Mapping[int, float], **names: str) -> None:
        """One more series."""
        self.series.setdefault(metric, {})[labels(**names)] = values

    def answer(self, question: Mapping[str, str]) -> tuple[int, bytes]:
        self.asked.append(question)
        if self.broken is not None:
            return self.broken
        start, end, step = (float(question[key]) for key in ("start", "end", "step"))
        if (end - start) / step > LIMIT_POINTS:
            error = "exceeded maximum resolution of 11,000 points per timeseries"
            return 400, json.dumps({"status": "error", "errorType": "bad_data", "error": error}).encode()
        result = []
        for names, values in self._aggregated(question["query"]).items():
            moments = [3600 * (hour + 1) for hour in sorted(values)]
            points = [[at, str(values[at // 3600 - 1])] for at in moments if start <= at <= end]
            if points:
                result.append({"metric": dict(names), "values": points})
        return 200, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()

    def _aggregated(self, query: str) -> dict[Labels, Mapping[int, float]]:
        """``sum by (a, b) (over(metric{c="x"}[1h]))`` of what there is."""
        found = re.fullmatch(r"(\w+) by \((.*?)\) \(\w+\((\w+)(?:\{(.*)\})?\[1h\]\)\)", query)
        assert found is not None, query
        name, kept, metric, match = found.groups()
        wanted = re.findall(r'(\w+)(=~|!~|!=|=)"(.*?)"', match or "")
        groups: dict[Labels, dict[int, list[float]]] = {}
        for own, values in self.series.get(metric, {}).items():
            if all(_matches(dict(own).get(label, ""), operator, value) for label, operator, value in wanted):
                group = groups.setdefault(tuple(pair for pair in own if pair[0] in kept.split(", ")), {})
                for hour, value in values.items():
                    group.setdefault(hour, []).append(value)
        return {own: {hour: AGGREGATIONS[name](row) for hour, row in by.items()} for own, by in groups.items()}


def _matches(text: str, operator: str, value: str) -> bool:
    same = bool(re.fullmatch(value, text)) if "~" in operator else text == value
    return same != operator.startswith("!")


def _numbers(row: list[float]) -> list[float]:
    return [value for value in row if not math.isnan(value)] or row


# As Prometheus has them: NaN is in a sum and a mean, and gives way to numbers in a minimum and maximum.
AGGREGATIONS: Mapping[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "avg": fmean,
    "min": lambda row: min(_numbers(row)),
    "max": lambda row: max(_numbers(row)),
}


@contextmanager
def prometheus_server() -> Iterator[Scraped]:
    """A server that is up."""
    scraped = Scraped()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            status, body = 404, b""
            if url.path == "/api/v1/query_range":
                status, body = scraped.answer({key: values[0] for key, values in parse_qs(url.query).items()})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    scraped.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield scraped
    finally:
        server.shutdown()
        server.server_close()
