"""A server on this machine with the shape of Prometheus's query_range answers, and what it was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        metric = re.findall(r"llmco2_\w+", question["query"])[0]
        result = []
        for names, values in self.series.get(metric, {}).items():
            moments = [3600 * (hour + 1) for hour in sorted(values)]
            points = [[at, str(values[at // 3600 - 1])] for at in moments if start <= at <= end]
            if points:
                result.append({"metric": dict(names), "values": points})
        return 200, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


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
