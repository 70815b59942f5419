"""A server on this machine that answers as a test says, and remembers what it was asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """One answer. content: JSON, or the bytes as they are. silent: no answer at all until the test ends.
    dripping: its beginning, then a byte now and then."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    silent: bool = False
    dripping: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    path: str
    parameters: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass
class Remote:
    """Answers by path, in turn; the last of a path is given again and again. clock: of the Date header."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    base_url: str = ""
    now_epoch_seconds: float | None = None
    ended: Event = field(default_factory=Event)

    def on(self, path: str, *answers: Any) -> None:
        """What to answer; JSON stands for an answer of 200."""
        self.answers[path] = [answer if isinstance(answer, Answer) else Answer(answer) for answer in answers]

    def find(self, path: str) -> Answer:
        found = self.answers.get(path) or next((a for p, a in self.answers.items() if p.endswith("*")), None)
        if not found:
            return Answer({"error": "not found"}, 404)
        return found.pop(0) if len(found) > 1 else found[0]

    def paths(self) -> list[str]:
        return [one.path for one in self.asked]


def _handler(remote: Remote) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parameters = {key: values[0] for key, values in parse_qs(url.query).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            remote.asked.append(Asked(url.path, parameters, headers))
            answer = remote.find(url.path)
            if answer.silent:
                remote.ended.wait(60)
                return
            body = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            self.send_response_only(answer.status)
            now = time.time() if remote.now_epoch_seconds is None else remote.now_epoch_seconds
            for key, value in {"Date": formatdate(now, usegmt=True), **answer.headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            while answer.dripping and not remote.ended.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    return Handler


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave before the end."""


@contextmanager
def remote_server() -> Iterator[Remote]:
    """A server that is up."""
    remote = Remote()
    server = _Quiet(("127.0.0.1", 0), _handler(remote))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    remote.base_url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield remote
    finally:
        remote.ended.set()
        server.shutdown()
        server.server_close()
