"""An embedding server: the same annotation, with nothing decoded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest import approx

from tests.conftest import Serve
from tests.server.clients import ENERGY, MODEL, SIX_DIGITS, Clients, assert_tokens, checked, joules

pytestmark = pytest.mark.server

ARGUMENTS = ("--served-model-name", MODEL, "--runner", "pooling", "--convert", "embed", "--carbon")


@pytest.fixture(scope="module")
def clients(serve: Serve) -> Iterator[Clients]:
    with Clients(serve(ARGUMENTS).url) as clients:
        yield clients


def test_embeddings_are_annotated_with_prefill_alone(clients: Clients) -> None:
    response = clients.openai.embeddings.create(model=MODEL, input="The capital of France", encoding_format="float")
    carbon = checked((response.model_extra or {})["carbon"])
    assert_tokens(carbon, response.usage.prompt_tokens, 0, sequences=0)
    assert carbon["estimate"]["decode_joules"] == 0
    assert carbon["tokens"]["decode"] == 0


def test_without_an_intensity_the_world_average_is_used_and_said_to_be_estimated(clients: Clients) -> None:
    carbon = checked(clients.post("/v1/embeddings", input="The capital of France")["carbon"])
    assert carbon["intensity"]["zone"] == "WORLD"
    assert carbon["intensity"]["estimated"] is True
    assert "pue" not in carbon


def test_several_inputs_are_one_sum_of_what_the_engine_spent(clients: Clients) -> None:
    before = clients.settled()
    answer = clients.post("/v1/embeddings", input=["One", "Two words", "Three words here"], encoding_format="base64")
    assert len(answer["data"]) == 3
    carbon = checked(answer["carbon"])
    assert_tokens(carbon, answer["usage"]["prompt_tokens"], 0, sequences=0)
    assert joules(carbon) == approx(clients.settled().total(ENERGY) - before.total(ENERGY), rel=SIX_DIGITS)


def test_embeddings_as_bytes_are_untouched(clients: Clients) -> None:
    body = {"model": MODEL, "input": "The capital of France", "encoding_format": "bytes"}
    response = clients.http.post("/v1/embeddings", json=body).raise_for_status()
    assert response.headers["content-type"] == "application/octet-stream"
    assert b"carbon" not in response.content
    assert len(response.content) % 4 == 0, "whole float32 numbers and nothing else"
