"""Streams of a real server: the last JSON event carries the annotation, and nothing else about them changes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.clients import MODEL, Clients, ask, assert_tokens, checked

pytestmark = pytest.mark.server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VOLATILE = ("id", "created", "carbon")


def last_alone(events: list[Any]) -> dict[str, Any]:
    """The last JSON event, after it was seen to be the only one with an annotation."""
    assert events[-1] == "[DONE]"
    *others, last = events[:-1]
    assert not [event for event in others if "carbon" in event or "carbon" in (event.get("usage") or {})]
    assert isinstance(last, dict)
    return last


def plain(event: Any) -> Any:
    """An event without what differs from call to call, and without carbon."""
    if not isinstance(event, dict):
        return event
    usage = event.get("usage")
    kept = {key: value for key, value in event.items() if key not in VOLATILE}
    return kept | ({"usage": {k: v for k, v in usage.items() if k != "carbon"}} if usage else {})


def text_of(events: list[Any]) -> str:
    choices = [choice for event in events if isinstance(event, dict) for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def test_the_last_chunk_of_a_chat_carries_the_annotation(clients: Clients) -> None:
    body = {"messages": ask("Say hello."), "max_tokens": 4, "ignore_eos": True}
    last = last_alone(clients.events(CHAT, **body))
    assert last["choices"][0]["finish_reason"] == "length"
    carbon = checked(last["carbon"])
    assert carbon["tokens"]["decode"] == 3
    assert clients.found(last["id"]) == carbon


def test_with_include_usage_the_usage_chunk_carries_it_twice(clients: Clients) -> None:
    body = {"messages": ask("Say hello."), "max_tokens": 4, "stream_options": {"include_usage": True}}
    last = last_alone(clients.events(CHAT, **body))
    assert last["choices"] == []
    carbon = checked(last["carbon"])
    assert last["usage"]["carbon"] == carbon
    assert_tokens(carbon, last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": ask("Say hello.")}), (COMPLETIONS, {"prompt": "A"})])
def test_without_carbon_a_stream_is_the_same_event_for_event(
    clients: Clients, path: str, prompt: dict[str, Any], options: dict[str, bool] | None
) -> None:
    # One token, because the server may merge tokens into one chunk when a client is slow.
    body = {**prompt, "max_tokens": 1, "temperature": 0, "stream_options": options}
    with_carbon = clients.events(path, **body)
    with clients.switched_off():
        without = clients.events(path, **body)
    assert "carbon" in last_alone(with_carbon)
    assert "carbon" not in last_alone(without)
    assert len(with_carbon) == len(without)
    assert [plain(event) for event in with_carbon] == [plain(event) for event in without]


def test_a_longer_stream_has_the_same_text_and_no_event_for_carbon_alone(clients: Clients) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with_carbon = clients.events(COMPLETIONS, **body)
    with clients.switched_off():
        without = clients.events(COMPLETIONS, **body)
    assert text_of(with_carbon) == text_of(without) != ""
    assert all(event["choices"] for event in with_carbon[:-1])
    assert len(with_carbon[:-1]) <= 8


def test_a_client_reads_the_annotation_off_the_stream(clients: Clients) -> None:
    stream = clients.openai.chat.completions.create(
        model=MODEL, messages=ask("Say hello."), max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.usage is not None
    carbon = checked((last.model_extra or {})["carbon"])
    assert (last.usage.model_extra or {})["carbon"] == carbon
    assert_tokens(carbon, last.usage.prompt_tokens, last.usage.completion_tokens)


def test_the_stream_helper_keeps_the_copy_in_usage(clients: Clients) -> None:
    with clients.openai.chat.completions.stream(
        model=MODEL,
        messages=ask("Say hello."),
        max_tokens=60,
        stream_options={"include_usage": True},
        # Ends by a stop string, or the helper raises for want of room.
        extra_body={"min_tokens": 3, "stop": ["a", "e", "o", " "]},
    ) as stream:
        final = stream.get_final_completion()
    assert final.usage is not None
    carbon = checked((final.usage.model_extra or {})["carbon"])
    assert_tokens(carbon, final.usage.prompt_tokens, final.usage.completion_tokens)
    assert clients.found(final.id) == carbon


def test_streamed_completions_with_several_answers_are_one_sum_on_the_last_chunk(clients: Clients) -> None:
    body = {"prompt": ["Once upon a time", "The capital"], "n": 2, "max_tokens": 3, "ignore_eos": True, "seed": 1}
    last = last_alone(clients.events(COMPLETIONS, **body, stream_options={"include_usage": True}))
    carbon = checked(last["carbon"])
    assert_tokens(carbon, 2 * last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"], sequences=4)
    assert clients.found(last["id"]) == carbon


def test_a_streamed_response_carries_the_annotation_on_its_completed_event(clients: Clients) -> None:
    events = list(clients.openai.responses.create(model=MODEL, input="Hello", max_output_tokens=4, stream=True))
    *others, last = events
    assert last.type == "response.completed"
    assert not [event for event in others if "carbon" in (event.model_extra or {})]
    carbon = checked((last.model_extra or {})["carbon"])
    assert last.response.usage is not None
    assert_tokens(carbon, last.response.usage.input_tokens, last.response.usage.output_tokens)
    assert clients.found(last.response.id) == carbon


def test_a_streamed_anthropic_message_carries_the_annotation_on_message_stop(clients: Clients) -> None:
    events = list(clients.anthropic.messages.create(model=MODEL, max_tokens=4, messages=ask("Hello"), stream=True))
    first, *others, last = events
    assert first.type == "message_start"
    assert last.type == "message_stop"
    assert not [event for event in [first, *others] if "carbon" in (event.model_extra or {})]
    carbon = checked((last.model_extra or {})["carbon"])
    assert carbon["tokens"]["prefill"] + carbon["tokens"]["cached"] == first.message.usage.input_tokens
    assert clients.found(first.message.id) == carbon


def test_a_stream_during_which_the_hook_was_off_ends_without_carbon(clients: Clients) -> None:
    stream = clients.openai.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=24, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        next(stream)
        with clients.switched_off():
            next(stream)
        *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert "carbon" not in (last.model_extra or {})
    checked(clients.post(COMPLETIONS, prompt="Once upon a time", max_tokens=2)["carbon"])
