"""Every JSON endpoint of a real server answers with its annotation, and the annotation with the right tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pytest import approx

from tests.server.clients import ENERGY, MODEL, SIX_DIGITS, Clients, ask, assert_tokens, checked, joules

pytestmark = pytest.mark.server

LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 20


def test_a_chat_is_annotated_with_its_own_tokens_and_what_the_operator_set(clients: Clients) -> None:
    response = clients.openai.chat.completions.create(model=MODEL, messages=ask("Say hello."), max_tokens=5)
    assert response.usage is not None
    carbon = checked((response.model_extra or {})["carbon"])
    assert_tokens(carbon, response.usage.prompt_tokens, response.usage.completion_tokens)
    assert carbon["basis"] == "predicted"
    assert carbon["pue"] == 1.2
    intensity = carbon["intensity"]
    assert (intensity["zone"], intensity["grams_per_kwh"], intensity["estimated"]) == ("FR", 56, False)
    assert clients.found(response.id) == carbon


def test_a_longer_answer_costs_more_and_only_in_decode(clients: Clients) -> None:
    short, long = (
        clients.post("/v1/completions", prompt="Once upon a time", max_tokens=tokens, ignore_eos=True)["carbon"]
        for tokens in (2, 8)
    )
    assert short["estimate"]["prefill_joules"] == long["estimate"]["prefill_joules"]
    assert 0 < short["estimate"]["decode_joules"] < long["estimate"]["decode_joules"]


def test_an_answer_of_one_token_decodes_nothing(clients: Clients) -> None:
    carbon = checked(clients.post("/v1/completions", prompt="Once upon a time", max_tokens=1)["carbon"])
    assert carbon["tokens"]["decode"] == 0
    assert carbon["estimate"]["decode_joules"] == 0


def test_several_prompts_with_several_answers_and_logprobs_are_one_sum(clients: Clients) -> None:
    prompts = ["Once upon a time", "The capital of France is"]
    response = clients.openai.completions.create(
        model=MODEL, prompt=prompts, max_tokens=4, n=2, logprobs=1, temperature=0.8, extra_body={"ignore_eos": True}
    )
    assert response.usage is not None
    assert len(response.choices) == 4
    carbon = checked((response.model_extra or {})["carbon"])
    assert_tokens(carbon, 2 * response.usage.prompt_tokens, response.usage.completion_tokens, sequences=4)
    assert clients.found(response.id) == carbon


def test_echoed_prompt_tokens_are_not_charged_as_answers(clients: Clients) -> None:
    response = clients.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=3, echo=True)
    assert response.usage is not None
    assert response.choices[0].text.startswith("Once upon a time")
    carbon = checked((response.model_extra or {})["carbon"])
    assert_tokens(carbon, response.usage.prompt_tokens, response.usage.completion_tokens)


def test_beam_search_is_charged_for_every_beam(clients: Clients) -> None:
    before = clients.settled()
    answer = clients.post(
        "/v1/completions", prompt="Once upon", max_tokens=4, n=2, use_beam_search=True, ignore_eos=True
    )
    carbon = checked(answer["carbon"])
    # One engine request per beam and token, each with all tokens before it as its prompt.
    prompt = answer["usage"]["prompt_tokens"]
    assert_tokens(carbon, prompt + 2 * sum(range(prompt + 1, prompt + 4)), 0, sequences=0)
    assert joules(carbon) == approx(clients.settled().total(ENERGY) - before.total(ENERGY), rel=SIX_DIGITS)


def test_an_answer_ended_by_a_stop_string_is_charged_up_to_it(clients: Clients) -> None:
    answer = clients.post(
        "/v1/completions",
        prompt="Once upon a time",
        max_tokens=60,
        temperature=0,
        min_tokens=4,
        stop=["a", "e", "o", " "],
    )
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert 4 <= usage["completion_tokens"] < 60
    assert_tokens(checked(answer["carbon"]), usage["prompt_tokens"], usage["completion_tokens"])


def test_structured_output_is_annotated_and_stays_what_the_schema_asks_for(clients: Clients) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema = {"name": "city", "schema": {**city, "additionalProperties": False}}
    answer = clients.post(
        "/v1/chat/completions",
        messages=ask("What is the capital of France?"),
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Paris", "Rome")
    usage = answer["usage"]
    assert_tokens(checked(answer["carbon"]), usage["prompt_tokens"], usage["completion_tokens"])


def test_the_responses_api_is_annotated(clients: Clients) -> None:
    response = clients.openai.responses.create(model=MODEL, input="Say hello.", max_output_tokens=5)
    assert response.usage is not None
    carbon = checked((response.model_extra or {})["carbon"])
    assert_tokens(carbon, response.usage.input_tokens, response.usage.output_tokens)
    assert clients.found(response.id) == carbon


def test_an_anthropic_message_is_annotated(clients: Clients) -> None:
    message = clients.anthropic.messages.create(model=MODEL, max_tokens=5, messages=ask("Say hello."))
    carbon = checked((message.model_extra or {})["carbon"])
    assert_tokens(carbon, message.usage.input_tokens, message.usage.output_tokens)
    assert clients.found(message.id) == carbon


def test_headers_say_what_the_body_says(clients: Clients) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2}
    response = clients.http.post("/v1/completions", json=body)
    carbon = checked(response.json()["carbon"])
    assert float(response.headers["x-carbon-energy-joules"]) == joules(carbon)
    assert float(response.headers["x-carbon-gco2e"]) == carbon["carbon_grams"]["operational"]
    assert int(response.headers["content-length"]) == len(response.content)


def test_eight_at_once_each_get_their_own_tokens_and_add_up_to_what_the_engine_spent(clients: Clients) -> None:
    before = clients.settled()

    def send(number: int) -> dict[str, object]:
        prompt = "word " * (3 * number + 1)
        return clients.post("/v1/completions", prompt=prompt, max_tokens=number + 2, ignore_eos=True)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    carbons = [checked(answer["carbon"]) for answer in answers]
    for number, (answer, carbon) in enumerate(zip(answers, carbons, strict=True)):
        usage = answer["usage"]
        assert isinstance(usage, dict)
        assert usage["completion_tokens"] == number + 2
        assert_tokens(carbon, usage["prompt_tokens"], usage["completion_tokens"])
    assert len({answer["id"] for answer in answers}) == 8
    spent = clients.settled().total(ENERGY) - before.total(ENERGY)
    assert sum(map(joules, carbons)) == approx(spent, rel=SIX_DIGITS)


def test_the_same_long_prompt_again_is_cached_and_cheaper(clients: Clients) -> None:
    first, again = (clients.post("/v1/completions", prompt=LONG_PROMPT, max_tokens=2) for _ in range(2))
    for answer in (first, again):
        assert_tokens(checked(answer["carbon"]), answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    assert first["carbon"]["tokens"]["cached"] == 0
    assert again["carbon"]["tokens"]["cached"] > 0
    assert again["carbon"]["estimate"]["prefill_joules"] < first["carbon"]["estimate"]["prefill_joules"]
    assert joules(again["carbon"]) < joules(first["carbon"])
