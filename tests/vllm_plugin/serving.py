"""A server in one process: scheduler, msgpack, output processor, middleware and a small HTTP application."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine.core import EngineCore

from llmco2_vllm.config import Settings
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.meters.discover import Discovery
from llmco2_vllm.vllm_plugin import flags, output_path
from llmco2_vllm.vllm_plugin.middleware import CarbonMiddleware, Message, Receive, Scope, Send
from tests.vllm_plugin import harness
from tests.vllm_plugin.asgi import body_messages, body_of, read_stream, scope, start
from tests.vllm_plugin.harness import Engine, Server, make_core_request


class EagerWindows(deque[MeterWindow]):
    """A meter that is read whenever somebody looks: a window at 100 W ends shortly before, within a step."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = monotonic()
        self._offered = False

    def __bool__(self) -> bool:
        end = self._begin + 0.9 * (monotonic() - self._begin)
        if not len(self) and not self._offered and end > self._begin:
            self.append(MeterWindow(0, self._begin, end, 100.0 * (end - self._begin)))
            self._begin = end
        self._offered = len(self) > 0
        return self._offered


class EagerSampler:
    """In place of the thread that reads a meter, so that a test's few milliseconds hold many windows."""

    fault = None

    def __init__(self) -> None:
        self.windows = EagerWindows()

    def state(self) -> dict[str, Any]:
        """One device."""
        return {"devices": [{"scope": "gpu"}]}


def open_eager_meter(*arguments: Any) -> Discovery:
    """In place of ``open_meter``, for the devices and for the host."""
    return Discovery(EagerSampler(), "eager", None)  # type: ignore[arg-type]


SETTINGS = Settings(intensity=100.0, auxiliary=0.1, pue=1.2, headers=True, switch=True, live=True)
# One answer per path: its requests, and whether it streams. Together they prefill in chunks, mix phases, decode
# steadily, preempt each other, sample in parallel and end by a stop string.
ANSWERS: dict[str, tuple[bool, list[dict[str, Any]]]] = {
    "/v1/two": (False, [{"prompt": 60, "max_tokens": 80}, {"prompt": 60, "max_tokens": 80}]),
    "/v1/parallel": (False, [{"prompt": 70, "max_tokens": 20, "n": 2}]),
    "/v1/stream": (True, [{"prompt": 40, "max_tokens": 30, "delta": True}]),
    "/v1/stop": (True, [{"prompt": 40, "max_tokens": 30, "delta": True, "stop": ["w25"], "detokenize": True}]),
}


def sample(request: Any) -> list[int]:
    """The words w20, w21, ...: what is said depends on the request alone."""
    return [20 + request.num_output_tokens]


class Deployment:
    """A server and a second one with drafts, with our meter or without; what clients got is in ``answers``."""

    def __init__(self, folder: Path, tokenizer: Any, carbon: bool) -> None:
        self.answers: list[Any] = []
        self.carbon = carbon
        self.server = self._server(folder, tokenizer, blocks=14, max_num_seqs=4, max_num_batched_tokens=64)
        drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        self.drafting = self._server(folder, tokenizer, speculative=drafting)
        self.app: Any = self._answer
        self.front_end: Any = output_path._front_end
        if carbon:
            client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=self._call_engine))
            if self.front_end is not None:
                self.front_end.engine_client = lambda: client
            self.app = CarbonMiddleware(self._answer)

    def _server(self, folder: Path, tokenizer: Any, blocks: int = 2000, **options: Any) -> Server:
        config = harness.make_config(folder, None, **options)
        if self.carbon:
            flags._enable(config, SETTINGS)
        return Server(Engine(harness.make_scheduler(config, blocks), sample=sample), tokenizer)

    @property
    def hooks(self) -> list[Any]:
        """The hooks of both engines, those that started."""
        schedulers = (self.server.engine.scheduler, self.drafting.engine.scheduler)
        return [hook for s in schedulers if (hook := getattr(s, "llmco2_hook", None)) is not None]

    async def _call_engine(self, method: str, *arguments: Any) -> list[Any]:
        engine_core = SimpleNamespace(scheduler=self.server.engine.scheduler)
        return [getattr(EngineCore, method)(engine_core, *arguments)]

    # -- the server's own application -------------------------------------------------------

    async def _answer(self, request: Scope, receive: Receive, send: Send) -> None:
        if request["path"] == "/metrics":
            messages = [start(b"text/plain"), *body_messages([b"vllm:x 1\n"])]
        elif request["path"] not in ANSWERS:
            messages = [start(b"text/plain", status=404), *body_messages([b"not found"])]
        else:
            streams, jobs = ANSWERS[request["path"]]
            for number, job in enumerate(jobs):
                self._add(f"{request['path']}-{number}", dict(job))
            if streams:
                await self._stream(send)
                return
            tokens = [[list(part.token_ids) for part in output.outputs] for output in self._run()]
            body = {"id": request["path"], "tokens": tokens, "usage": {"total_tokens": len(tokens)}}
            messages = [start(b"application/json"), *body_messages([json.dumps(body).encode()])]
        for message in messages:
            await send(message)

    def _add(self, request_id: str, job: dict[str, Any]) -> None:
        request = make_core_request(request_id, list(range(10, 10 + job.pop("prompt"))), **job)
        (self.server.add_parallel if request.sampling_params.n > 1 else self.server.add)(request)

    def _run(self) -> list[Any]:
        before = len(self.server.delivered)
        return self.server.run()[before:]

    async def _stream(self, send: Send) -> None:
        await send(start(b"text/event-stream"))
        while self.server.engine.scheduler.has_requests():
            for output in self.server.step():
                [part] = output.outputs
                event = {"id": output.request_id, "text": part.text, "reason": part.finish_reason}
                if output.finished:
                    event["usage"] = {"tokens": len(part.token_ids)}
                text = b"data: " + json.dumps(event).encode() + b"\n\n"
                for chunk in (text[:20], text[20:]):  # events need not end where chunks do
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        for message in body_messages([b"data: [DONE]\n\n", b""]):
            await send(message)

    # -- its clients --------------------------------------------------------------------------

    async def _get(self, path: str, method: str = "POST", body: bytes = b"") -> None:
        out: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            out.append(message)

        await self.app(scope(path, method), receive, send)
        if not path.startswith("/carbon"):
            self.answers.append((path, out[0]["status"], content(body_of(out))))

    async def _serve(self) -> None:
        await self._get("/metrics", "GET")
        for path in ANSWERS:
            await self._get(path)
        if self.carbon:
            for path in ("/carbon", "/carbon/live", "/carbon/live.json"):
                await self._get(path, "GET")
            await self._get("/carbon/requests/%2Fv1%2Ftwo", "GET")
            for position in (b'{"on": false}', b'{"on": true}'):
                await self._get("/carbon/hook", "PUT", position)
        await self._get("/v1/two")
        await asyncio.sleep(0)  # the task that pulls the engine's figures has its turn
        await self._get("/metrics", "GET")

    def serve(self) -> list[Any]:
        """Everything the clients got, our object taken out."""
        asyncio.run(self._serve())
        self._leave()
        self._draft()
        return self.answers

    def _leave(self) -> None:
        self.server.add(make_core_request("leaves", 30, max_tokens=100))
        for _ in range(5):
            self.server.step()
        self.server.abort("leaves")
        self.answers.append(len(self._run()))

    def _draft(self) -> None:
        scheduler = self.drafting.engine.scheduler
        self.drafting.add(make_core_request("drafts", 20, max_tokens=10))
        while scheduler.has_requests():
            for request in scheduler.running:
                if request.num_computed_tokens >= request.num_prompt_tokens:
                    request.spec_token_ids = [5, 5, 5]
            self.drafting.step()
        self.answers.append([list(output.outputs[0].token_ids) for output in self.drafting.delivered])


def content(body: bytes) -> Any:
    """A body without our object: a JSON object, the events of a stream, or the bytes."""
    if body.startswith(b"{"):
        return without_carbon(json.loads(body))
    if body.startswith(b"data:"):
        return [without_carbon(json.loads(e)) if e.startswith(b"{") else e for e in read_stream(body)]
    return body


def without_carbon(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` as the server made it."""
    usage = {key: item for key, item in value.get("usage", {}).items() if key != "carbon"}
    return {key: item for key, item in value.items() if key != "carbon"} | ({"usage": usage} if usage else {})
