"""Real requests through the official ``openai`` client, each with the ``carbon`` object of its response."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import httpx
from openai import DefaultHttpxClient, OpenAI, OpenAIError

from llmco2_vllm.demo.preflight import DemoError

AT_ONCE = 8
METRICS_SECONDS = 15.0
ABORTED = "llmco2_predicted_aborted_energy_joules_total"
COUNTRIES = ("France", "Italy", "Japan", "Kenya", "Norway", "Peru", "Egypt", "Canada")


@dataclass(frozen=True)
class Answer:
    """One request and what came back: ``carbon`` as the server sent it, ``body`` when it was one JSON document."""

    name: str
    text: str
    duration_seconds: float
    carbon: Mapping[str, Any]
    body: Mapping[str, Any] | None = None


class Requests:
    """The demo's requests to the server at ``url``. Every method raises DemoError when ``carbon`` is missing."""

    def __init__(self, url: str) -> None:
        self.url = url
        # A proxy named by the environment would not find a server of this host.
        direct = DefaultHttpxClient(trust_env=False)
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0, http_client=direct)
        self.model = self._client.models.list().data[0].id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def chat(self, name: str, question: str, max_tokens: int = 48) -> Answer:
        """One chat request."""
        began = time.monotonic()
        response = self._client.chat.completions.create(
            model=self.model, messages=_ask(question), max_tokens=max_tokens, temperature=0
        )
        return _answer(name, response, response.choices[0].message.content or "", began)

    def streamed_chat(self, name: str, question: str) -> Answer:
        """One streamed chat request; ``carbon`` is on its last event."""
        began = time.monotonic()
        text, carbon = "", None
        stream = self._client.chat.completions.create(
            model=self.model, messages=_ask(question), max_tokens=48, temperature=0, stream=True
        )
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            carbon = (chunk.model_extra or {}).get("carbon", carbon)
        return Answer(name, text, time.monotonic() - began, _present(name, carbon))

    def completion(self, name: str, prompt: str, n: int = 1) -> Answer:
        """One completions request with ``n`` answers."""
        began = time.monotonic()
        response = self._client.completions.create(
            model=self.model, prompt=prompt, max_tokens=32, n=n, temperature=0.8, seed=1
        )
        return _answer(name, response, " | ".join(choice.text for choice in response.choices), began)

    def at_once(self, count: int = AT_ONCE) -> list[Answer]:
        """``count`` chat requests at the same time, which the server computes in one batch."""
        with ThreadPoolExecutor(count) as pool:
            asked = [
                pool.submit(self.chat, f"at once {number}", f"What is the capital of {COUNTRIES[number % 8]}?", 24)
                for number in range(count)
            ]
            return [future.result() for future in asked]

    def hang_up(self, chunks: int = 12) -> str:
        """Start a long streamed answer and leave after ``chunks`` events. Returns the text until then."""
        text = ""
        stream = self._client.chat.completions.create(
            model=self.model,
            messages=_ask("Tell me a very long story about a lighthouse."),
            max_tokens=1000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            for _, chunk in zip(range(chunks), stream, strict=False):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return text

    def metrics(self) -> list[str]:
        """The samples of ``/metrics`` that begin with ``llmco2_``, without histogram buckets and creation times."""
        lines = httpx.get(f"{self.url}/metrics", trust_env=False).raise_for_status().text.splitlines()
        names = (line for line in lines if line.startswith("llmco2_"))
        return [line for line in names if "_bucket{" not in line and "_created" not in line]

    def metrics_with_aborted(self, timeout: float = METRICS_SECONDS) -> list[str]:
        """The metrics once the energy of the client that left shows in them. Raises DemoError after ``timeout`` s."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            lines = self.metrics()
            if any(line.startswith(ABORTED) and float(line.rsplit(" ", 1)[1]) > 0 for line in lines):
                return lines
            time.sleep(0.5)
        raise DemoError(f"metrics: {ABORTED} did not rise within {timeout:.0f} s of a client that hung up")


def send_all(url: str, progress: Callable[[str], None]) -> tuple[list[Answer], list[str]]:
    """Every kind of request to the server at ``url``, one after the other, then the metrics' lines.

    ``progress`` is told what is being sent. Raises DemoError.
    """
    try:
        with Requests(url) as requests:
            answers = list(_answers(requests, progress))
            progress("a client that hangs up")
            requests.hang_up()
            return answers, requests.metrics_with_aborted()
    except (OpenAIError, httpx.HTTPError) as error:
        raise DemoError(f"request failed: {type(error).__name__}: {error}") from None


def _answers(requests: Requests, progress: Callable[[str], None]) -> Iterator[Answer]:
    progress("chat")
    yield requests.chat("chat", "What is the capital of France? Answer in one sentence.")
    progress("streamed chat")
    yield requests.streamed_chat("streamed chat", "Name three rivers of Europe.")
    progress("completions")
    yield requests.completion("completions", "The capital of France is")
    progress("completions with n=2")
    yield requests.completion("completions, n=2", "Once upon a time, a small robot", n=2)
    progress(f"{AT_ONCE} chats at once")
    yield from requests.at_once()


def _ask(question: str) -> Any:
    return [{"role": "user", "content": question}]


def _answer(name: str, response: Any, text: str, began: float) -> Answer:
    carbon = _present(name, (response.model_extra or {}).get("carbon"))
    return Answer(name, text, time.monotonic() - began, carbon, response.model_dump(exclude_none=True))


def _present(name: str, carbon: Any) -> Mapping[str, Any]:
    if not isinstance(carbon, Mapping):
        raise DemoError(
            f"{name}: the response has no carbon object; is llmco2_vllm installed beside vllm, and was --carbon given?"
        )
    return carbon
