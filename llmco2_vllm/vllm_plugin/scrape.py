"""``/metrics``: the host's library renders the host's metrics, and our text goes in front of them ready-made.

What the library was made to leave out is exactly what is put in, so where it collects none of our families (several
API servers: it merges files) nothing happens. The first failure leaves all to the library from the next scrape on.
"""

from __future__ import annotations

import struct
import zlib

from llmco2_vllm.telemetry.exposition import LeftOut, leave_out
from llmco2_vllm.vllm_plugin.asgi import BODY, START, App, FrontEnd, Message, Receive, Scope, Send, report

# A body under one of these is sealed: changing it would break the response.
_SEALS = {b"content-digest", b"repr-digest", b"digest", b"content-md5", b"etag"}
_FORMATS = {b"text/plain": False, b"application/openmetrics-text": True}
# The library writes names in another way under these.
_RENAMING = (b"escaping=dots", b"escaping=values")
# A gzip member without name or comment, the length of its head, and its end: checksum and length of the text.
_PLAIN_MEMBER, _HEAD_BYTES, _MEMBER_END = b"\x1f\x8b\x08\x00", 10, struct.Struct("<LL")
_LEVEL = 1


class Scrapes:
    """Answers the scrapes of one server."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._on = True

    async def answer(self, front_end: FrontEnd, scope: Scope, receive: Receive, send: Send) -> None:
        """What the library would have answered, our families first."""
        response = self._begin(front_end, scope, send)
        if response is None:
            await self._app(scope, receive, send)
            return
        try:
            # A server that fails before its end has sent nothing yet, and makes an error page of it.
            await self._app(scope, receive, response.send)
        finally:
            response.left_out.over = True
        await response.release()
        if response.failure is not None:
            self._on = False
            report(front_end, "metrics", response.failure)

    def _begin(self, front_end: FrontEnd, scope: Scope, send: Send) -> _Response | None:
        """Have the library leave our families out of this scrape; None where it shall render them."""
        try:
            return _Response(leave_out(), send) if self._on and _asks_for_all(scope) else None
        except Exception as error:
            self._on = False
            report(front_end, "metrics", error)
            return None


class _Response:
    """One response on its way out, held until our text is in."""

    __slots__ = ("_held", "_seen", "_send", "failure", "left_out")

    def __init__(self, left_out: LeftOut, send: Send) -> None:
        self.left_out = left_out
        self._send = send
        self._held: list[Message] | None = []
        self._seen = 0
        self.failure: Exception | None = None

    async def send(self, message: Message) -> None:
        """In place of the server's ``send``."""
        if self._held is None:
            await self._send(message)
            return
        self._held.append(message)
        kind = message["type"]
        if not (kind == START and message["status"] == 200) and not (kind == BODY and message.get("more_body", False)):
            await self.release()

    async def release(self) -> None:
        """Send what is held, and hold nothing any more; at the end, once more."""
        families = len(self.left_out.families)
        if self._held is None:
            if families > self._seen and self.failure is None:
                self.failure = ValueError("a scrape that was answered before it was made")
            return
        messages, self._held, self._seen = self._held, None, families
        if families and messages and messages[0].get("status") == 200:
            try:
                messages = _with_text(messages, self.left_out)
            except Exception as error:
                self.failure = error
        for message in messages:
            await self._send(message)


def _asks_for_all(scope: Scope) -> bool:
    """Whether this is a scrape of every family under its own name."""
    if scope["method"] != "GET" or scope.get("query_string"):
        return False
    return not any(_renames(value) for name, value in scope["headers"] if name.lower() == b"accept")


def _renames(value: bytes) -> bool:
    return any(word in value for word in _RENAMING)


def _with_text(messages: list[Message], left_out: LeftOut) -> list[Message]:
    """The response with the text of what was left out in front. Raises ValueError where it has no place."""
    start, *bodies = messages
    if any(message["type"] != BODY for message in bodies):
        raise ValueError(f"a scrape answered by {bodies[-1]['type']}")
    if not bodies or bodies[-1].get("more_body", False):
        return messages  # the client has left, or the server stopped in the middle
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    content_type, encoding = headers.get(b"content-type", b""), headers.get(b"content-encoding", b"identity")
    openmetrics = _FORMATS.get(content_type.partition(b";")[0].strip().lower())
    sealed = _SEALS & headers.keys() or encoding not in (b"identity", b"gzip") or start.get("trailers", False)
    if openmetrics is None or sealed or _renames(content_type):
        raise ValueError(f"a scrape answered with {sorted(headers)}, {content_type!r}, {encoding!r}")
    ours = left_out.text(openmetrics)
    if encoding == b"gzip":
        theirs = b"".join(message.get("body", b"") for message in bodies)
        bodies = [{**bodies[-1], "body": _gzipped(ours, theirs)}]
    else:
        bodies = [{**bodies[0], "body": ours, "more_body": True}, *bodies]
    length = str(sum(len(message.get("body", b"")) for message in bodies)).encode()
    fields = [(name, length if name.lower() == b"content-length" else value) for name, value in start["headers"]]
    return [{**start, "headers": fields}, *bodies]


def _gzipped(ours: bytes, theirs: bytes) -> bytes:
    """One gzip member of our text and theirs (RFC 1952): many clients stop reading at the end of a first.

    theirs: gzip; it stays as it is but for its end. Raises ValueError for another form of it, zlib.error for none.
    """
    reader = zlib.decompressobj(wbits=31)
    text = reader.decompress(theirs)
    if not theirs.startswith(_PLAIN_MEMBER) or not reader.eof or reader.unused_data:
        raise ValueError("a scrape answered with more than one gzip member, or a named one")
    writer = zlib.compressobj(_LEVEL, wbits=-15)
    # Blocks that end at a whole byte, none of them the last; theirs look back at nothing before themselves.
    blocks = writer.compress(ours) + writer.flush(zlib.Z_SYNC_FLUSH)
    end = _MEMBER_END.pack(zlib.crc32(text, zlib.crc32(ours)), (len(ours) + len(text)) & 0xFFFFFFFF)
    return theirs[:_HEAD_BYTES] + blocks + theirs[_HEAD_BYTES : -_MEMBER_END.size] + end
