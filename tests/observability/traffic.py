"""A minute of requests of every kind, with pauses in which the engine idles."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import httpx

from tests.server.clients import MODEL, Clients

AT_ONCE = 4
COMPLETIONS = "/v1/completions"


def send(clients: Clients, seconds: float) -> list[dict[str, Any]]:
    """Requests for so long, every eighth of which is hung up on; the answers of the others."""
    numbers, deadline = count(), time.monotonic() + seconds

    def client() -> list[dict[str, Any]]:
        answers = []
        with clients.fresh() as http:
            while time.monotonic() < deadline:
                if (answer := _one(http, next(numbers))) is not None:
                    answers.append(answer)
        return answers

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [answer for answers in pool.map(lambda _: client(), range(AT_ONCE)) for answer in answers]


def _one(http: httpx.Client, number: int) -> dict[str, Any] | None:
    """Prompts of 1 to 120 words, answers of 8 to 40 tokens."""
    prompt, tokens = "word " * (1 + number * 17 % 120), 8 + number * 7 % 33
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    if number % 8 == 7:
        with http.stream("POST", COMPLETIONS, json={**body, "stream": True, "max_tokens": 1000}) as response:
            assert list(islice(response.iter_lines(), 6))
        return None
    answer: dict[str, Any] = http.post(COMPLETIONS, json=body).raise_for_status().json()
    return answer
