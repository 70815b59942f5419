"""Two engines behind two API servers: every answer is annotated, and nothing is counted twice.

The carbon intensity comes from a server on this machine that speaks as Electricity Maps does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pytest import approx

from tests.conftest import Serve
from tests.grid.answers import electricity_maps
from tests.grid.server import Remote, remote_server
from tests.server.clients import ENERGY, MODEL, REQUESTS, SIX_DIGITS, Clients, assert_tokens, checked, joules

pytestmark = pytest.mark.server

ARGUMENTS = (
    *("--served-model-name", MODEL, "--carbon-config.zone", "DE", "--carbon-config.provider", "electricity-maps"),
    *("--data-parallel-size", "2", "--api-server-count", "2"),
)
LATEST = "/v3/carbon-intensity/latest"
SECRET = "em-secret-3141592653"
GRAMS = 302
LOOKUPS = 12


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    """Says the intensity of the hour in which the tests began."""
    with remote_server() as running:
        hour = time.time() // 3600 * 3600
        running.on(LATEST, electricity_maps(hour, GRAMS))
        running.on("/v3/carbon-intensity/history", {"zone": "DE", "history": []})
        yield running


@pytest.fixture(scope="module")
def clients(serve: Serve, remote: Remote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("grid")
    arguments = (*ARGUMENTS, "--carbon-config.provider_url", remote.base_url, "--carbon-config.cache", str(folder))
    with Clients(serve(arguments, {"ELECTRICITY_MAPS_API_KEY": SECRET}).url) as clients:
        yield clients


def send(clients: Clients, number: int) -> dict[str, Any]:
    """A request on a connection of its own, so that either API server may take it."""
    body = {"model": MODEL, "prompt": "word " * (number + 1), "max_tokens": 3 + number % 3, "ignore_eos": True}
    with clients.fresh() as http:
        answer = http.post("/v1/completions", json=body).raise_for_status().json()
    assert isinstance(answer, dict)
    return answer


@pytest.fixture(scope="module")
def answers(clients: Clients) -> list[dict[str, Any]]:
    """Answers of the first requests the server gets, four at a time so that both engines are given work."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda number: send(clients, number), range(12)))


def test_requests_on_fresh_connections_are_all_annotated_with_their_own_tokens(answers: list[dict[str, Any]]) -> None:
    for number, answer in enumerate(answers):
        usage = answer["usage"]
        assert usage["completion_tokens"] == 3 + number % 3
        assert_tokens(checked(answer["carbon"]), usage["prompt_tokens"], usage["completion_tokens"])


def test_both_engines_are_counted_and_none_of_them_twice(clients: Clients, answers: list[dict[str, Any]]) -> None:
    engines = {str(engine["engine"]): engine for engine in clients.engines()}
    assert set(engines) == {"0", "1"}
    assert all(engine["steps"] > 0 for engine in engines.values())
    charged = sum(joules(answer["carbon"]) for answer in answers)
    metrics = clients.settled()
    assert metrics.values(ENERGY, "engine") == {"0", "1"}
    assert metrics.total(ENERGY) == approx(charged, rel=SIX_DIGITS)
    assert metrics.total(REQUESTS) == approx(charged, rel=SIX_DIGITS)
    for name, engine in engines.items():
        spent = engine["prefill_joules"] + engine["decode_joules"]
        assert metrics.total(ENERGY, engine=name) == approx(spent, rel=1e-9)


def test_metrics_grow_by_what_further_requests_were_charged(clients: Clients, answers: list[dict[str, Any]]) -> None:
    before = clients.settled()
    more = [send(clients, number) for number in range(4)]
    after = clients.settled()
    charged = sum(joules(answer["carbon"]) for answer in more)
    assert after.total(ENERGY) - before.total(ENERGY) == approx(charged, rel=SIX_DIGITS)
    assert after.total(REQUESTS) - before.total(REQUESTS) == approx(charged, rel=SIX_DIGITS)


def test_whichever_server_is_asked_finds_the_record_of_every_response(
    clients: Clients, answers: list[dict[str, Any]]
) -> None:
    for answer in (answers[0], answers[-1]):
        for _ in range(LOOKUPS):
            with clients.fresh() as http:
                record = http.get(f"/carbon/requests/{answer['id']}")
            assert (record.status_code, record.json().get("carbon")) == (200, answer["carbon"])


def test_grams_are_by_the_live_intensity_of_the_zone_and_it_is_asked_for_seldom(
    clients: Clients, remote: Remote
) -> None:
    def live() -> bool:
        carbon = checked(send(clients, 1)["carbon"])
        return bool(carbon["intensity"]["source"].startswith("electricity-maps"))

    clients.wait_until(live, "the intensity is the provider's")
    figure = checked(send(clients, 1)["carbon"])["intensity"]
    assert (figure["zone"], figure["method"], figure["basis"], figure["factors"]) == (
        "DE", "average", "location", "lifecycle",
    )  # fmt: skip
    assert figure["grams_per_kwh"] == GRAMS
    assert figure["age_seconds"] < 600
    # Each of the two API servers asks for the latest figure once an hour at most; nobody asks for a request.
    assert remote.paths().count(LATEST) <= 2
    assert all(asked.headers["auth-token"] == SECRET for asked in remote.asked)


def test_who_answers_is_shown_and_the_key_is_not(clients: Clients) -> None:
    text = clients.http.get("/carbon").raise_for_status().text
    assert SECRET not in text and SECRET not in clients.http.get("/metrics").text
    grid = clients.http.get("/carbon").json()["grid"]
    assert [link["name"] for link in grid["links"]] == ["electricity-maps", "static", "static"]
    assert grid["answers"] == "electricity-maps" and grid["links"][1]["reason"]
