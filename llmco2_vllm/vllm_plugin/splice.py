"""Puts ``carbon`` into a JSON body or into the last JSON event of a stream, as text: no other byte changes.

Events are those of https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from pydantic_core import from_json

KEY = "carbon"
_MEMBER = b'"carbon":'
# Possessive, so that a CRLF is one line end and never a CR followed by an empty line.
_EVENT_END = re.compile(rb"(?:\r\n?+|\n)(?:\r\n?|\n)")
_LINE = re.compile(rb"[^\r\n]+")
# A string with the colon that makes it a key, or a bracket.
# Above this a body is not parsed: at 87 MB (embeddings as floats) that held the event loop for 0.7 s.
LARGE_BYTES = 1 << 20
_LARGE_HEAD = re.compile(rb'\s*\{\s*(?:"id"\s*:\s*("[^"\\]*"))?')
_TOKEN = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]', re.DOTALL)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data`` (UTF-8), None when it is anything else."""
    try:
        value = from_json(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def outline(body: bytes) -> dict[str, Any] | None:
    """As :func:`parse_object` of a body the server calls JSON; of a large one only an ``id`` in first place is read."""
    if len(body) <= LARGE_BYTES or b'"carbon"' in body:
        return parse_object(body)
    head = _LARGE_HEAD.match(body)
    if head is None or not body.rstrip().endswith(b"}"):
        return None
    return {"id": from_json(head[1]) if head[1] else None}


def splice_object(body: bytes, value: Mapping[str, Any], carbon: bytes) -> bytes:
    """``body``, a JSON object that parses to ``value``, with ``carbon`` as its last member."""
    return _insert(body, body.rindex(b"}"), value, carbon)


def splice_event(event: bytes, value: Mapping[str, Any], carbon: bytes, sent: int = 0) -> bytes:
    """``event``, whose data parses to ``value``, with ``carbon`` as last member of the data and of its usage object.

    Nothing is put into the first ``sent`` bytes: they have left already.
    """
    spans = _data_spans(event)
    data = data_of(event)
    places: list[tuple[int, Mapping[str, Any]]] = [(data.rindex(b"}"), value)]
    usage = value.get("usage")
    if isinstance(usage, dict) and KEY not in usage:
        places.append((_member_end(data, "usage"), usage))
    for position, owner in places:  # from the back, so that earlier positions stay right
        at = _position_in_event(spans, position)
        if at >= sent:
            event = _insert(event, at, owner, carbon)
    return event


def data_of(event: bytes) -> bytes:
    """The data of a server-sent event: its ``data`` fields joined by line feeds."""
    return b"\n".join(event[start:end] for start, end in _data_spans(event))


def id_of(value: Mapping[str, Any]) -> str | None:
    """Id of the response an event belongs to: its own (chat, completions), its response's or its message's."""
    for owner in (value, value.get("response"), value.get("message")):
        if isinstance(owner, Mapping) and isinstance(owner.get("id"), str):
            return str(owner["id"])
    return None


def _insert(text: bytes, at: int, owner: Mapping[str, Any], carbon: bytes) -> bytes:
    return b"".join((text[:at], b"," if owner else b"", _MEMBER, carbon, text[at:]))


def _data_spans(event: bytes) -> list[tuple[int, int]]:
    """Start and end of the value of each ``data`` field."""
    spans = []
    for line in _LINE.finditer(event):
        name, colon, value = line[0].partition(b":")
        if name == b"data":
            start = line.start() + len(name) + len(colon) + value.startswith(b" ")
            spans.append((start, line.end()))
    return spans


def _position_in_event(spans: list[tuple[int, int]], position: int) -> int:
    """Where in the event the byte at ``position`` of its data stands."""
    for start, end in spans:
        if position < end - start:
            return start + position
        position -= end - start + 1
    raise IndexError("position beyond the data of the event")


def _member_end(data: bytes, name: str) -> int:
    """Position of the bracket that closes the value of the last top-level member ``name`` of a JSON object."""
    depth, at_member, end = 0, False, -1
    for token in _TOKEN.finditer(data):
        if token[1] is not None:
            if depth == 1 and token[2] is not None:
                at_member = from_json(token[1]) == name
        elif token[0] in b"{[":
            depth += 1
        else:
            depth -= 1
            if depth == 1 and at_member:
                end = token.start()
    return end


class EventSplicer:
    """Follows one event stream in whatever chunks it comes and splices its last JSON event.

    ``describe(response_id)`` is asked once, when the last JSON event is known: the carbon JSON to put in, or None.
    When a call raises, nothing of its chunk has been taken in: ``unsent`` and then the chunk are still to be sent.
    """

    __slots__ = ("_describe", "_identified", "_open", "_over", "_response_id", "unsent")

    def __init__(self, describe: Callable[[str | None], bytes | None]) -> None:
        self._describe = describe
        self._response_id: str | None = None
        self._identified = False
        self._over = False
        self._open = b""  # what has been sent of an event that has not ended yet
        self.unsent = b""  # what has come in since and is held back

    def feed(self, chunk: bytes, finished: bool, last: bool = False) -> list[bytes]:
        """What to send now. Until ``finished`` (the figures are final) that is every chunk at once.

        After it the last complete JSON event, and what follows it, waits for the next one, ``[DONE]`` or the last
        chunk.
        """
        if self._over:
            return [chunk]
        if finished:
            return self._hold(chunk, last)
        if self._identified and not self.unsent and chunk.endswith(b"\n\n"):
            self._open = b""
            return [chunk]
        return self._forward(chunk)

    def _forward(self, chunk: bytes) -> list[bytes]:
        text = self._open + self.unsent + chunk
        self._identify(text)
        pieces = [self.unsent, chunk] if self.unsent else [chunk]
        self._open, self.unsent = text[_ends(text)[-1] :], b""
        return pieces

    def _identify(self, text: bytes) -> None:
        """Take the response id from the first JSON event."""
        if self._identified:
            return
        for start, end in pairwise(_ends(text)):
            data = data_of(text[start:end])
            if data.lstrip().startswith(b"{"):
                self._response_id = id_of(parse_object(data) or {})
                self._identified = True
                return

    def _hold(self, chunk: bytes, last: bool) -> list[bytes]:
        text = self._open + self.unsent + chunk
        self._identify(text)
        ends = _ends(text)
        target: tuple[int, int] | None = None
        over = last
        for start, end in pairwise(ends):
            data = data_of(text[start:end]).strip()
            if data == b"[DONE]":
                over = True
                break
            if data.startswith(b"{"):
                target = start, end
        sent = len(self._open)
        if over:
            pieces = self._spliced(text, ends, target)
            self._over, self._open, self.unsent = True, b"", b""
        else:
            kept = target[0] if target else ends[-1]
            pieces = [text[start:end] for start, end in pairwise(ends) if end <= kept]
            self.unsent = text[max(kept, sent) :]
            if kept:
                self._open = b""
        if pieces:
            pieces[0] = pieces[0][sent:]
        return [piece for piece in pieces if piece]

    def _spliced(self, text: bytes, ends: list[int], target: tuple[int, int] | None) -> list[bytes]:
        """All of ``text``, one piece per event, the target with the carbon object."""
        pieces = [text[start:end] for start, end in pairwise([*ends, len(text)])]
        if target is None:
            return pieces
        index = ends.index(target[0])
        value = parse_object(data_of(pieces[index]))
        if value is None or KEY in value:
            return pieces
        carbon = self._describe(self._response_id or id_of(value))
        if carbon is not None:
            sent = len(self._open) if index == 0 else 0
            pieces[index] = splice_event(pieces[index], value, carbon, sent)
        return pieces


def _ends(text: bytes) -> list[int]:
    """0 and the positions after each complete event."""
    return [0, *(match.end() for match in _EVENT_END.finditer(text))]
