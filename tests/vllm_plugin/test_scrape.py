"""A scrape with our text in front: all of ours and all of the host's, in every form, or what the library makes."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, make_asgi_app
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from llmco2_vllm.telemetry.exposition import FAMILIES
from llmco2_vllm.vllm_plugin.asgi import App, Message, Receive, Scope, Send
from llmco2_vllm.vllm_plugin.middleware import CarbonMiddleware
from tests.vllm_plugin.asgi import FakeFrontEnd, body_messages, body_of, header, scope, start
from tests.vllm_plugin.test_fail_open import ELSEWHERE, FUNCTIONS, GUARDS, plant

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}


class Host:
    """A server whose registry holds families of its own and ours."""

    def __init__(self) -> None:
        self.registry, self._own, self._ours = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
        self.requests = Counter("vllm:requests", "Requests.", ("engine",), registry=self.registry)
        self._own.register(self.requests)
        self.joules = FAMILIES[Counter]("llmco2_joules_total", "Energy.", ("engine",), registry=self.registry)
        self.watts = FAMILIES[Gauge]("llmco2_watts", "Power.", ("engine",), registry=self.registry)
        self.seconds = FAMILIES[Histogram]("llmco2_seconds", "Time.", ("engine",), registry=self.registry)
        for family in (self.joules, self.watts, self.seconds):
            self._ours.register(family)
        self.front_end = FakeFrontEnd()
        self.work()

    def work(self) -> None:
        """Something has happened since the last scrape."""
        self.requests.labels("0").inc()
        self.joules.labels("0").inc(1.5e6)
        self.watts.labels("0").set(300.25)
        self.seconds.labels("0").observe(0.3)

    def ours(self, openmetrics: bool = False) -> bytes:
        if openmetrics:
            return generate_openmetrics(self._ours).removesuffix(b"# EOF\n")
        return generate_latest(self._ours)

    def own(self) -> bytes:
        return generate_latest(self._own)

    def text(self) -> bytes:
        """A whole scrape, our lines first."""
        return self.ours() + self.own()

    def answers(self, *headers: tuple[bytes, bytes], kind: bytes = b"text/plain", parts: int = 1) -> App:
        """An application that renders the registry under these headers, encoded if they say gzip."""

        async def app(request: Scope, receive: Receive, send: Send) -> None:
            body = generate_latest(self.registry)
            body = gzip.compress(body) if (b"content-encoding", b"gzip") in headers else body
            size = -(-len(body) // parts)
            chunks = [body[at : at + size] for at in range(0, len(body), size)]
            for message in (start(kind, *headers), *body_messages(chunks)):
                await send(message)

        return app

    def served(self, app: App) -> CarbonMiddleware:
        return CarbonMiddleware(app, self.front_end)


async def get(app: App, path: str = "/metrics", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://host") as client:
        return await client.get(path, **options)


async def messages(app: App, request: Scope | None = None) -> list[Message]:
    """What the client gets, message for message."""
    out: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        out.append(message)

    await app(request or scope("/metrics", "GET"), receive, send)
    return out


async def assert_left_to_the_library(host: Host, app: App, failures: Sequence[str] = ()) -> None:
    """The next scrapes are whole, and rendered by the library alone."""
    for _ in range(2):
        host.work()
        assert body_of(await messages(app)) == generate_latest(host.registry)
    assert host.front_end.failures == list(failures)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("accept", [{}, OPENMETRICS, {"accept": "text/plain;version=1.0.0;escaping=allow-utf-8"}])
async def test_a_scrape_of_the_hosts_own_routes_is_whole(
    monkeypatch: pytest.MonkeyPatch, host: Host, path: str, encoding: str, accept: dict[str, str]
) -> None:
    from vllm.entrypoints.serve.instrumentator import metrics

    monkeypatch.setattr(metrics, "get_prometheus_registry", lambda: host.registry)
    server = FastAPI()
    metrics.attach_router(server)
    for _ in range(3):
        host.work()
        answer = await get(host.served(server), path, headers={**accept, "accept-encoding": encoding})
        openmetrics = "openmetrics" in answer.headers["content-type"]
        assert openmetrics == (accept is OPENMETRICS and path == "/metrics/")
        assert answer.content.startswith(host.ours(openmetrics))
        library = (generate_openmetrics if openmetrics else generate_latest)(host.registry)
        assert sorted(answer.content.splitlines()) == sorted(library.splitlines())
        assert answer.content.endswith(b"# EOF\n") == openmetrics
    assert host.front_end.failures == []


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("announced", [True, False])
async def test_a_scrape_of_any_form_is_whole(host: Host, parts: int, gzipped: bool, announced: bool) -> None:
    headers = [(b"content-encoding", b"gzip")] * gzipped + [(b"Content-Length", b"7")] * announced
    app = host.served(host.answers(*headers, parts=parts))
    for _ in range(2):
        host.work()
        out = await messages(app)
        body = body_of(out)
        assert (gzip.decompress(body) if gzipped else body) == host.text()
        assert header(out, b"content-length") == (str(len(body)).encode() if announced else None)
        assert [m.get("more_body", False) for m in out[1:]][-1] is False
    assert host.front_end.failures == []


async def test_a_compressed_scrape_is_one_member_for_clients_that_read_one(host: Host) -> None:
    out = await messages(host.served(host.answers((b"content-encoding", b"gzip"))))
    reader = zlib.decompressobj(wbits=31)
    assert reader.decompress(body_of(out)) == host.text()
    assert (reader.eof, reader.unused_data) == (True, b"")


async def test_a_scrape_of_some_families_is_the_librarys(host: Host) -> None:
    app = make_asgi_app(host.registry)
    query = "/metrics?name[]=llmco2_watts&name[]=vllm:requests_total"
    plain = await get(app, query)
    assert b"llmco2_watts{" in plain.content and b"llmco2_joules" not in plain.content
    answer = await get(host.served(app), query)
    assert sorted(answer.content.splitlines()) == sorted(plain.content.splitlines())


@pytest.mark.parametrize("escaping", ["dots", "values"])
async def test_a_scrape_that_renames_families_is_the_librarys(host: Host, escaping: str) -> None:
    app, served = make_asgi_app(host.registry), host.served(make_asgi_app(host.registry))
    headers = {"accept": f"application/openmetrics-text;version=1.0.0;escaping={escaping}"}
    assert (await get(served, headers=headers)).content == (await get(app, headers=headers)).content
    assert (await get(served)).content == host.text()


@pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS"])
async def test_other_methods_pass_message_for_message(host: Host, method: str) -> None:
    app, request = host.answers(), scope("/metrics", method)
    assert await messages(host.served(app), request) == await messages(app, request)


async def test_an_error_page_passes_as_it_is(host: Host) -> None:
    async def failing(request: Scope, receive: Receive, send: Send) -> None:
        generate_latest(host.registry)
        for message in (start(b"text/plain", status=503), *body_messages([b"busy"])):
            await send(message)

    out = await messages(host.served(failing))
    assert (out[0]["status"], body_of(out), host.front_end.failures) == (503, b"busy", [])


async def test_a_server_without_our_families_is_left_alone(host: Host) -> None:
    app = make_asgi_app(CollectorRegistry())
    assert (await get(host.served(app))).content == b""
    assert host.front_end.failures == []


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([(b"content-encoding", b"br")], b"text/plain"),
        ([(b"content-encoding", b"gzip, br")], b"text/plain"),
        ([(b"ETag", b'"1"')], b"text/plain"),
        ([(b"content-digest", b"sha-256=:x:")], b"text/plain"),
        ([], b"application/vnd.google.protobuf"),
        ([], b"text/plain; version=1.0.0; escaping=dots"),
    ],
)
async def test_an_answer_with_no_place_for_ours_passes_and_the_next_is_the_librarys(
    host: Host, headers: list[tuple[bytes, bytes]], kind: bytes
) -> None:
    app = host.served(host.answers(*headers, kind=kind))
    assert body_of(await messages(app)) == host.own()
    assert [failure.partition(":")[0] for failure in host.front_end.failures] == ["metrics"]
    await assert_left_to_the_library(host, app, host.front_end.failures)


@pytest.mark.parametrize("wrong", [b"no gzip", gzip.compress(b"a 1\n") * 2, gzip.compress(b"a 1\n")[:-3]])
async def test_a_body_that_is_not_what_it_is_said_to_be_passes(host: Host, wrong: bytes) -> None:
    async def app(request: Scope, receive: Receive, send: Send) -> None:
        generate_latest(host.registry)
        for message in (start(b"text/plain", (b"content-encoding", b"gzip")), *body_messages([wrong])):
            await send(message)

    assert body_of(await messages(host.served(app))) == wrong
    assert len(host.front_end.failures) == 1


async def test_a_body_sent_as_a_file_passes_message_for_message(host: Host) -> None:
    sent = [start(b"text/plain"), {"type": "http.response.pathsend", "path": "metrics.txt"}]

    async def app(request: Scope, receive: Receive, send: Send) -> None:
        generate_latest(host.registry)
        for message in sent:
            await send(message)

    assert await messages(host.served(app)) == sent
    assert len(host.front_end.failures) == 1


async def test_families_that_are_collected_after_the_answer_are_the_librarys_next_time(host: Host) -> None:
    async def app(request: Scope, receive: Receive, send: Send) -> None:
        for message in (start(b"text/plain"), *body_messages([b"a 1\n"])):
            await send(message)
        texts.append(generate_latest(host.registry))

    texts: list[bytes] = []
    served = host.served(app)
    for _ in range(2):
        assert body_of(await messages(served)) == b"a 1\n"
    assert texts == [host.own(), generate_latest(host.registry)]
    assert len(host.front_end.failures) == 1


async def test_a_client_that_leaves_costs_nothing(host: Host) -> None:
    gone, chunked = True, host.answers(parts=3)

    async def app(request: Scope, receive: Receive, send: Send) -> None:
        if gone:
            generate_latest(host.registry)
        else:
            await chunked(request, receive, send)

    served = host.served(app)
    assert await messages(served) == []
    gone = False
    assert body_of(await messages(served)) == host.text()
    assert host.front_end.failures == []


async def test_a_server_that_stops_in_the_middle_passes_as_it_is(host: Host) -> None:
    sent = [start(b"text/plain"), *body_messages([b"a 1\n", b""])][:-1]

    async def app(request: Scope, receive: Receive, send: Send) -> None:
        generate_latest(host.registry)
        for message in sent:
            await send(message)

    assert await messages(host.served(app)) == sent
    assert host.front_end.failures == []


async def test_an_error_of_the_server_passes_and_its_error_page_can_still_be_sent(host: Host) -> None:
    out: list[Message] = []

    async def app(request: Scope, receive: Receive, send: Send) -> None:
        generate_latest(host.registry)
        await send(start(b"text/plain"))
        raise ValueError("of the server")

    async def send(message: Message) -> None:
        out.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ValueError, match="of the server"):
        await host.served(app)(scope("/metrics", "GET"), receive, send)
    assert out == []
    assert b"llmco2_joules" in generate_latest(host.registry), "the library has ours again"


async def test_scrapes_at_the_same_time_are_whole_each(host: Host) -> None:
    async def app(request: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        body = await asyncio.to_thread(generate_latest, host.registry)
        await asyncio.sleep(0)
        for message in (start(b"text/plain"), *body_messages([body])):
            await send(message)

    served = host.served(app)
    plain = host.text()
    answers = await asyncio.gather(*(messages(served) for _ in range(5)), messages(app))
    assert [body_of(answer) for answer in answers[:-1]] == [plain] * 5
    assert body_of(answers[-1]) == generate_latest(host.registry)


# Without those that hold the guard or are in the library's hands (test_fail_open.py).
NOT_PLANTED = GUARDS.keys() | {name for name, why in ELSEWHERE.items() if "library's hands" in why}
PLANTED = sorted(
    name for name in FUNCTIONS.keys() - NOT_PLANTED if name.startswith(("telemetry.exposition.", "vllm_plugin.scrape."))
)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("gzipped", [True, False])
async def test_a_failure_of_ours_costs_one_scrape_our_figures_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, name: str, gzipped: bool
) -> None:
    host = Host()
    headers = [(b"content-encoding", b"gzip")] * gzipped
    app = host.served(host.answers(*headers))
    request = scope("/metrics", "GET", headers=[(b"accept", b"text/plain")])
    plant(monkeypatch, name)
    for _ in range(3):
        failed = bool(host.front_end.failures)
        body = body_of(await messages(app, request))
        body = gzip.decompress(body) if gzipped else body
        library = generate_latest(host.registry)
        if host.front_end.failures:
            assert body in ((library,) if failed else (host.own(), library))
        else:
            assert body == host.text()
        for _ in range(10):  # counts get wider
            host.work()
    reached = gzipped or name != "vllm_plugin.scrape._gzipped"
    assert host.front_end.failures == ["metrics: planted"] * reached
    monkeypatch.undo()


SEVERAL_SERVERS = """
import asyncio, sys
from prometheus_client import CollectorRegistry, multiprocess, generate_latest, make_asgi_app
from llmco2_vllm.telemetry.metrics import Identity, Recorder
from tests.vllm_plugin.test_scrape import FakeFrontEnd, CarbonMiddleware, messages, body_of
from llmco2_vllm.telemetry.exposition import leave_out
recorder = Recorder(Identity("m", "0", "0"))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
front_end = FakeFrontEnd()
app = CarbonMiddleware(make_asgi_app(registry), front_end)
for joules in (1.0, 2.0):
    recorder.request_finished(0, joules)
    body = body_of(asyncio.run(messages(app)))
    assert body == generate_latest(registry), body
assert b'llmco2_request_predicted_energy_joules_sum{engine="0",model_name="m"} 3.0' in body, body
assert front_end.failures == []
"""


def test_with_several_api_servers_the_library_merges_their_figures(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SEVERAL_SERVERS]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert answer.returncode == 0, answer.stderr
