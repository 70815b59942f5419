"""The splicer adds one member and changes no other byte, however the stream is cut.

The fuzz laws run over the middleware, so that message handling is under test with the text.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin import middleware, splice
from llmco2_vllm.vllm_plugin.middleware import Message
from llmco2_vllm.vllm_plugin.splice import EventSplicer, outline, parse_object, splice_event, splice_object
from tests.vllm_plugin.asgi import (
    CARBON,
    COLLABORATORS,
    FakeFrontEnd,
    body_messages,
    body_of,
    header,
    json_messages,
    read_stream,
    start,
    stream_messages,
    through,
    without_carbon,
)

VALUE = json.loads(CARBON)
# More than 10 000 bodies and streams in all; no deadline, because no law here depends on time.
quick = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}

texts = st.sampled_from(["", "a", "}", '"', '\\"}', "é", "😀\n\r", '"usage":{}', "data: x", "\\", "[DONE]"]) | st.text(
    max_size=6
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=3
)
keys = st.sampled_from(["id", "object", "usage", "choices", "response", "message", "Carbon"]) | texts
members = st.dictionaries(keys, values, max_size=3)
styles = st.sampled_from(
    [
        {"separators": (",", ":"), "ensure_ascii": False},
        {"separators": (" , ", " : ")},
        {"indent": 2, "ensure_ascii": False},
        {"indent": "\t"},
    ]
)
margins = st.sampled_from(["", " ", "\n", "\r\n\t "])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Text of a JSON object in some style, without a carbon member."""
    value = draw(members)
    if draw(st.booleans()):
        value["usage"] = draw(members)
        value["usage"].pop("carbon", None)
    value.pop("carbon", None)
    return (draw(margins) + json.dumps(value, **draw(styles)) + draw(margins)).encode()


@st.composite
def events(draw: st.DrawFn) -> tuple[str, bytes]:
    """One event with its kind, in any of the line ends."""
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))
    kind = draw(st.sampled_from(["json", "json", "json", "comment", "text", "broken", "list"]))
    if kind == "comment":
        return kind, b": ping" + end * draw(st.integers(1, 2))
    field = draw(st.sampled_from([b"data: ", b"data:"]))
    data = {"text": b"hello", "broken": b'{"a": }', "list": b"[{}]"}.get(kind) or draw(bodies()).strip()
    lines = [field + line for line in data.splitlines()] if kind == "json" else [field + data]
    if draw(st.booleans()):
        lines.insert(draw(st.sampled_from([0, len(lines)])), draw(st.sampled_from([b"event: x}", b"id: 7", b": {}"])))
    return kind, end.join(lines) + end + end


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Text up to and with the last event, and what follows: [DONE] or nothing, perhaps an event cut short."""
    text = b"".join(item for _, item in draw(st.lists(events(), max_size=4)))
    tail = draw(st.sampled_from([b"", b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n: bye\r\n\r\n", b"data: {"]))
    return text, tail


def cut(text: bytes, places: list[int]) -> list[bytes]:
    """``text`` in chunks; places are taken modulo its length."""
    marks = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(marks)]


cuts = st.lists(st.integers(0, 2**16), max_size=12)


def expected_events(text: bytes) -> list[bytes | dict[str, Any]]:
    """Events of a stream whose last JSON object has the carbon object, and its usage object too."""
    data: list[Any] = read_stream(text)
    ends = [index for index, item in enumerate(data) if item.strip() == b"[DONE]"]
    upto = ends[0] if ends else len(data)
    objects = [index for index in range(upto) if data[index].lstrip().startswith(b"{")]
    if objects and (value := parse_object(data[objects[-1]])) is not None:
        value = json.loads(data[objects[-1]])
        if isinstance(value.get("usage"), dict):
            value["usage"] = {**value["usage"], "carbon": VALUE}
        data[objects[-1]] = {**value, "carbon": VALUE}
    return data


def same_events(out: bytes, expected: list[bytes | dict[str, Any]]) -> bool:
    got = read_stream(out)
    return len(got) == len(expected) and all(
        json.loads(g) == e if isinstance(e, dict) else g == e for g, e in zip(got, expected, strict=True)
    )


@given(bodies(), st.integers(1, 3))
@settings(max_examples=3000, **quick)
def test_law_a_a_json_body_gets_one_member_and_keeps_every_byte(body: bytes, parts: int) -> None:
    out = through(json_messages(body, parts=parts), FakeFrontEnd())
    assert without_carbon(body_of(out)) == body
    assert json.loads(body_of(out)) == {**json.loads(body), "carbon": VALUE}
    assert list(json.loads(body_of(out)))[-1] == "carbon"
    assert header(out, b"content-length") == str(len(body_of(out))).encode()


@given(streams(), cuts)
@settings(max_examples=2500, **quick)
def test_law_b_a_finished_stream_gets_the_object_in_its_last_json_event_however_it_is_cut(
    stream: tuple[bytes, bytes], places: list[int]
) -> None:
    text = b"".join(stream)
    out = through(stream_messages(cut(text, places)), FakeFrontEnd())
    assert without_carbon(body_of(out)) == text
    assert same_events(body_of(out), expected_events(text))
    assert [m.get("more_body") for m in out[1:]] == [True] * (len(out) - 2) + [False]


@given(streams(), cuts, st.lists(st.booleans(), min_size=1, max_size=8))
@settings(max_examples=1500, **quick)
def test_law_b_holds_byte_for_byte_whenever_the_figures_become_final_or_open_again(
    stream: tuple[bytes, bytes], places: list[int], finished: list[bool]
) -> None:
    text = b"".join(stream)
    ledger = RequestLedger(finished=finished[0])

    def seen(index: int, out: list[Message]) -> None:
        if not ledger.finished:
            assert without_carbon(body_of(out)) == b"".join(chunks[:index])  # message 0 is the start
        ledger.finished = finished[(index + 1) % len(finished)]

    chunks = cut(text, places)
    out = through(stream_messages(chunks), FakeFrontEnd([ledger]), seen=seen)
    assert without_carbon(body_of(out)) == text
    changed = [g for g, e in zip(read_stream(body_of(out)), read_stream(text), strict=True) if g != e]
    assert len(changed) <= 1
    assert all(json.loads(item)["carbon"] == VALUE for item in changed)


@given(bodies(), st.sampled_from([0, 1, 2]), st.sampled_from(["\n", "\r\n", "\r"]))
@settings(max_examples=300, **quick)
def test_one_event_per_chunk_keeps_its_messages(body: bytes, before: int, end: str) -> None:
    data = b"".join(body.split(b"\n")).replace(b"\r", b"")
    chunks = [b"data: " + data + 2 * end.encode()] * (before + 1) + [b"data: [DONE]" + 2 * end.encode()]
    out = [m["body"] for m in through(stream_messages(chunks), FakeFrontEnd())[1:]]
    assert len(out) == len(chunks) + 1
    assert out[:before] + out[before + 1 :] == chunks[:before] + chunks[before + 1 :] + [b""]
    assert json.loads(out[before][6:])["carbon"] == VALUE


@given(
    st.binary(max_size=40) | bodies() | streams().map(b"".join),
    st.sampled_from(
        [
            start(b"text/plain"),
            start(b"application/octet-stream"),
            start(b"application/jsonl"),
            start(b"application/json", status=400),
            start(b"text/event-stream", status=500),
            start(b"application/json", (b"content-encoding", b"gzip")),
            start(b"text/event-stream", (b"Content-Encoding", b"br")),
            start(b"application/json", (b"content-digest", b"sha-256=:x:")),
            {"type": "http.response.start", "status": 200, "headers": []},
            {**start(b"application/json"), "trailers": True},
        ]
    ),
    cuts,
)
@settings(max_examples=1500, **quick)
def test_law_c_what_is_not_plain_json_or_events_passes_message_for_message(
    body: bytes, head: Message, places: list[int]
) -> None:
    messages = [head, *body_messages(cut(body, places) or [b""])]
    assert through(messages, FakeFrontEnd()) == messages


@given(st.binary(max_size=60), st.integers(1, 3))
@settings(max_examples=400, **quick)
def test_law_c_a_body_that_is_no_json_object_passes_message_for_message(body: bytes, parts: int) -> None:
    messages = json_messages(body, parts=parts)
    out = through(messages, FakeFrontEnd())
    assert (out == messages) == (parse_object(body) is None)


PLANTS: list[tuple[object, str]] = [
    (middleware, "outline"),
    (middleware, "splice_object"),
    (middleware, "EventSplicer"),
    (middleware, "_finished"),
    (middleware, "_media_type"),
    (splice, "data_of"),
    (splice, "id_of"),
    (splice, "parse_object"),
    (splice, "splice_event"),
    (splice, "_data_spans"),
    (splice, "_ends"),
    (splice, "_insert"),
    (splice, "_member_end"),
    (splice, "_position_in_event"),
    (middleware._Response, "_annotated"),
    (middleware._Response, "_describe"),
    (EventSplicer, "feed"),
    (EventSplicer, "_forward"),
    (EventSplicer, "_hold"),
    (EventSplicer, "_identify"),
    (EventSplicer, "_spliced"),
]


@given(streams(), cuts, st.sampled_from(PLANTS), st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=1000, **quick)
def test_law_d_a_failure_anywhere_in_our_code_loses_nothing(
    stream: tuple[bytes, bytes], places: list[int], plant: tuple[object, str], calls: int, finish: int
) -> None:
    text = b"".join(stream)
    owner, name = plant
    original = getattr(owner, name)
    left = [calls]

    def planted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError(f"planted in {name}")
        return original(*arguments)

    ledger = RequestLedger(finished=finish == 0)
    front_end = FakeFrontEnd([ledger])

    def seen(index: int, out: list[Message]) -> None:
        ledger.finished = index >= finish

    for messages in (stream_messages(cut(text, places)), json_messages(text)):
        ledger.finished = finish == 0
        annotated = through(messages, FakeFrontEnd([ledger]), seen=seen)
        ledger.finished = finish == 0
        with patch.object(owner, name, new=planted):
            out = through(messages, front_end, seen=seen)
        assert without_carbon(body_of(out)) == body_of(messages)
        # A failure costs the whole object, or comes after it has left.
        assert body_of(out) in (body_of(messages), body_of(annotated))
        assert out[-1].get("more_body") is False
        front_end.failures.clear()


@pytest.mark.parametrize("name", COLLABORATORS)
@pytest.mark.parametrize("counting_fails", [False, True])
@pytest.mark.parametrize(
    "messages", [json_messages(b'{"id":"a","usage":{}}', parts=2), stream_messages([b'data: {"id":"a"}\n\n'])]
)
def test_law_d_a_failing_collaborator_leaves_the_body_as_it_was(
    name: str, counting_fails: bool, messages: list[Message]
) -> None:
    failing = {name, "failed"} if counting_fails else {name}
    front_end = FakeFrontEnd(failing=frozenset(failing))
    out = through(messages, front_end)
    reached = name in front_end.calls
    assert len(front_end.failures) == reached
    if reached and name != "started":
        assert out == messages
    else:
        assert json.loads(body_of(out).removeprefix(b"data: "))["carbon"] == VALUE


@given(streams(), cuts)
@settings(max_examples=300, **quick)
def test_law_e_no_chunk_waits_before_the_figures_are_final(stream: tuple[bytes, bytes], places: list[int]) -> None:
    messages = stream_messages(cut(b"".join(stream), places))

    def seen(index: int, out: list[Message]) -> None:
        assert out == messages[: index + 1]

    assert through(messages, FakeFrontEnd([RequestLedger(finished=False)]), seen=seen) == messages


def fed(chunks: list[bytes]) -> tuple[list[list[bytes]], list[str | None]]:
    asked: list[str | None] = []

    def describe(response_id: str | None) -> bytes:
        asked.append(response_id)
        return CARBON

    splicer = EventSplicer(describe)
    return [splicer.feed(chunk, True, index == len(chunks) - 1) for index, chunk in enumerate(chunks)], asked


def test_at_most_one_json_event_is_held_back() -> None:
    first, second, done = b'data: {"id":"a"}\n\n', b'data: {"id":"b"}\n\n', b"data: [DONE]\n\n"
    sent, asked = fed([first, second, done, b""])
    spliced = b'data: {"id":"b","carbon":' + CARBON + b"}\n\n"
    assert sent == [[], [first], [spliced, done], [b""]]
    assert asked == ["a"]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (b'event: response.created\ndata: {"response":{"id":"a"}}\n\n', b'data: {"type":"response.completed"}\n\n'),
        (b'event: message_start\ndata: {"message":{"id":"a"}}\n\n', b'data: {"type":"message_stop"}\n\n'),
        (b'data: {"type":"ping"}\n\n', b'data: {"id":"a"}\n\n'),
    ],
)
def test_a_stream_is_known_by_the_id_of_its_first_json_event_or_of_its_last(first: bytes, last: bytes) -> None:
    sent, asked = fed([first, last, b""])
    assert asked == ["a"]
    assert b"".join(b"".join(pieces) for pieces in sent) == first + last[:-3] + b',"carbon":' + CARBON + b"}\n\n"


def test_the_usage_object_carries_a_copy_wherever_it_stands() -> None:
    event = b'data: {"a":{"usage":{}},\ndata: "\\u0075sage" : {"t":[{}]} , "z":"usage"}\n\n'
    value = parse_object(splice.data_of(event))
    assert value is not None
    out = splice_event(event, value, b"1")
    assert out == b'data: {"a":{"usage":{}},\ndata: "\\u0075sage" : {"t":[{}],"carbon":1} , "z":"usage","carbon":1}\n\n'


@pytest.mark.parametrize("usage", [b"null", b"3", b"[]", b'{"carbon":0}'])
def test_a_usage_that_is_no_object_or_knows_carbon_gets_no_copy(usage: bytes) -> None:
    event = b'data: {"usage":' + usage + b"}\n\n"
    out = splice_event(event, json.loads(event[6:]), b"1")
    assert out == b'data: {"usage":' + usage + b',"carbon":1}\n\n'


def test_what_has_been_sent_is_not_spliced_any_more() -> None:
    event = b'data: {"usage":{"a":1},"b":2}\n\n'
    value = json.loads(event[6:])
    assert splice_event(event, value, b"1", 25) == b'data: {"usage":{"a":1},"b":2,"carbon":1}\n\n'
    assert splice_event(event, value, b"1", len(event)) == event


def test_an_empty_object_gets_no_comma() -> None:
    assert splice_object(b" { } ", {}, b"1") == b' { "carbon":1} '


@pytest.mark.parametrize("body", [b'{"carbon":null}', b'{"c\\u0061rbon":1}', b"[]", b"1", b"", b'{"a":1} x'])
def test_a_body_with_carbon_or_without_an_object_stays_as_it_is(body: bytes) -> None:
    messages = json_messages(body)
    assert through(messages, FakeFrontEnd()) == messages
    events_with_it = stream_messages([b"data: " + body + b"\n\n"])
    assert body_of(through(events_with_it, FakeFrontEnd())) == body_of(events_with_it)


@settings(max_examples=500, **quick)
@given(bodies(), texts)
def test_a_large_body_is_spliced_as_a_small_one_without_being_parsed(body: bytes, response_id: str) -> None:
    value = json.loads(body)
    value.pop("id", None)
    body = json.dumps({"id": response_id, **value}, ensure_ascii=False).encode()
    with patch.object(splice, "LARGE_BYTES", 0):
        found = outline(body)
    assert found is not None
    if b'"carbon"' not in body and "\\" not in body.decode():
        assert found == {"id": response_id}
    assert splice_object(body, found, CARBON) == splice_object(body, json.loads(body), CARBON)


@pytest.mark.parametrize("body", [b"[" + b"1," * 9 + b"1]", b'"text"', b'{"carbon": 1, "id": "a"}', b'{"a": 1} [', b""])
def test_a_large_body_that_is_no_object_or_has_carbon_is_left_alone(body: bytes) -> None:
    with patch.object(splice, "LARGE_BYTES", 0):
        found = outline(body)
    assert found is None or "carbon" in found
