"""Metrics of a real server: what the engine spent is what requests were charged, and clients that left."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pytest import approx

from llmco2_vllm.telemetry.metric_table import METRICS
from tests.server.clients import ABORTED, ENERGY, MODEL, REQUESTS, SIX_DIGITS, Clients, Metrics, ask, checked, joules

pytestmark = pytest.mark.server

STORY = {"prompt": "Tell me a very long story.", "max_tokens": 1500, "ignore_eos": True}
# Sums of many additions, in two processes and another order.
CONSERVED = 1e-6


def change(before: Metrics, after: Metrics, name: str) -> float:
    return after.total(name) - before.total(name)


def hang_up_stream(clients: Clients, **more: Any) -> None:
    """Leave in the middle of a long streamed answer, and return when the engine has let go of it."""
    freed = ended(clients)
    body = {"model": MODEL, "stream": True, **STORY, **more}
    with clients.http.stream("POST", "/v1/completions", json=body) as response:
        for _, line in zip(range(6), response.iter_lines(), strict=False):
            assert not line or line.startswith("data: {")
    clients.wait_until(lambda: ended(clients) == freed + 1, "the engine freed the request of a client that left")


def hang_up_json(clients: Clients) -> None:
    """Leave before a long answer is there."""
    freed, steps = ended(clients), clients.engine_total("steps")
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=clients.url, headers=clients.headers) as client:
        call = pool.submit(client.post, "/v1/completions", json={"model": MODEL, **STORY}, timeout=3.0)
        clients.wait_until(lambda: clients.engine_total("steps") > steps, "the request runs")
        with pytest.raises(httpx.TimeoutException):
            call.result()
    clients.wait_until(lambda: ended(clients) == freed + 1, "the engine freed the request of a client that left")


def ended(clients: Clients) -> float:
    return clients.engine_total("finished_requests") + clients.engine_total("aborted_requests")


@pytest.mark.parametrize("hang_up", [hang_up_stream, hang_up_json])
def test_the_energy_of_a_client_that_hangs_up_is_aborted_energy_and_the_server_goes_on(
    clients: Clients, hang_up: Callable[[Clients], None]
) -> None:
    before = clients.settled()
    hang_up(clients)
    after = clients.settled()
    assert change(before, after, ABORTED) > 0
    assert change(before, after, ABORTED) == approx(change(before, after, ENERGY), rel=CONSERVED)
    assert change(before, after, REQUESTS) == 0
    checked(clients.post("/v1/completions", prompt="Once upon a time", max_tokens=2)["carbon"])


def test_a_client_that_hangs_up_before_its_stop_string_is_aborted_energy_too(clients: Clients) -> None:
    before = clients.settled()
    hang_up_stream(clients, stop=["a string that never comes"])
    after = clients.settled()
    assert change(before, after, ABORTED) == approx(change(before, after, ENERGY), rel=CONSERVED)
    assert change(before, after, REQUESTS) == 0


def test_a_step_that_ran_after_a_stop_string_was_found_is_charged_or_aborted(clients: Clients) -> None:
    before = clients.settled()
    more = {"max_tokens": 60, "temperature": 0, "min_tokens": 3, "stop": ["a", "e", "o", " "]}
    answer = clients.post("/v1/completions", prompt="Once upon a time", **more)
    assert answer["choices"][0]["finish_reason"] == "stop"
    after = clients.settled()
    accounted = change(before, after, REQUESTS) + change(before, after, ABORTED)
    assert accounted == approx(change(before, after, ENERGY), rel=CONSERVED)


def test_what_the_engine_spent_is_what_requests_were_charged_and_what_was_aborted(clients: Clients) -> None:
    before = clients.settled()
    carbons = [
        clients.post("/v1/chat/completions", messages=ask("Say hello."), max_tokens=6)["carbon"],
        clients.events("/v1/chat/completions", messages=ask("Name a river."), max_tokens=6)[-2]["carbon"],
        clients.post("/v1/completions", prompt=["One", "Two words"], n=2, max_tokens=5, temperature=1)["carbon"],
        clients.post("/v1/completions", prompt="word " * 300, max_tokens=3)["carbon"],
    ]
    hang_up_stream(clients)
    after = clients.settled()
    spent, aborted = change(before, after, ENERGY), change(before, after, ABORTED)
    assert aborted > 0
    assert change(before, after, REQUESTS) + aborted == approx(spent, rel=CONSERVED)
    assert sum(map(joules, carbons)) + aborted == approx(spent, rel=SIX_DIGITS)


def test_phases_of_the_engine_are_the_phases_of_its_requests(clients: Clients) -> None:
    before = clients.settled()
    carbon = checked(clients.post("/v1/completions", prompt="word " * 40, max_tokens=6, ignore_eos=True)["carbon"])
    after = clients.settled()
    for phase in ("prefill", "decode"):
        spent = after.total(ENERGY, phase=phase) - before.total(ENERGY, phase=phase)
        assert carbon["estimate"][f"{phase}_joules"] == approx(spent, rel=SIX_DIGITS)
        tokens = "llmco2_tokens_total"
        assert carbon["tokens"][phase] == after.total(tokens, phase=phase) - before.total(tokens, phase=phase)
    grams = change(before, after, "llmco2_predicted_carbon_grams_total")
    assert carbon["carbon_grams"]["operational"] == approx(grams, rel=SIX_DIGITS)


def test_metrics_have_no_colon_and_no_request_id(clients: Clients) -> None:
    answer = clients.post("/v1/completions", prompt="Once upon a time", max_tokens=2)
    text = clients.http.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    ours = {name for name in names if "llmco2" in name}
    assert ours
    assert not [name for name in ours if ":" in name]
    assert {"llmco2_steps_total", ENERGY, ABORTED} <= ours
    assert [name for name in names if name.startswith("vllm:")], "the server's own metrics are still there"
    assert answer["id"] not in text
    allowed = {label for metric in METRICS.values() for label in metric.labels} | {"le"}
    used = {label for sample in Metrics(text).samples for label in sample.labels}
    assert used <= allowed
    assert Metrics(text).values(ENERGY, "engine") == {"0"}
    assert Metrics(text).values(ENERGY, "model_name") == {MODEL}
    assert Metrics(text).values("llmco2_grid_info", "zone") == {"FR"}
    failures = [sample for sample in Metrics(text).samples if sample.name == "llmco2_hook_failures_total"]
    assert failures and not any(sample.value for sample in failures)
