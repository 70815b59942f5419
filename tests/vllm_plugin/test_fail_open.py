"""An exception planted in any of our functions leaves the server serving, with one log line and a counted failure."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore

from llmco2_vllm import assemble
from llmco2_vllm.core import comparison, ledgers
from llmco2_vllm.vllm_plugin import output_path, register
from tests.vllm_plugin import harness
from tests.vllm_plugin.serving import Deployment, open_eager_meter
from tests.vllm_plugin.test_frontend_contract import word_tokenizer

MODULES = (
    "vllm_plugin.engine",
    "vllm_plugin.hook",
    "vllm_plugin.translate",
    "vllm_plugin.frontend",
    "vllm_plugin.output_path",
    "vllm_plugin.middleware",
    "vllm_plugin.asgi",
    "vllm_plugin.endpoints",
    "vllm_plugin.live",
    "vllm_plugin.splice",
    "vllm_plugin.scrape",
    "vllm_plugin.late",
    "vllm_plugin.tracing",
    "vllm_plugin.view",
    "assemble",
    "monitor",
    "metering",
    "core.attribution",
    "core.comparison",
    "core.intensity",
    "core.metering",
    "core.settlement",
    "core.steps",
    "core.ledgers",
    "core.carbon",
    "core.kernels",
    "telemetry.ledger",
    "telemetry.metered",
    "telemetry.accounting",
    "telemetry.annotation",
    "telemetry.requests",
    "telemetry.metrics",
    "telemetry.exposition",
    "predictor.predict",
)


Serve = Callable[[str, bool], tuple[Deployment, list[logging.LogRecord]]]


class PlantedError(RuntimeError):
    """Counts how often it was raised."""

    raised = 0

    def __init__(self) -> None:
        super().__init__("planted")
        PlantedError.raised += 1


# Their code runs with the globals of the function it replaces, hence the imports.
def _fail(*args: Any, **kwargs: Any) -> Any:
    from tests.vllm_plugin.test_fail_open import PlantedError

    raise PlantedError


async def _fail_later(*args: Any, **kwargs: Any) -> Any:
    from tests.vllm_plugin.test_fail_open import PlantedError

    raise PlantedError


def function_of(member: Any) -> FunctionType | None:
    """The function behind a member of a class or module."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, cached_property):
        member = member.func
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, FunctionType) else None


def functions() -> Iterator[tuple[str, FunctionType]]:
    """Every function and method written in the modules, by its name in the package."""
    for name in MODULES:
        module = importlib.import_module(f"llmco2_vllm.{name}")
        owners = [(name, module)] + [
            (f"{name}.{cls.__name__}", cls)
            for cls in vars(module).values()
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and not getattr(cls, "_is_protocol", False)
        ]
        for prefix, owner in owners:
            for attribute, member in list(vars(owner).items()):
                function = function_of(member)
                if function is not None and Path(function.__code__.co_filename) == Path(str(module.__file__)):
                    yield f"{prefix}.{attribute}", function


FUNCTIONS = dict(functions())

# Not run when nothing fails, and why.
ELSEWHERE = {
    "assemble.check_settings": "while arguments are parsed: an impossible setting shall stop the start",
    "assemble._check_calibration": "with the setting calibration alone, as check_settings",
    "assemble.model_config": "for the command line",
    "core.attribution.Attributor._nobodys": "for windows that come too late (test_metering.py)",
    "core.attribution.Attributor._drop": "for windows that wait too long (test_metering.py)",
    "core.attribution.Attributor.lost": "for a step whose output never comes (test_monitor.py)",
    "core.steps.Step.joules": "on the thread that builds samples (test_samples.py)",
    "core.steps.Step.lose": "for a step whose output never comes (test_metering.py)",
    "core.steps.Step.shape": "on the thread that builds samples (test_samples.py)",
    "metering.Metering.lost": "for a step whose output never comes (test_monitor.py)",
    "core.carbon.sci_grams": "on accelerators alone, beside operational_grams(), which runs",
    "core.intensity.Intensity.covers": "in figures of hours (tests/grid)",
    "core.intensity.Intensity.held": "in figures of hours (tests/grid)",
    "core.intensity.Intensity.kind": "while sources are read",
    "core.kernels.KernelGraph._miss_ratio": "experts alone, beside drivers(), which runs",
    "core.kernels._expert_block": "experts alone, beside build_graph(), which runs",
    "core.kernels._grouped": "experts alone, beside build_graph(), which runs",
    "metering.Deaf.account": "where nobody listens",
    "metering.Deaf.working": "where nobody listens",
    "metering.Metering.switched": "when an engine falls asleep (test_metering.py)",
    "monitor.StepMonitor._search": "after an output out of order (test_monitor.py)",
    "telemetry.annotation._optional": "on import",
    "telemetry.annotation._without_default": "prints the schema",
    "telemetry.annotation.json_schema": "prints the schema",
    "telemetry.exposition.Family._child_samples": "during a scrape, in the library's hands (tests/dashboards)",
    "telemetry.exposition.Family.collect": "during a scrape, in the library's hands (test_scrape.py)",
    "telemetry.exposition._Cell._value": "in the library's hands: an element of an array (test_exposition.py)",
    "telemetry.accounting.Node.site_joules": "for reports",
    "telemetry.requests.RequestLog.__len__": "for tests",
    "telemetry.requests.RequestLog.close": "for tests",
    "telemetry.annotation.Annotation.document": "read by the caller of LLM",
    "vllm_plugin.engine._tell": "when an engine falls asleep",
    "vllm_plugin.output_path._carry_over": "in the pooling calls of LLM (test_guard.py)",
    "vllm_plugin.view.RequestCarbon.__getitem__": "read by the caller of LLM",
    "vllm_plugin.view.RequestCarbon.__iter__": "read by the caller of LLM",
    "vllm_plugin.view.RequestCarbon.__len__": "read by the caller of LLM",
    "vllm_plugin.view.RequestCarbon.__repr__": "read by the caller of LLM",
    "vllm_plugin.view.RequestCarbon._document": "read by the caller of LLM",
    "vllm_plugin.view.RequestCarbon.ledger": "read by the caller of LLM",
    "vllm_plugin.frontend.CarbonFrontEnd.failed": "after a failure (test_middleware.py)",
    "vllm_plugin.asgi.report": "after a failure (test_middleware.py)",
    "vllm_plugin.frontend.CarbonFrontEnd.at_finish": "with the host's tracing alone (test_tracing.py)",
    "vllm_plugin.tracing._attributes": "with the host's tracing alone (test_tracing.py)",
    "vllm_plugin.tracing._part": "with the host's tracing alone (test_tracing.py)",
    "vllm_plugin.tracing.attributes": "with the host's tracing alone (test_tracing.py)",
    "vllm_plugin.middleware.CarbonMiddleware._without_front_end": "after a failure",
}
# The host's library is not in the server of these tests; in test_scrape.py it is, with failures planted in these.
ELSEWHERE |= dict.fromkeys(
    (
        "telemetry.exposition.Family.lines",
        "telemetry.exposition.LeftOut.text",
        "telemetry.exposition._Cell.__init__",
        "telemetry.exposition._Collected.__init__",
        "telemetry.exposition._Collected.collect",
        "telemetry.exposition._Counts.__init__",
        "telemetry.exposition._Counts._hand_out",
        "telemetry.exposition._Counts._make_room",
        "telemetry.exposition._Counts._move_in",
        "telemetry.exposition._Counts._sum",
        "telemetry.exposition._Counts.write",
        "telemetry.exposition._HistogramLines._prepare",
        "telemetry.exposition._HistogramLines.counts",
        "telemetry.exposition._HistogramLines.numbers",
        "telemetry.exposition._HistogramLines.write",
        "telemetry.exposition._Lines.__init__",
        "telemetry.exposition._Lines._begin",
        "telemetry.exposition._Lines._prepare",
        "telemetry.exposition._Lines.look",
        "telemetry.exposition._Lines.numbers",
        "telemetry.exposition._Lines.write",
        "telemetry.exposition._Page.__init__",
        "telemetry.exposition._Page.text",
        "telemetry.exposition._gather",
        "telemetry.exposition._json",
        "telemetry.exposition._with_exponents",
        "telemetry.exposition._written",
        "vllm_plugin.scrape._gzipped",
        "vllm_plugin.scrape._renames",
        "vllm_plugin.scrape._with_text",
    ),
    "during a scrape of the host's library (test_scrape.py)",
)
# These hold the guard or hand on the server's own messages: an exception on their first line is one in front of
# the guard. What they call that is ours is planted in.
GUARDS = {
    "vllm_plugin.frontend.CarbonFrontEnd._pull_forever": "guards what it awaits; ends with its task",
    "vllm_plugin.middleware.CarbonMiddleware.__call__": "calls the server",
    "vllm_plugin.middleware.CarbonMiddleware.__init__": "called by the server",
    "vllm_plugin.middleware.CarbonMiddleware._annotate": "calls the server",
    "vllm_plugin.middleware._Response.send": "hands on the server's messages",
    "vllm_plugin.middleware._Response.release": "hands on the server's messages",
    "vllm_plugin.middleware._Response._send_body": "hands on the server's messages",
    "vllm_plugin.middleware._Response._send_chunk": "hands on the server's messages",
    "vllm_plugin.endpoints.answer": "guards our own endpoints",
    "vllm_plugin.endpoints._json_answer": "answers for what was guarded",
    "vllm_plugin.middleware._refresh": "guards what it awaits",
    "vllm_plugin.scrape.Scrapes.__init__": "called by the server",
    "vllm_plugin.scrape.Scrapes.answer": "calls the server",
    "vllm_plugin.scrape.Scrapes._begin": "guards what it calls",
    "vllm_plugin.scrape._Response.send": "hands on the server's messages",
    "vllm_plugin.scrape._Response.release": "hands on the server's messages",
}
# Without a front end there is nothing that counts: the middleware says so and lets everything pass.
UNCOUNTED = {"vllm_plugin.output_path.front_end", "vllm_plugin.middleware.CarbonMiddleware._start"}


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window, which reaches more of the kernels."""
    folder = tmp_path_factory.mktemp("tiny-mistral")
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    return harness.model_folder(folder, **changes)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def fresh_host() -> Iterator[None]:
    """vLLM without our wrappers at first, and sums that are begun anew within a test's few steps."""
    with pytest.MonkeyPatch.context() as patch:
        harness.take_wrappers_off(patch)
        patch.setattr(ledgers, "REBASE_STEPS", 16)
        patch.setattr(assemble, "open_meter", open_eager_meter)
        patch.setattr(comparison, "REPORT_SECONDS", 0.0)
        yield


def deploy(patch: pytest.MonkeyPatch, folder: Path, tokenizer: Any, carbon: bool = True) -> Deployment:
    harness.take_wrappers_off(patch)
    for name in ("llmco2_snapshot", "llmco2_switch"):
        patch.delattr(EngineCore, name, raising=False)
    patch.setattr(output_path, "_front_end", None)
    register()
    return Deployment(folder, tokenizer, carbon)


@pytest.fixture(scope="module")
def without_us(sliding_model: Path, tokenizer: Any) -> list[Any]:
    """What clients get from vLLM alone."""
    with pytest.MonkeyPatch.context() as patch:
        return deploy(patch, sliding_model, tokenizer, carbon=False).serve()


def traced(action: Callable[[], Any]) -> tuple[Any, set[str]]:
    """The outcome of an action, and which of our functions it ran."""
    seen: set[CodeType] = set()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code))
    try:
        outcome = action()
    finally:
        sys.setprofile(None)
    return outcome, {name for name, function in FUNCTIONS.items() if function.__code__ in seen}


@pytest.fixture(scope="module")
def reached(sliding_model: Path, tokenizer: Any, without_us: list[Any]) -> dict[str, set[str]]:
    """Our functions that run at the start, and those that run while serving, when nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        deployment, at_start = traced(lambda: deploy(patch, sliding_model, tokenizer))
        answers, serving = traced(deployment.serve)
        assert not output_path.front_end().guard.failures
        assert [dict(hook.guard.failures) for hook in deployment.hooks] == [{}, {}]
        assert answers == without_us
    return {"start": at_start, "serving": serving}


@pytest.fixture
def serve(sliding_model: Path, tokenizer: Any, log_records: list[logging.LogRecord]) -> Iterator[Serve]:
    """``serve(name, at_start)``: a deployment that has served with an exception planted, and our log since then."""
    with ExitStack() as contexts:

        def run(name: str, at_start: bool) -> tuple[Deployment, list[logging.LogRecord]]:
            patch = contexts.enter_context(pytest.MonkeyPatch.context())
            first = len(log_records)
            if at_start:
                plant(patch, name)
            deployment = deploy(patch, sliding_model, tokenizer)
            if not at_start:
                plant(patch, name)
            deployment.serve()
            assert PlantedError.raised
            patch.undo()
            return deployment, log_records[first:]

        yield run


def test_every_function_is_on_the_serving_path_or_listed(reached: dict[str, set[str]]) -> None:
    missing = FUNCTIONS.keys() - reached["start"] - reached["serving"]
    assert missing == ELSEWHERE.keys(), sorted(missing ^ ELSEWHERE.keys())
    assert GUARDS.keys() | UNCOUNTED <= reached["start"] | reached["serving"]


def plant(patch: pytest.MonkeyPatch, name: str) -> None:
    """Every call of the function raises, whoever holds a reference to it."""
    function = FUNCTIONS[name]
    failing = _fail_later if inspect.iscoroutinefunction(function) else _fail
    patch.setattr(function, "__code__", failing.__code__)
    patch.setattr(PlantedError, "raised", 0)


def complaints(records: list[logging.LogRecord], beginning: str = "llmco2: ") -> list[str]:
    """Our warnings and errors."""
    return [r.getMessage() for r in records if r.levelno >= logging.WARNING and r.getMessage().startswith(beginning)]


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ELSEWHERE.keys() - GUARDS.keys()))
def test_a_failure_leaves_the_server_serving(
    serve: Serve, without_us: list[Any], reached: dict[str, set[str]], name: str
) -> None:
    assert name in reached["start"] | reached["serving"]
    if name in reached["start"]:
        deployment, records = serve(name, True)
        assert deployment.answers == without_us
        assert_said_once_at_the_start(deployment, records)
    if name in reached["serving"]:
        deployment, records = serve(name, False)
        assert deployment.answers == without_us
        assert_counted_and_said_once(deployment, records, name)


def assert_said_once_at_the_start(deployment: Deployment, records: list[logging.LogRecord]) -> None:
    engines = complaints(records, "llmco2: no figures from this engine (PlantedError: planted)")
    front_ends = complaints(records, "llmco2: not enabled (PlantedError: planted)")
    passing = complaints(records, "llmco2: responses carry no carbon object (RuntimeError")
    assert engines or front_ends
    assert len(engines) == 2 - len(deployment.hooks)  # two engines start, and both ask for a front end
    assert len(front_ends) in (0, 2)
    # An engine without our utility methods is a failure of its own to the front end that calls them.
    unanswered = complaints(records, "llmco2: front end failed in refresh_metrics (AttributeError")
    assert len(passing) <= 1 and len(unanswered) <= 1
    assert len(complaints(records)) == len(engines) + len(front_ends) + len(passing) + len(unanswered)


def assert_counted_and_said_once(deployment: Deployment, records: list[logging.LogRecord], name: str) -> None:
    front, engines = deployment.front_end.guard, [hook.guard for hook in deployment.hooks]
    counted = sum(sum(guard.failures.values()) for guard in (front, *engines))
    assert len(complaints(records, "llmco2: engine failed in")) == sum(bool(guard.failures) for guard in engines)
    assert len(complaints(records, "llmco2: front end failed in")) == bool(front.failures)
    if name in UNCOUNTED:
        assert (counted, complaints(records)) == (
            0,
            ["llmco2: responses carry no carbon object (PlantedError: planted)"],
        )
    else:
        assert counted
        assert len(complaints(records)) == bool(front.failures) + sum(bool(guard.failures) for guard in engines)
