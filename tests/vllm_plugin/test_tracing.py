"""The span that vLLM writes for a request: our attributes on it where tracing is on, and nothing of ours elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats

from llmco2_vllm.core.settlement import Settled
from llmco2_vllm.telemetry.metered import METERED_KEY, Metered, encode_metered
from llmco2_vllm.vllm_plugin import output_path, tracing
from llmco2_vllm.vllm_plugin.frontend import CarbonFrontEnd
from tests.vllm_plugin import harness
from tests.vllm_plugin.harness import Engine, Server, make_core_request
from tests.vllm_plugin.test_frontend_contract import word_tokenizer

MakeEngine = Callable[..., Engine]
OURS = tracing.PREFIX


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """A process takes one provider, once."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture(autouse=True)
def no_spans(exporter: InMemorySpanExporter) -> None:
    exporter.clear()


class Traced(Server):
    """A server that writes a span per request."""

    def __init__(self, engine: Engine, tokenizer: Any = None, on: bool = True, **options: Any) -> None:
        super().__init__(engine, tokenizer, **options)
        self.processor = harness.call(OutputProcessor, tokenizer=tokenizer, log_stats=True, tracing_enabled=on)
        process = self.processor.process_outputs
        self.processor.process_outputs = lambda outputs, _, __: process(outputs, time.monotonic(), IterationStats())


def spans(exporter: InMemorySpanExporter) -> list[dict[str, Any]]:
    """Attributes of the spans of requests."""
    return [dict(span.attributes or {}) for span in exporter.get_finished_spans() if span.name == "llm_request"]


def ours(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(OURS): value for key, value in attributes.items() if key.startswith(OURS)}


def metered(joules: float, estimated: float = 0.0) -> Callable[[list[Any]], None]:
    """On their way, outputs get what a meter said: all of it settled, ``estimated`` of it under no window."""
    record = encode_metered(
        Metered(True, Settled(0.25 * joules, 0.75 * joules, 0.1, 1.0, 3.0, 0.0, 0.0, estimated), 1.0)
    )

    def add(outputs: list[Any]) -> None:
        for output in outputs:
            if output.trace_headers:
                output.trace_headers = {**output.trace_headers, METERED_KEY: record}

    return add


def test_the_span_says_what_the_response_says(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, exporter: InMemorySpanExporter
) -> None:
    server = Traced(make_engine())
    server.add(make_core_request("a", 40, max_tokens=5))
    [output] = server.run()
    [span] = spans(exporter)
    carbon, found = output.carbon, ours(span)
    assert found["predicted_energy_joules"] == carbon["estimate"]["energy_joules"] > 0
    assert found["predicted_prefill_joules"] == carbon["estimate"]["prefill_joules"]
    assert found["carbon_grams"] == pytest.approx(carbon["carbon_grams"]["operational"])
    assert (found["basis"], found["meter"], found["predictor"]) == (
        carbon["basis"],
        carbon["meter"],
        carbon["predictor"],
    )
    assert span["gen_ai.request.id"] == "external-a", "what the host writes stays"


def test_without_a_meter_no_attribute_is_called_measured(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, exporter: InMemorySpanExporter
) -> None:
    server = Traced(make_engine())
    server.add(make_core_request("a", 40, max_tokens=5))
    server.run()
    [span] = spans(exporter)
    assert ours(span)["basis"] == "predicted"
    assert not ours(span).keys() & {"energy_joules", "prefill_joules", "decode_joules", "coverage_ratio"}


@pytest.mark.parametrize(("estimated", "basis", "covered"), [(0.0, "measured", 1.0), (2.0, "mixed", 0.75)])
def test_what_is_metered_at_the_finish_is_on_the_span_with_its_coverage(
    make_engine: MakeEngine,
    front_end: CarbonFrontEnd,
    exporter: InMemorySpanExporter,
    estimated: float,
    basis: str,
    covered: float,
) -> None:
    server = Traced(make_engine(), tamper=metered(8.0, estimated))
    server.add(make_core_request("a", 40, max_tokens=5))
    server.run()
    [span] = spans(exporter)
    found = ours(span)
    assert (found["energy_joules"], found["prefill_joules"], found["decode_joules"]) == (8.0, 2.0, 6.0)
    assert (found["basis"], found["coverage_ratio"]) == (basis, covered)
    assert found["carbon_grams"] == pytest.approx(8.0 * 100.0 / 3.6e6, rel=1e-5)


def test_each_sequence_of_a_request_has_a_span_with_its_own_share(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, exporter: InMemorySpanExporter
) -> None:
    server = Traced(make_engine())
    server.add_parallel(make_core_request("a", 40, max_tokens=5, n=3))
    output = server.run()[-1]
    shares = [ours(span)["predicted_energy_joules"] for span in spans(exporter)]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(output.carbon["estimate"]["energy_joules"], rel=1e-5)


def test_a_request_that_a_stop_string_ends_has_the_figures_of_its_response(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, exporter: InMemorySpanExporter
) -> None:
    engine = make_engine(sample=lambda request: [20 + request.num_output_tokens])
    server = Traced(engine, word_tokenizer())
    server.add(make_core_request("a", 40, max_tokens=60, delta=True, stop=["w55"], detokenize=True))
    output = server.run()[-1]
    [span] = spans(exporter)
    assert output.outputs[0].finish_reason == "stop"
    assert ours(span)["predicted_energy_joules"] == output.carbon["estimate"]["energy_joules"]


def test_with_the_hook_off_the_span_is_the_hosts_alone(
    make_engine: MakeEngine, front_end: CarbonFrontEnd, exporter: InMemorySpanExporter
) -> None:
    front_end.guard.active = False
    server = Traced(make_engine())
    server.add(make_core_request("a", 40, max_tokens=5))
    server.run()
    [span] = spans(exporter)
    assert not ours(span)
    assert span


def test_without_tracing_there_is_no_span_and_nothing_of_ours_is_asked(
    make_engine: MakeEngine,
    front_end: CarbonFrontEnd,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "attributes", lambda *_: pytest.fail("asked"))
    server = Traced(make_engine(), on=False)
    server.add(make_core_request("a", 40, max_tokens=5))
    server.run()
    assert not spans(exporter)
    assert not front_end.guard.failures


@pytest.mark.parametrize("name", ["attributes", "annotate", "_part"])
def test_a_failure_of_ours_costs_the_attributes_and_is_said_once(
    make_engine: MakeEngine,
    front_end: CarbonFrontEnd,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    log_records: list[logging.LogRecord],
    name: str,
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(tracing, name, fail)
    server = Traced(make_engine())
    for request_id in ("a", "b"):
        server.add(make_core_request(request_id, 40, max_tokens=5))
    outputs = server.run()
    assert [output.outputs[0].token_ids for output in outputs] == [[7] * 5] * 2
    assert all(output.carbon for output in outputs), "the annotation is there as before"
    assert [bool(ours(span)) for span in spans(exporter)] == [False, False]
    assert front_end.guard.failures == {"span": 2}
    assert front_end.guard.active
    assert len([record for record in log_records if record.levelno >= logging.ERROR]) == 1


def test_a_span_of_the_host_outside_a_request_is_not_ours(exporter: InMemorySpanExporter) -> None:
    from vllm.v1.engine import output_processor

    attributes = {"a": 1}
    output_processor.instrument_manual(span_name="llm_request", start_time=1, attributes=attributes)
    assert spans(exporter) == [attributes]


def test_a_state_without_a_ledger_has_no_attributes(front_end: CarbonFrontEnd) -> None:
    assert tracing._attributes(front_end, SimpleNamespace()) is None
    assert tracing._attributes(None, SimpleNamespace(llmco2_ledger=object())) is None
    assert output_path.front_end() is front_end
    assert not front_end.guard.failures
