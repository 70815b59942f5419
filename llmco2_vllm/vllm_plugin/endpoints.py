"""The ``/carbon`` endpoints, in front of the server and behind its API key."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from typing import Any, NamedTuple

from llmco2_vllm.vllm_plugin.asgi import BODY, START, FrontEnd, Headers, Message, Receive, Scope, report
from llmco2_vllm.vllm_plugin.splice import parse_object

MAX_SWITCH_BYTES = 1024
_REQUESTS = "/carbon/requests/"
_READ = ("GET", "HEAD")
_METHODS = {"/carbon": _READ, "/carbon/hook": ("PUT",), "/carbon/live": _READ, "/carbon/live.json": _READ}


class _Answer(NamedTuple):
    status: int
    body: bytes
    headers: Headers = []
    content_type: bytes = b"application/json"


def is_ours(path: str) -> bool:
    """Whether an endpoint of ours stands at this path."""
    return path in _METHODS or (path.startswith(_REQUESTS) and path != _REQUESTS)


def _json_answer(status: int, content: Any, headers: Headers | None = None) -> _Answer:
    return _Answer(status, json.dumps(content).encode(), headers or [])


_NO_PAGE = _json_answer(404, {"error": 'the page is off; start the server with {"live": true}'})


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


async def answer(front_end: FrontEnd, scope: Scope, receive: Receive, path: str) -> list[Message]:
    """The messages that answer a call of the endpoint at ``path``."""
    try:
        found = await _answer(front_end, scope, receive, path)
    except Exception as error:
        # The id of a request is no place, and no label.
        report(front_end, path if path in _METHODS else _REQUESTS, error)
        found = _json_answer(500, {"error": "the carbon meter failed; see the log of the server"})
    length = (b"content-length", str(len(found.body)).encode())
    headers = [(b"content-type", found.content_type), length, *found.headers]
    return [
        {"type": START, "status": found.status, "headers": headers},
        {"type": BODY, "body": b"" if scope["method"] == "HEAD" else found.body},
    ]


async def _answer(front_end: FrontEnd, scope: Scope, receive: Receive, path: str) -> _Answer:
    methods = _METHODS.get(path, _READ)
    # The page itself holds no figures: it asks for the key, as a browser sends none with an address.
    if path != "/carbon/live" and not _authorized(scope):
        return _json_answer(401, {"error": "Unauthorized"})
    if scope["method"] not in methods:
        allow = ", ".join(methods)
        return _json_answer(405, {"error": f"{path} takes {allow}"}, [(b"allow", allow.encode())])
    if path == "/carbon":
        return _json_answer(200, await front_end.status())
    if path == "/carbon/hook":
        return await _switch(front_end, receive)
    if path == "/carbon/live":
        return _page(front_end)
    if path == "/carbon/live.json":
        return await _live(front_end)
    return await _find(front_end, path.removeprefix(_REQUESTS))


def _page(front_end: FrontEnd) -> _Answer:
    page = front_end.live_page()
    return _NO_PAGE if page is None else _Answer(200, page.body, page.headers, b"text/html; charset=utf-8")


async def _live(front_end: FrontEnd) -> _Answer:
    document = await front_end.live()
    return _NO_PAGE if document is None else _json_answer(200, document, [(b"cache-control", b"no-store")])


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
