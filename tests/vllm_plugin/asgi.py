"""A server and a front end to hold the middleware against: both keep what happened, neither needs a socket."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin.asgi import Page
from llmco2_vllm.vllm_plugin.live import page
from llmco2_vllm.vllm_plugin.middleware import App, CarbonMiddleware, Message, Receive, Scope, Send

CARBON = b'{"schema":"llmco2/1","mark":"\xc3\xa9 8c1f}"}'
COLLABORATORS = ("open_call", "describe", "header_values", "remember", "started")


@dataclass
class FakeFrontEnd:
    """Follows the protocol; every method named in ``failing`` raises."""

    ledgers: list[RequestLedger] = field(default_factory=lambda: [RequestLedger(finished=True)])
    annotation: str | None = CARBON.decode()
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    may_switch: bool = True
    document: dict[str, Any] | None = field(default_factory=lambda: {"schema": "llmco2-live/1"})
    failing: frozenset[str] = frozenset()
    remembered: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise RuntimeError(f"planted in {name}")

    def open_call(self) -> list[RequestLedger]:
        self._enter("open_call")
        return self.ledgers

    def describe(self, ledgers: Sequence[RequestLedger]) -> str | None:
        self._enter("describe")
        return self.annotation

    def header_values(self, ledgers: Sequence[RequestLedger]) -> list[tuple[bytes, bytes]]:
        self._enter("header_values")
        return self.headers

    def remember(self, response_id: str, annotation_json: str, ledgers: Sequence[RequestLedger] = ()) -> None:
        self._enter("remember")
        self.remembered[response_id] = annotation_json

    async def find(self, response_id: str) -> str | None:
        self._enter("find")
        return self.remembered.get(response_id)

    async def status(self) -> dict[str, Any]:
        self._enter("status")
        return {"on": True}

    def live_page(self) -> Page | None:
        self._enter("live_page")
        return None if self.document is None else page()

    async def live(self) -> dict[str, Any] | None:
        self._enter("live")
        return self.document

    async def refresh_metrics(self) -> None:
        self._enter("refresh_metrics")

    async def switch(self, on: bool) -> dict[str, Any] | None:
        self._enter("switch")
        return {"on": on} if self.may_switch else None

    def started(self) -> None:
        self._enter("started")

    def failed(self, where: str, error: BaseException) -> None:
        self.failures.append(f"{where}: {error}")
        self._enter("failed")


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits for anything, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the coroutine waited")


def scope(path: str = "/v1/completions", method: str = "POST", **more: Any) -> Scope:
    state = SimpleNamespace(args=SimpleNamespace(api_key=None))
    return {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [],
        "app": SimpleNamespace(state=state),
    } | more


def start(content_type: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> Message:
    fields = [(b"Content-Type", content_type), *headers]
    return {"type": "http.response.start", "status": status, "headers": fields}


def json_messages(body: bytes, *headers: tuple[bytes, bytes], parts: int = 1) -> list[Message]:
    """A JSON response in ``parts`` body messages."""
    size = max(1, -(-len(body) // parts))
    chunks = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    length = (b"content-length", str(len(body)).encode())
    return [start(b"application/json", length, *headers), *body_messages(chunks)]


def stream_messages(chunks: Sequence[bytes]) -> list[Message]:
    """An event stream as Starlette sends it: every chunk, then an empty last message."""
    return [start(b"text/event-stream; charset=utf-8"), *body_messages([*chunks, b""])]


def body_messages(chunks: Sequence[bytes]) -> list[Message]:
    last = len(chunks) - 1
    return [
        {"type": "http.response.body", "body": chunk, "more_body": index < last} for index, chunk in enumerate(chunks)
    ]


def body_of(messages: Sequence[Message]) -> bytes:
    return b"".join(m.get("body", b"") for m in messages if m["type"] == "http.response.body")


def header(messages: Sequence[Message], name: bytes) -> bytes | None:
    return next((v for n, v in messages[0]["headers"] if n.lower() == name), None)


async def nothing() -> Message:
    return {"type": "http.disconnect"}


def replaying(messages: Sequence[Message], seen: Callable[[int], None] = lambda index: None) -> App:
    """An app that sends ``messages``; ``seen(i)`` is called after message i has been taken."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for index, message in enumerate(messages):
            await send(dict(message))
            seen(index)

    return app


def through(
    messages: Sequence[Message],
    front_end: FakeFrontEnd,
    request: Scope | None = None,
    seen: Callable[[int, list[Message]], None] = lambda index, out: None,
) -> list[Message]:
    """What the client gets when the server sends ``messages``."""
    out: list[Message] = []
    send = collecting(out)
    app = replaying(messages, lambda index: seen(index, out))
    run(CarbonMiddleware(app, front_end)(request or scope(), nothing, send))
    return out


def collecting(out: list[Message]) -> Callable[[Message], Awaitable[None]]:
    async def send(message: Message) -> None:
        out.append(message)

    return send


def without_carbon(body: bytes, carbon: bytes = CARBON) -> bytes:
    """The body with the inserted texts taken out."""
    return body.replace(b',"carbon":' + carbon, b"").replace(b'"carbon":' + carbon, b"")


def read_stream(text: bytes) -> list[bytes]:
    """Data of every dispatched event, by the line rules of the specification, byte for byte."""
    lines = re.split(rb"\r\n|\n|\r", text)[:-1]
    events, data = [], []
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
        elif line == b"data" or line.startswith(b"data:"):
            value = line[5:]
            data.append(value[1:] if value.startswith(b" ") else value)
    return events
