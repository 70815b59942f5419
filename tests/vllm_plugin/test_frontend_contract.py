"""The front end over vLLM's real output processor and msgpack: figures arrive, and nothing else changes."""

from __future__ import annotations

import contextvars
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.assemble import open_accountant
from llmco2_vllm.config import build_settings
from llmco2_vllm.telemetry.ledger import KEY
from llmco2_vllm.vllm_plugin.frontend import CarbonFrontEnd
from tests.vllm_plugin import harness
from tests.vllm_plugin.harness import Engine, Server, make_core_request

MakeEngine = Callable[..., Engine]


def predicted_joules(engine: Engine) -> float:
    totals = engine.scheduler.llmco2_hook.monitor.totals
    return totals.prefill_joules + totals.decode_joules


def energy_joules(output: Any) -> float:
    return output.carbon["estimate"]["energy_joules"]


def word_tokenizer() -> Any:
    """Token ``i`` is the word ``w<i>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(harness.TINY_LLAMA["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_finished_request_carries_what_its_steps_cost(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, depth: int
) -> None:
    server = Server(make_engine(depth=depth))
    server.add(make_core_request("a", 40, max_tokens=5))
    [output] = server.run()
    assert output.finished
    assert isinstance(output.carbon, Mapping)
    assert energy_joules(output) == pytest.approx(predicted_joules(server.engine), rel=1e-5)
    assert output.carbon["tokens"]["prefill"] == 40
    assert output.carbon["tokens"]["decode"] == 4
    assert dict(output.carbon).keys() == set(output.carbon) and len(output.carbon) == len(dict(output.carbon))


def test_a_request_is_annotated_without_a_socket_or_a_file_while_the_intensity_comes_from_the_network(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"ELECTRICITY_MAPS_API_KEY": "secret"}
    live = {"provider": "electricity-maps", "zone": "DE", "cache": str(tmp_path / "cache")}
    front_end.accountant = open_accountant(build_settings(("test", live)), "h100-sxm", 1, key)
    server = Server(make_engine())
    server.add(make_core_request("a", 40, max_tokens=5))

    def forbidden(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"the serving path reaches outside: {arguments}")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", forbidden)
        patched.setattr(socket, "getaddrinfo", forbidden)
        patched.setattr("builtins.open", forbidden)
        patched.setattr(Path, "open", forbidden)
        [output] = server.run()
        carbon = dict(output.carbon)
        text = front_end.describe(output.carbon._ledgers)
    assert carbon["intensity"]["source"].startswith("static:"), "nobody asked the provider"
    assert text is not None and carbon["carbon_grams"]["total"] > 0
    assert not front_end.guard.failures


def test_every_output_of_a_stream_shows_the_same_live_figures(
    make_engine: MakeEngine, front_end: CarbonFrontEnd
) -> None:
    server = Server(make_engine())
    server.add(make_core_request("a", 30, max_tokens=40, delta=True))
    seen = []
    while server.engine.scheduler.has_requests():
        seen += [(output, output.carbon.ledger.steps, bool(output.carbon)) for output in server.step()]
    assert [token for output, *_ in seen for token in output.outputs[0].token_ids] == [7] * 40
    assert len({steps for _, steps, _ in seen}) >= 3  # first, every sixteenth, last
    assert [known for *_, known in seen] == [False] * 39 + [True]
    first, last = seen[0][0], seen[-1][0]
    assert energy_joules(first) == energy_joules(last) == pytest.approx(predicted_joules(server.engine), rel=1e-5)


def test_outputs_that_the_server_merges_keep_their_figures(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())
    server.add(make_core_request("a", 30, max_tokens=3, delta=True))
    first, *others = server.run()
    for output in others:
        harness.call(first.add, next_output=output, aggregate=True)
    assert first.outputs[0].token_ids == [7, 7, 7]
    assert first.carbon["tokens"]["decode"] == 2


@pytest.mark.parametrize("delta", [False, True])
def test_the_sequences_of_one_request_are_added_up(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, delta: bool
) -> None:
    server = Server(make_engine())
    call = front_end.open_call()
    server.add_parallel(make_core_request("a", 40, max_tokens=6, n=2, delta=delta))
    *_, last = server.run()
    assert last.finished
    assert len(call) == 2 and all(ledger.finished for ledger in call)
    assert last.carbon["tokens"]["decode"] == 2 * 5
    assert energy_joules(last) == pytest.approx(predicted_joules(server.engine), rel=1e-5)


def test_a_stop_string_ends_a_request_with_complete_figures(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    words = iter(range(20, 400))
    server = Server(make_engine(sample=lambda _request: [next(words)]), word_tokenizer())
    server.add(make_core_request("a", 40, max_tokens=100, stop=["w25"], detokenize=True))
    [output] = server.run()
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == "w25"
    last = server.received[-1]
    assert last.finish_reason is None  # the engine never said that this was the end
    assert output.carbon["tokens"]["decode"] == 5
    assert server.engine.scheduler.llmco2_hook.monitor.totals.aborted_requests == 0
    assert energy_joules(output) == pytest.approx(predicted_joules(server.engine), rel=1e-5)


def test_the_demos_tokenizer_stops_at_a_string_too(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, model_dir: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = iter(tokenizer.encode(" one two three four five") * 5)
    server = Server(make_engine(sample=lambda _request: [next(tokens)]), tokenizer)
    server.add(make_core_request("a", 10, max_tokens=20, stop=["three"], detokenize=True))
    [output] = server.run()
    assert output.outputs[0].text.strip() == "one two"
    assert output.carbon["tokens"]["prefill"] == 10


def test_an_aborted_request_is_never_annotated(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())
    call = front_end.open_call()
    server.add(make_core_request("leaves", 30, max_tokens=500, delta=True))
    for _ in range(20):
        server.step()
    server.abort("leaves")
    server.run()
    [ledger] = call
    assert ledger.ledger.steps and not ledger.finished and not ledger.complete
    assert front_end.describe(call) is None
    assert not server.delivered[-1].carbon
    assert server.engine.scheduler.llmco2_hook.monitor.totals.aborted_requests == 1


def test_a_pooling_output_carries_its_figures(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())
    server.add(make_core_request("a", 40, pooling=True))
    [output] = server.run()
    assert output.finished and output.outputs.data.tolist() == [1.0] * 4
    assert output.carbon["tokens"] == {"prefill": 40, "cached": 0, "recomputed": 0, "decode": 0}
    assert energy_joules(output) == pytest.approx(predicted_joules(server.engine), rel=1e-5)


def test_an_engine_without_the_hook_leaves_the_mapping_empty(tiny_model: Path, front_end: CarbonFrontEnd) -> None:
    server = Server(Engine(harness.make_scheduler(harness.make_config(tiny_model, None))))
    call = front_end.open_call()
    server.add(make_core_request("a", 40, max_tokens=5))
    [output] = server.run()
    assert output.outputs[0].token_ids == [7] * 5
    assert isinstance(output.carbon, Mapping) and dict(output.carbon) == {}
    assert front_end.describe(call) is None
    assert not front_end.guard.failures


@pytest.mark.parametrize("text", ["", "garbage", "3" + ",0" * 15 + ",p,m,r", "4," + "x" * 204 + ",p,m,r", "4,0"])
def test_a_malformed_ledger_is_one_log_line_and_serving_goes_on(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, log_records: list[logging.LogRecord], text: str
) -> None:
    def damage(outputs: list[Any]) -> None:
        for output in outputs:
            output.trace_headers = {KEY: text}

    server = Server(make_engine(), tamper=damage)
    call = front_end.open_call()
    for name in ("a", "b"):
        server.add(make_core_request(name, 40, max_tokens=5))
    server.run()
    server.add(make_core_request("later", 40, max_tokens=5))
    server.run()
    assert [output.outputs[0].token_ids for output in server.delivered] == [[7] * 5] * 3
    assert front_end.guard.failures == {"receive": 1}
    assert [record.levelname for record in log_records if record.levelno >= logging.ERROR] == ["ERROR"]
    assert front_end.describe(call) is None


def test_tracing_headers_of_others_come_through(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())
    headers = {"traceparent": "00-1-1-01", "tracestate": "x=1"}
    server.add(make_core_request("traced", 20, max_tokens=4, trace_headers=headers))
    server.add(make_core_request("plain", 20, max_tokens=4))
    server.run()
    for output in server.received:
        others = {key: value for key, value in (output.trace_headers or {}).items() if key != KEY}
        assert others == (headers if output.request_id == "traced" else {})
    assert headers == {"traceparent": "00-1-1-01", "tracestate": "x=1"}


def test_all_requests_of_one_call_are_seen_and_no_others(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())

    def call_with(*names: str) -> list[Any]:
        call = front_end.open_call()
        for name in names:
            server.add(make_core_request(name, 40, max_tokens=5))
        return call

    one = contextvars.copy_context().run(call_with, "a", "b")
    two = contextvars.copy_context().run(call_with, "c")
    server.add(make_core_request("outside", 40, max_tokens=5))
    outputs = {output.request_id: output for output in server.run()}
    assert (len(one), len(two)) == (2, 1)
    assert all(ledger.finished and ledger.complete for ledger in (*one, *two))
    assert outputs["external-outside"].carbon
    joules = [ledger.ledger.energy_joules for ledger in (*one, *two)]
    outside = outputs["external-outside"].carbon.ledger.energy_joules
    assert sum(joules) + outside == pytest.approx(predicted_joules(server.engine), rel=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_session_keeps_one_ledger_over_its_turns(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, depth: int
) -> None:
    server = Server(make_engine(depth=depth))
    call = front_end.open_call()
    server.add(make_core_request("s", 20, max_tokens=4, delta=True, resumable=True))
    server.step()
    server.add(make_core_request("s", 30, max_tokens=4, delta=True, resumable=True))
    server.add(make_core_request("s", 1, max_tokens=1, delta=True, resumable=False))
    outputs = server.run()
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 8
    assert outputs[-1].finished
    [ledger] = call
    assert ledger.finished
    computed = sum(step.total_num_scheduled_tokens for step in server.engine.steps)
    assert ledger.ledger.prefill_tokens + ledger.ledger.decode_tokens == computed
    assert energy_joules(outputs[-1]) == pytest.approx(predicted_joules(server.engine), rel=1e-5)


def test_a_finished_request_is_counted_once_in_the_metrics(make_engine: MakeEngine, front_end: CarbonFrontEnd) -> None:
    server = Server(make_engine())
    for name in "abc":
        server.add(make_core_request(name, 40, max_tokens=20))
    server.run()
    [family] = front_end.recorder._metrics["llmco2_request_predicted_energy_joules"].collect()
    values = {sample.name: sample.value for sample in family.samples if not sample.name.endswith("_bucket")}
    assert values["llmco2_request_predicted_energy_joules_count"] == 3
    joules = values["llmco2_request_predicted_energy_joules_sum"]
    assert joules == pytest.approx(predicted_joules(server.engine), rel=1e-5)
