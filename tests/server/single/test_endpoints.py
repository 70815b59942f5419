"""The ``/carbon`` endpoints of a real server, and everything that must pass it untouched."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import llmco2_vllm
from tests.server.clients import MODEL, Clients, ask, checked

pytestmark = pytest.mark.server

PROMPT = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/carbon"), ("GET", "/carbon/requests/x"), ("PUT", "/carbon/hook")]
)
def test_without_the_key_the_endpoints_answer_401(clients: Clients, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response = httpx.request(method, clients.url + path, headers=headers, json={"on": False}, trust_env=False)
        assert response.status_code == 401
    assert all(engine["active"] for engine in clients.engines())


def test_the_status_says_what_runs_and_that_nothing_is_measured(clients: Clients) -> None:
    status = clients.http.get("/carbon").raise_for_status().json()
    assert status["version"] == llmco2_vllm.__version__
    assert status["model"] == MODEL
    assert status["predictor"].startswith("roofline/")
    assert status["basis"] == "predicted"
    assert status["meter"] == "none"
    assert status["meter_reason"]
    assert (status["zone"], status["pue"], status["intensity"]["grams_per_kwh"]) == ("FR", 1.2, 56)
    assert status["self_check"]
    assert all(status["self_check"].values())
    assert status["front_end"] == {"active": True, "failures": {}}
    (engine,) = status["engines"]
    assert engine["active"]
    assert engine["failures"] == {}
    assert engine["lost_tickets"] == 0


def test_an_unknown_response_id_is_not_found_and_named(clients: Clients) -> None:
    response = clients.http.get("/carbon/requests/chatcmpl-nobody")
    assert response.status_code == 404
    assert "chatcmpl-nobody" in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "messages": ask("Hello")}, 404),
        ({"model": MODEL, "messages": ask("Hello"), "temperature": -1}, 400),
        ({"model": MODEL, "messages": ask("word " * 3000)}, 400),
    ],
)
def test_errors_are_the_servers_own(clients: Clients, body: dict[str, Any], status: int) -> None:
    response = clients.http.post("/v1/chat/completions", json=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert not [name for name in response.headers if name.startswith("x-carbon")]


def test_an_answer_without_an_engine_request_is_untouched(clients: Clients) -> None:
    models = clients.http.get("/v1/models")
    assert set(models.json()) == {"object", "data"}
    tokens = clients.http.post("/tokenize", json={"model": MODEL, "prompt": "Hello"})
    assert tokens.status_code == 200
    assert "carbon" not in tokens.json()
    health = clients.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    for response in (models, tokens, health):
        assert not [name for name in response.headers if name.startswith("x-carbon")]


def test_with_the_hook_off_answers_are_the_same_without_carbon_and_on_again_they_have_it(clients: Clients) -> None:
    body = {"model": MODEL, **PROMPT}
    before = clients.http.post("/v1/completions", json=body)
    with clients.switched_off():
        off = clients.http.post("/v1/completions", json=body)
        assert not any(engine["active"] for engine in clients.engines())
    after = clients.http.post("/v1/completions", json=body)
    assert "carbon" not in off.json()
    assert not [name for name in off.headers if name.startswith("x-carbon")]
    assert clients.http.get(f"/carbon/requests/{off.json()['id']}").status_code == 404
    plain = [
        {key: value for key, value in response.json().items() if key not in ("carbon", "id", "created")}
        for response in (before, off, after)
    ]
    assert plain[0] == plain[1] == plain[2]
    assert checked(before.json()["carbon"])["estimate"] == checked(after.json()["carbon"])["estimate"]


def test_steps_with_the_hook_off_are_not_counted(clients: Clients) -> None:
    steps = clients.engine_total("steps")
    with clients.switched_off():
        clients.post("/v1/completions", **PROMPT)
        assert clients.engine_total("steps") == steps
    clients.post("/v1/completions", **PROMPT)
    assert clients.engine_total("steps") == steps + 2
