"""Pure ASGI middleware: ``carbon`` in every response, and the ``/carbon`` endpoints.

It knows no endpoint of the server, only JSON bodies and event streams. Whatever goes wrong on our side leaves
the response as the server made it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin.splice import KEY, EventSplicer, outline, parse_object, splice_object

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

START, BODY = "http.response.start", "http.response.body"
REFRESH_TIMEOUT_SECONDS = 0.25
MAX_SWITCH_BYTES = 1024
_REQUESTS = "/carbon/requests/"
# A body under one of these is encoded or sealed: changing it would break the response.
_SEALS = {b"content-encoding", b"content-digest", b"repr-digest", b"digest", b"content-md5"}

logger = logging.getLogger("vllm.llmco2")


class FrontEnd(Protocol):
    """What the middleware asks of the front end of the engine."""

    def open_call(self) -> list[RequestLedger]:
        """A fresh list, bound to the running context, to which the ledgers of this call are appended."""
        ...

    def describe(self, ledgers: Sequence[RequestLedger]) -> str | None:
        """Annotation JSON on one line, None to leave it out."""
        ...

    def header_values(self, ledgers: Sequence[RequestLedger]) -> Headers:
        """Headers to add to a response that is not streamed."""
        ...

    def remember(self, response_id: str, annotation_json: str, ledgers: Sequence[RequestLedger] = ()) -> None:
        """Keep an annotation that has been put into a response; it is made anew once its ledgers are final."""
        ...

    async def find(self, response_id: str) -> str | None:
        """The annotation kept for a response id."""
        ...

    async def status(self) -> dict[str, Any]:
        """Body of ``GET /carbon``."""
        ...

    async def refresh_metrics(self) -> None:
        """Bring the engine-wide metrics up to date before a scrape."""
        ...

    async def switch(self, on: bool) -> dict[str, Any] | None:
        """Turn the hook on or off; None when that is not allowed."""
        ...

    def started(self) -> None:
        """The server runs: called once per process, from its event loop."""
        ...

    def failed(self, where: str, error: BaseException) -> None:
        """Something of ours raised; the response went out as the server made it."""
        ...


class CarbonMiddleware:
    """Outermost middleware of the server; without ``front_end`` the plugin's own is taken at the first scope."""

    def __init__(self, app: App, front_end: FrontEnd | None = None) -> None:
        self._app = app
        self._front_end = front_end
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front_end, path = None, ""
        try:
            if scope["type"] in ("http", "lifespan"):
                front_end = self._start()
                path = _route_path(scope) if scope["type"] == "http" else ""
        except Exception as error:
            front_end = None
            self._without_front_end(error)
        if front_end is None or scope["type"] != "http":
            await self._app(scope, receive, send)
        elif path in ("/carbon", "/carbon/hook") or (path.startswith(_REQUESTS) and path != _REQUESTS):
            await _send_answer(await _answer(front_end, scope, receive, path), scope, send)
        elif path.rstrip("/") == "/metrics":
            await _refresh(front_end)
            await self._app(scope, receive, send)
        else:
            await self._annotate(front_end, scope, receive, send)

    def _start(self) -> FrontEnd | None:
        """The front end, told once that the server runs; None when the plugin has none."""
        if self._started:
            return self._front_end
        if self._front_end is None:
            from llmco2_vllm.vllm_plugin.output_path import front_end

            self._front_end = front_end()
        self._started = True
        try:
            self._front_end.started()
        except Exception as error:
            _report(self._front_end, "started", error)
        return self._front_end

    def _without_front_end(self, error: Exception) -> None:
        """Let this scope pass as if we were not there."""
        if self._front_end is not None:
            _report(self._front_end, "scope", error)
        elif not self._started:
            logger.warning("llmco2: responses carry no carbon object (%s: %s)", type(error).__name__, error)
        self._started = True

    async def _annotate(self, front_end: FrontEnd, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = _Response(front_end, send, front_end.open_call())
        except Exception as error:
            _report(front_end, "open_call", error)
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, response.send)
        except Exception:
            # The client gets what the server had sent before it failed, and the server its own error.
            try:
                await response.release()
            except Exception as error:
                logger.debug("llmco2: the client has gone: %r", error)
            raise
        await response.release()


class _Response:
    """One response on its way out: holds a JSON body or the end of a stream until the carbon object is in."""

    __slots__ = ("_front_end", "_held", "_ledgers", "_send", "_splicer")

    def __init__(self, front_end: FrontEnd, send: Send, ledgers: list[RequestLedger]) -> None:
        self._front_end = front_end
        self._send = send
        self._ledgers = ledgers
        self._held: list[Message] = []
        self._splicer: EventSplicer | None = None

    async def send(self, message: Message) -> None:
        """In place of the server's ``send``."""
        kind = message["type"]
        if kind == BODY:
            if self._splicer is not None:
                await self._send_chunk(self._splicer, message)
                return
            if self._held:
                await self._send_body(message)
                return
        elif kind == START:
            try:
                takes = self._takes(message)
            except Exception as error:
                _report(self._front_end, "response start", error)
                takes = False
            if takes:
                self._held.append(message)
                return
        else:
            await self.release()
        await self._send(message)

    async def release(self) -> None:
        """Send what is held, as the server made it, and hold nothing any more."""
        held, self._held = self._held, []
        splicer, self._splicer = self._splicer, None
        for message in held:
            await self._send(message)
        if splicer is not None and splicer.unsent:
            await self._send({"type": BODY, "body": splicer.unsent, "more_body": True})

    def _takes(self, start: Message) -> bool:
        """Whether to hold the start of this response: a JSON body with final figures. Sets up a stream."""
        kind = _media_type(start)
        # A stream that announced its length must keep it.
        if kind == b"text/event-stream" and all(n.lower() != b"content-length" for n, _ in start.get("headers", ())):
            self._splicer = EventSplicer(self._describe)
        return kind == b"application/json" and _finished(self._ledgers)

    def _describe(self, response_id: str | None) -> bytes | None:
        text = self._front_end.describe(self._ledgers)
        if text is None:
            return None
        if response_id is not None:
            self._front_end.remember(response_id, text, self._ledgers)
        return text.encode()

    async def _send_body(self, message: Message) -> None:
        self._held.append(message)
        if message.get("more_body", False):
            return
        held, self._held = self._held, []
        try:
            messages = self._annotated(held)
        except Exception as error:
            _report(self._front_end, "JSON body", error)
            messages = held
        for item in messages:
            await self._send(item)

    def _annotated(self, held: list[Message]) -> list[Message]:
        start, *bodies = held
        body = b"".join(item.get("body", b"") for item in bodies)
        value = outline(body)
        if value is None or KEY in value:
            return held
        response_id = value.get("id")
        carbon = self._describe(response_id if isinstance(response_id, str) else None)
        if carbon is None:
            return held
        body = splice_object(body, value, carbon)
        length = str(len(body)).encode()
        headers = [(n, length if n.lower() == b"content-length" else v) for n, v in start.get("headers", ())]
        headers += self._front_end.header_values(self._ledgers)
        return [{**start, "headers": headers}, {**bodies[-1], "body": body}]

    async def _send_chunk(self, splicer: EventSplicer, message: Message) -> None:
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        try:
            pieces = splicer.feed(chunk, _finished(self._ledgers), not more)
        except Exception as error:
            self._splicer = None
            _report(self._front_end, "event stream", error)
            pieces = [piece for piece in (splicer.unsent, chunk) if piece]
        if len(pieces) == 1 and pieces[0] is chunk:
            await self._send(message)
            return
        if not more and (not chunk or not pieces):
            pieces.append(b"")
        for index, piece in enumerate(pieces, 1):
            await self._send({**message, "body": piece, "more_body": more or index < len(pieces)})


def _finished(ledgers: list[RequestLedger]) -> bool:
    """Whether there are figures and none of them changes any more."""
    for ledger in ledgers:  # a loop, not all(): this runs on every chunk
        if not ledger.finished:
            return False
    return bool(ledgers)


def _media_type(start: Message) -> bytes:
    """Media type of a response whose body may be changed, else empty."""
    if start["status"] != 200 or start.get("trailers", False):
        return b""
    kind = b""
    for name, value in start.get("headers", ()):
        lowered = name.lower()
        if lowered in _SEALS:
            return b""
        if lowered == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
    return kind


def _report(front_end: FrontEnd, where: str, error: Exception) -> None:
    try:
        front_end.failed(where, error)
    except Exception:
        logger.exception("llmco2: failed at %s (%r) and could not count it", where, error)


def _route_path(scope: Scope) -> str:
    """Path below the mount point of the server."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _refresh(front_end: FrontEnd) -> None:
    try:
        async with asyncio.timeout(REFRESH_TIMEOUT_SECONDS):
            await front_end.refresh_metrics()
    except TimeoutError:
        logger.debug("llmco2: the engine did not answer in time; the scrape shows the figures of the last one")
    except Exception as error:
        _report(front_end, "refresh_metrics", error)


class _Answer(NamedTuple):
    status: int
    body: bytes
    headers: Headers = []


def _json_answer(status: int, content: Any, headers: Headers | None = None) -> _Answer:
    return _Answer(status, json.dumps(content).encode(), headers or [])


def _authorized(scope: Scope) -> bool:
    """The check of vLLM's AuthenticationMiddleware, which sits inside of us and does not guard ``/carbon``."""
    args = getattr(getattr(scope.get("app"), "state", None), "args", None)
    keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    allowed = [hashlib.sha256(key.encode()).digest() for key in ([keys] if isinstance(keys, str) else keys) if key]
    if not allowed:
        return True
    given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    digest = hashlib.sha256(token.decode("latin-1").encode()).digest()
    matches = False
    for candidate in allowed:
        matches |= secrets.compare_digest(digest, candidate)
    return matches


async def _answer(front_end: FrontEnd, scope: Scope, receive: Receive, path: str) -> _Answer:
    """Answer of a ``/carbon`` endpoint."""
    methods = ("PUT",) if path == "/carbon/hook" else ("GET", "HEAD")
    try:
        if not _authorized(scope):
            return _json_answer(401, {"error": "Unauthorized"})
        if scope["method"] not in methods:
            allow = ", ".join(methods)
            return _json_answer(405, {"error": f"{path} takes {allow}"}, [(b"allow", allow.encode())])
        if path == "/carbon":
            return _json_answer(200, await front_end.status())
        if path == "/carbon/hook":
            return await _switch(front_end, receive)
        return await _find(front_end, path.removeprefix(_REQUESTS))
    except Exception as error:
        _report(front_end, path, error)
        return _json_answer(500, {"error": "the carbon meter failed; see the log of the server"})


async def _find(front_end: FrontEnd, response_id: str) -> _Answer:
    annotation = await front_end.find(response_id)
    if annotation is None:
        message = f"no carbon record of response {response_id!r}: not finished, not known, or too long ago"
        return _json_answer(404, {"error": message})
    return _Answer(200, f'{{"id":{json.dumps(response_id)},"carbon":{annotation}}}'.encode())


async def _switch(front_end: FrontEnd, receive: Receive) -> _Answer:
    value = parse_object(await _read(receive, MAX_SWITCH_BYTES))
    if value is None or set(value) != {"on"} or not isinstance(value["on"], bool):
        return _json_answer(400, {"error": 'the body must be {"on": true} or {"on": false}'})
    state = await front_end.switch(value["on"])
    if state is None:
        return _json_answer(403, {"error": 'switching is not allowed; start the server with {"switch": true}'})
    return _json_answer(200, state)


async def _read(receive: Receive, limit: int) -> bytes:
    """Request body up to a little over ``limit`` bytes; empty when the client leaves."""
    body, more = b"", True
    while more and len(body) <= limit:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return b"" if len(body) > limit else body


async def _send_answer(answer: _Answer, scope: Scope, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer.body)).encode())]
    await send({"type": START, "status": answer.status, "headers": [*headers, *answer.headers]})
    await send({"type": BODY, "body": b"" if scope["method"] == "HEAD" else answer.body})
