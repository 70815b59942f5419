"""Pure ASGI middleware: ``carbon`` in every response, and the ``/carbon`` endpoints.

It knows no endpoint of the server, only JSON bodies and event streams. Whatever goes wrong on our side leaves
the response as the server made it.
"""

from __future__ import annotations

import asyncio
import logging

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin.asgi import BODY, START, App, FrontEnd, Message, Receive, Scope, Send, report
from llmco2_vllm.vllm_plugin.endpoints import answer, is_ours
from llmco2_vllm.vllm_plugin.scrape import Scrapes
from llmco2_vllm.vllm_plugin.splice import KEY, EventSplicer, outline, splice_object

REFRESH_TIMEOUT_SECONDS = 0.25
# A body under one of these is encoded or sealed: changing it would break the response.
_SEALS = {b"content-encoding", b"content-digest", b"repr-digest", b"digest", b"content-md5"}

logger = logging.getLogger("vllm.llmco2")


class CarbonMiddleware:
    """Outermost middleware of the server; without ``front_end`` the plugin's own is taken at the first scope."""

    def __init__(self, app: App, front_end: FrontEnd | None = None) -> None:
        self._app = app
        self._scrapes = Scrapes(app)
        self._front_end = front_end
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front_end, path, ours = None, "", False
        try:
            if scope["type"] in ("http", "lifespan"):
                front_end = self._start()
                path = _route_path(scope) if scope["type"] == "http" else ""
                ours = is_ours(path)
        except Exception as error:
            front_end = None
            self._without_front_end(error)
        if front_end is None or scope["type"] != "http":
            await self._app(scope, receive, send)
        elif ours:
            for message in await answer(front_end, scope, receive, path):
                await send(message)
        elif path.rstrip("/") == "/metrics":
            await _refresh(front_end)
            await self._scrapes.answer(front_end, scope, receive, send)
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
            report(self._front_end, "started", error)
        return self._front_end

    def _without_front_end(self, error: Exception) -> None:
        """Let this scope pass as if we were not there."""
        if self._front_end is not None:
            report(self._front_end, "scope", error)
        elif not self._started:
            logger.warning("llmco2: responses carry no carbon object (%s: %s)", type(error).__name__, error)
        self._started = True

    async def _annotate(self, front_end: FrontEnd, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = _Response(front_end, send, front_end.open_call())
        except Exception as error:
            report(front_end, "open_call", error)
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
                report(self._front_end, "response start", error)
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
            report(self._front_end, "JSON body", error)
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
            report(self._front_end, "event stream", error)
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
        report(front_end, "refresh_metrics", error)
