"""The middleware at its edges: endpoints, keys, unknown messages, servers that fail, clients that go."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin.middleware import CarbonMiddleware, Message, Receive, Scope, Send
from tests.vllm_plugin.asgi import (
    CARBON,
    FakeFrontEnd,
    body_messages,
    body_of,
    collecting,
    header,
    json_messages,
    nothing,
    replaying,
    run,
    scope,
    start,
    stream_messages,
    through,
)

APP_ANSWER = [start(b"text/plain"), *body_messages([b"from the server"])]


def ask(front_end: FakeFrontEnd, path: str, method: str = "GET", body: bytes = b"", **more: Any) -> tuple[int, Any]:
    """Status and JSON of one of our endpoints; text of the server's own answer."""
    messages: list[Message] = []
    received = iter(
        {"type": "http.request", "body": body[at : at + 5], "more_body": at + 5 < len(body)}
        for at in range(0, max(1, len(body)), 5)
    )

    async def receive() -> Message:
        return next(received)

    app = CarbonMiddleware(replaying(APP_ANSWER), front_end)
    run(app(scope(path, method, **more), receive, collecting(messages)))
    content = body_of(messages)
    ours = header(messages, b"content-type") == b"application/json"
    return messages[0]["status"], json.loads(content) if ours and content else content


def keyed(*keys: str, token: str | None = None, scheme: str = "Bearer") -> dict[str, Any]:
    headers = [] if token is None else [(b"authorization", f"{scheme} {token}".encode())]
    args = SimpleNamespace(api_key=list(keys) or None)
    return {"app": SimpleNamespace(state=SimpleNamespace(args=args)), "headers": headers}


def test_the_status_is_what_the_front_end_says() -> None:
    assert ask(FakeFrontEnd(), "/carbon") == (200, {"on": True})


def test_a_finished_response_can_be_looked_up_by_its_id() -> None:
    front_end = FakeFrontEnd()
    through(json_messages(b'{"id":"chatcmpl-1","usage":null}'), front_end)
    expected = {"id": "chatcmpl-1", "carbon": json.loads(CARBON)}
    assert ask(front_end, "/carbon/requests/chatcmpl-1") == (200, expected)


def test_a_streamed_response_is_remembered_under_its_first_id() -> None:
    front_end = FakeFrontEnd()
    through(stream_messages([b'data: {"response":{"id":"resp_1"}}\n\n', b'data: {"item":{"id":"x"}}\n\n']), front_end)
    assert front_end.remembered == {"resp_1": CARBON.decode()}


def test_an_unknown_response_is_not_found_and_the_answer_names_it() -> None:
    status, answer = ask(FakeFrontEnd(), "/carbon/requests/chatcmpl-2")
    assert status == 404
    assert "chatcmpl-2" in answer["error"]


@pytest.mark.parametrize("on", [True, False])
def test_the_hook_can_be_switched(on: bool) -> None:
    assert ask(FakeFrontEnd(), "/carbon/hook", "PUT", json.dumps({"on": on}).encode()) == (200, {"on": on})


def test_switching_is_refused_where_it_is_not_allowed() -> None:
    assert ask(FakeFrontEnd(may_switch=False), "/carbon/hook", "PUT", b'{"on":true}')[0] == 403


@pytest.mark.parametrize(
    "body", [b"", b"true", b"{}", b'{"on":1}', b'{"on":true,"off":1}', b'{"on":true}' + b" " * 2000]
)
def test_a_switch_without_a_clear_position_changes_nothing(body: bytes) -> None:
    front_end = FakeFrontEnd()
    assert ask(front_end, "/carbon/hook", "PUT", body)[0] == 400
    assert "switch" not in front_end.calls


def test_a_client_that_leaves_while_switching_changes_nothing() -> None:
    front_end, out = FakeFrontEnd(), []
    run(CarbonMiddleware(replaying([]), front_end)(scope("/carbon/hook", "PUT"), nothing, collecting(out)))
    assert out[0]["status"] == 400
    assert "switch" not in front_end.calls


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/carbon", "POST"),
        ("/carbon", "OPTIONS"),
        ("/carbon/requests/a", "DELETE"),
        ("/carbon/hook", "GET"),
        ("/carbon/live", "POST"),
        ("/carbon/live.json", "PUT"),
    ],
)
def test_other_methods_are_refused(path: str, method: str) -> None:
    status, answer = ask(FakeFrontEnd(), path, method)
    assert status == 405
    assert path in answer["error"]


def test_a_head_request_gets_the_headers_alone() -> None:
    out: list[Message] = []
    run(CarbonMiddleware(replaying([]), FakeFrontEnd())(scope("/carbon", "HEAD"), nothing, collecting(out)))
    assert header(out, b"content-length") == str(len('{"on": true}')).encode()
    assert body_of(out) == b""


def test_the_page_needs_no_key_and_its_figures_do() -> None:
    front_end = FakeFrontEnd()
    status, body = ask(front_end, "/carbon/live", **keyed("right"))
    assert (status, body[:15]) == (200, b"<!DOCTYPE html>")
    assert ask(front_end, "/carbon/live.json", **keyed("right"))[0] == 401
    assert ask(front_end, "/carbon/live.json", **keyed("right", token="right")) == (200, front_end.document)
    assert front_end.calls == ["started", "live_page", "started", "started", "live"]


@pytest.mark.parametrize("path", ["/carbon/live", "/carbon/live.json"])
def test_without_the_setting_there_is_no_page_and_the_answer_names_the_setting(path: str) -> None:
    status, answer = ask(FakeFrontEnd(document=None), path)
    assert status == 404
    assert '{"live": true}' in answer["error"]


def test_figures_are_never_kept_by_a_cache() -> None:
    out: list[Message] = []
    run(CarbonMiddleware(replaying([]), FakeFrontEnd())(scope("/carbon/live.json", "GET"), nothing, collecting(out)))
    assert header(out, b"cache-control") == b"no-store"


@pytest.mark.parametrize("path", ["/carbon/other", "/carbonara", "/carbon/requests/", "/v1/carbon"])
def test_other_paths_belong_to_the_server(path: str) -> None:
    assert ask(FakeFrontEnd(), path) == (200, b"from the server")


def test_the_endpoints_stand_below_the_root_path() -> None:
    assert ask(FakeFrontEnd(), "/llm/carbon", root_path="/llm") == (200, {"on": True})
    assert ask(FakeFrontEnd(), "/carbon", root_path="/carbon") == (200, {"on": True})
    assert ask(FakeFrontEnd(), "/llmcarbon", root_path="/llm") == (200, b"from the server")


@pytest.mark.parametrize(
    ("method", "path", "verb"),
    [
        ("status", "/carbon", "GET"),
        ("find", "/carbon/requests/a", "GET"),
        ("switch", "/carbon/hook", "PUT"),
        ("live_page", "/carbon/live", "GET"),
        ("live", "/carbon/live.json", "GET"),
    ],
)
def test_a_failing_endpoint_says_so_and_is_counted(method: str, path: str, verb: str) -> None:
    front_end = FakeFrontEnd(failing=frozenset({method}))
    assert ask(front_end, path, verb, b'{"on":true}')[0] == 500
    place = path.removesuffix("a")  # the id is in no label and no line of the log
    assert front_end.failures == [f"{place}: planted in {method}"]


PRIVATE = [
    ("/carbon", "GET"),
    ("/carbon/requests/a", "GET"),
    ("/carbon/hook", "PUT"),
    ("/carbon", "POST"),
    ("/carbon/live.json", "GET"),
]


@pytest.mark.parametrize(("path", "method"), PRIVATE)
@pytest.mark.parametrize(
    "credentials",
    [
        keyed("right", "other"),
        keyed("right", token="wrong"),
        keyed("right", token=""),
        keyed("right", token="right", scheme="Basic"),
        keyed("right", token="righ\xe9"),
        keyed("right", token="right "),
    ],
)
def test_with_a_key_the_endpoints_are_closed_to_others(path: str, method: str, credentials: dict[str, Any]) -> None:
    front_end = FakeFrontEnd()
    assert ask(front_end, path, method, b'{"on":false}', **credentials) == (401, {"error": "Unauthorized"})
    assert front_end.calls == ["started"]


@pytest.mark.parametrize("token", ["right", "other"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_any_of_the_keys_opens_the_endpoints(token: str, scheme: str) -> None:
    assert ask(FakeFrontEnd(), "/carbon", **keyed("right", "other", token=token, scheme=scheme))[0] == 200


def test_a_key_of_the_environment_counts_unless_the_command_line_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert ask(FakeFrontEnd(), "/carbon")[0] == 401
    assert ask(FakeFrontEnd(), "/carbon", app=None)[0] == 401
    assert ask(FakeFrontEnd(), "/carbon", **keyed(token="from-environment"))[0] == 200
    assert ask(FakeFrontEnd(), "/carbon", **keyed("right", token="from-environment"))[0] == 401
    assert ask(FakeFrontEnd(), "/carbon", **keyed("right", token="right"))[0] == 200


def test_a_single_key_given_as_text_is_one_key() -> None:
    credentials = keyed(token="r")
    credentials["app"].state.args.api_key = "right"
    assert ask(FakeFrontEnd(), "/carbon", **credentials)[0] == 401


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "unknown"])
async def test_other_scopes_reach_the_server_with_its_own_send_and_receive(kind: str) -> None:
    seen: list[tuple[Any, ...]] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    front_end = FakeFrontEnd()
    arguments: tuple[Scope, Receive, Send] = ({"type": kind}, nothing, collecting([]))
    await CarbonMiddleware(app, front_end)(*arguments)
    assert seen == [arguments]
    assert front_end.calls == (["started"] if kind == "lifespan" else [])


def test_the_front_end_is_told_once_that_the_server_runs() -> None:
    front_end = FakeFrontEnd()
    app = CarbonMiddleware(replaying(APP_ANSWER), front_end)
    for _ in range(3):
        run(app(scope(), nothing, collecting([])))
    assert front_end.calls.count("started") == 1


def test_headers_are_added_to_responses_that_are_not_streamed() -> None:
    front_end = FakeFrontEnd(headers=[(b"x-carbon-gco2e", b"0.1")])
    out = through(json_messages(b'{"a":1}', (b"x-request-id", b"7")), front_end)
    assert (header(out, b"x-carbon-gco2e"), header(out, b"x-request-id")) == (b"0.1", b"7")
    assert header(through(stream_messages([b"data: {}\n\n"]), front_end), b"x-carbon-gco2e") is None


@pytest.mark.parametrize("messages", [json_messages(b'{"id":"a"}', parts=2), stream_messages([b"data: {}\n\n"])])
@pytest.mark.parametrize(
    "front_end",
    [
        FakeFrontEnd(ledgers=[]),
        FakeFrontEnd(annotation=None),
        FakeFrontEnd(ledgers=[RequestLedger(finished=True), RequestLedger(finished=False)]),
    ],
)
def test_without_final_figures_the_response_passes_message_for_message(
    messages: list[Message], front_end: FakeFrontEnd
) -> None:
    assert through(messages, front_end) == messages
    assert not front_end.remembered


def test_a_stream_that_announced_its_length_keeps_it() -> None:
    chunks = [b'data: {"id":"a"}\n\n', b"data: [DONE]\n\n"]
    messages = stream_messages(chunks)
    length = (b"content-length", str(sum(map(len, chunks))).encode())
    messages[0] = {**messages[0], "headers": [*messages[0]["headers"], length]}
    assert through(messages, FakeFrontEnd()) == messages


def test_a_body_that_is_sent_as_a_file_passes_message_for_message() -> None:
    messages = [*json_messages(b"{}")[:1], {"type": "http.response.pathsend", "path": "answer.json"}]
    assert through(messages, FakeFrontEnd()) == messages


def test_an_unknown_message_in_between_ends_our_part() -> None:
    head, first, last = json_messages(b'{"a":1}', parts=2)
    messages = [head, first, {"type": "http.response.unknown"}, last]
    assert through(messages, FakeFrontEnd()) == messages


def test_a_server_that_stops_in_the_middle_loses_nothing() -> None:
    for messages in (json_messages(b'{"a":1}', parts=2)[:-1], stream_messages([b'data: {"a":1}\n\n'])[:-1]):
        assert through(messages, FakeFrontEnd()) == messages


@pytest.mark.parametrize("messages", [json_messages(b'{"a":1}', parts=2), stream_messages([b'data: {"a":1}\n\n'])])
def test_an_error_of_the_server_passes_after_what_it_had_sent(messages: list[Message]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await replaying(messages[:-1])(scope, receive, send)
        raise ValueError("of the server")

    out: list[Message] = []
    with pytest.raises(ValueError, match="of the server"):
        run(CarbonMiddleware(app, FakeFrontEnd())(scope(), nothing, collecting(out)))
    assert out == messages[:-1]


def test_an_error_of_the_connection_is_the_servers_to_see() -> None:
    front_end = FakeFrontEnd()
    seen: list[BaseException] = []

    async def broken(message: Message) -> None:
        raise OSError("client gone")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await replaying(json_messages(b'{"a":1}'))(scope, receive, send)
        except OSError as error:
            seen.append(error)
            raise

    with pytest.raises(OSError, match="client gone"):
        run(CarbonMiddleware(app, front_end)(scope(), nothing, broken))
    assert len(seen) == 1
    assert front_end.failures == []


async def test_a_cancelled_request_is_cancelled_and_sends_nothing_more() -> None:
    out: list[Message] = []
    waiting = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await replaying(stream_messages([b'data: {"a":1}\n\n'])[:-1])(scope, receive, send)
        waiting.set()
        await asyncio.Event().wait()

    front_end = FakeFrontEnd()
    call = asyncio.ensure_future(CarbonMiddleware(app, front_end)(scope(), nothing, collecting(out)))
    await waiting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [message["type"] for message in out] == ["http.response.start"]
    assert front_end.failures == []


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_a_scrape_refreshes_the_metrics_first(path: str) -> None:
    front_end, out = FakeFrontEnd(), []
    await CarbonMiddleware(replaying(APP_ANSWER), front_end)(scope(path, "GET"), nothing, collecting(out))
    assert out == APP_ANSWER
    assert front_end.calls == ["started", "refresh_metrics"]


async def test_a_scrape_is_answered_when_the_refresh_fails_or_hangs() -> None:
    class Hanging(FakeFrontEnd):
        async def refresh_metrics(self) -> None:
            await asyncio.Event().wait()

    for front_end in (FakeFrontEnd(failing=frozenset({"refresh_metrics"})), Hanging()):
        out: list[Message] = []
        await CarbonMiddleware(replaying(APP_ANSWER), front_end)(scope("/metrics", "GET"), nothing, collecting(out))
        assert out == APP_ANSWER
