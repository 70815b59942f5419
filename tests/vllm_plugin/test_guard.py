"""What is read from the host's objects is read behind the guard, and a switch-off is never silent."""

from __future__ import annotations

import ast
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.config import Settings
from llmco2_vllm.core.features import GraphFeatures
from llmco2_vllm.predictor.forward import Network
from llmco2_vllm.predictor.gnn import GnnPredictor
from llmco2_vllm.telemetry.ledger import KEY, decode
from llmco2_vllm.vllm_plugin import endpoints, flags, frontend, output_path, register
from llmco2_vllm.vllm_plugin.guard import PLACES, Guard
from tests.vllm_plugin import harness
from tests.vllm_plugin.harness import Engine, make_request

PLUGIN = Path(frontend.__file__).parent
OF_THE_ENGINE = ("engine.py", "hook.py", "scheduler.py")


def test_a_failure_that_switches_off_is_logged_even_after_one_that_does_not(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("front end", "0.32.0")
    logging.getLogger("vllm.llmco2").propagate = True
    with caplog.at_level(logging.ERROR):
        guard.failed("pull", ValueError("x"), switch_off=False)
        guard.failed("pull", ValueError("x"), switch_off=False)
        assert guard.active
        guard.failed("receive", ValueError("y"))
        guard.failed("receive", ValueError("y"))
    assert not guard.active
    assert [record.getMessage().count("switched off") for record in caplog.records] == [0, 1]
    assert guard.failures == {"pull": 2, "receive": 2}


def test_a_call_that_fails_gives_nothing_and_goes_no_further() -> None:
    guard = Guard("engine", "0.32.0")
    assert guard.call("here", lambda value: value + 1, 1) == 2
    assert guard.call("here", lambda: 1 / 0) is None
    assert guard.call("here", lambda: 1) is None


def places_that_catch(side: str) -> set[str]:
    """What the plugin's own text calls the places where it catches exceptions, constants alone."""
    found = set()
    for path in PLUGIN.glob("*.py"):
        if (path.name in OF_THE_ENGINE) == (side == "engine"):
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            named = (_place(call) for call in calls)
            found.update(word.value for word in named if isinstance(word, ast.Constant) and isinstance(word.value, str))
    return found


def _place(call: ast.Call) -> ast.expr | None:
    """The argument that names the place: the first of a guard's methods, the second of ``report``."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("call", "failed") and call.args:
        return call.args[0]
    return call.args[1] if isinstance(call.func, ast.Name) and call.func.id == "report" else None


@pytest.mark.parametrize(
    ("side", "by_their_path"), [("engine", set()), ("front end", {*endpoints._METHODS, endpoints._REQUESTS})]
)
def test_every_place_that_catches_has_a_counter_from_the_start_and_no_other_has(
    side: str, by_their_path: set[str]
) -> None:
    assert Guard(side, "0.32.0").counts == dict.fromkeys(places_that_catch(side) | by_their_path, 0)
    assert len(PLACES[side]) == len(set(PLACES[side]))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(PLACES["engine"])))
def test_counts_are_the_failures_and_the_other_places_are_zero(places: list[str]) -> None:
    guard = Guard("engine", "0.32.0")
    before = guard.counts
    for place in places:
        guard.failed(place, ValueError("x"))
    assert guard.counts == {**before, **Counter(places)}
    assert guard.failures == Counter(places), "what is shown to people has no zeros"


@pytest.mark.parametrize(
    "make",
    [
        output_path._add_request,
        output_path._process_outputs,
        output_path._abort_requests,
        output_path._from_base,
        output_path._new_request_output,
    ],
)
def test_a_host_without_the_attributes_we_read_is_served_all_the_same(
    make: Callable[..., Any], front_end: frontend.CarbonFrontEnd
) -> None:
    wrapped = make(lambda *_args: "theirs")
    assert wrapped(object(), SimpleNamespace(request_id="a")) == "theirs"
    assert wrapped(object(), SimpleNamespace(request_id="b")) == "theirs"
    assert sum(front_end.guard.failures.values()) <= 1


def test_what_the_front_end_counted_is_taken_whichever_way_the_request_ended(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    engine.scheduler.add_request(make_request("a", 20, max_tokens=3, stop=["x"], detokenize=True))
    engine.step()
    hook.decide({"a": 1.0})
    engine.run()
    totals = hook.monitor.totals
    assert totals.aborted_joules == pytest.approx(totals.prefill_joules + totals.decode_joules - 1.0)
    assert not hook._counted and not hook._ended


def test_the_operators_own_middleware_stays_outside_of_ours() -> None:
    wrapped = flags._from_cli_args(lambda _cls, _args: SimpleNamespace(additional_config=None))
    arguments = Namespace(carbon=True, carbon_config=None, middleware=["their.Auth"], additional_config=None)
    wrapped(None, arguments)
    assert arguments.middleware == [flags.MIDDLEWARE, "their.Auth"]


@pytest.fixture
def priced_as_a_gpu(tiny_model: Path) -> Engine:
    """An engine whose steps the network prices, as an H100's."""
    register()
    config = harness.make_config(tiny_model, Settings(device="h100-sxm"))
    return Engine(harness.make_scheduler(config))


def test_on_a_gpu_the_network_prices_every_step(priced_as_a_gpu: Engine) -> None:
    hook = priced_as_a_gpu.scheduler.llmco2_hook
    assert hook.origin.provenance.predictor.startswith("gnn/")
    for name, prompt in (("a", 40), ("b", 300)):
        priced_as_a_gpu.scheduler.add_request(make_request(name, prompt, max_tokens=20))
    priced_as_a_gpu.run()
    totals = hook.monitor.totals
    ended = [output for output in priced_as_a_gpu.outputs if output.finish_reason is not None]
    charged = [decode(output.trace_headers[KEY])[0].energy_joules for output in ended]
    assert not hook.guard.failures
    assert sum(charged) == pytest.approx(totals.prefill_joules + totals.decode_joules, rel=1e-7)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GnnPredictor, "estimate"),
        (GnnPredictor, "_split"),
        (Network, "step"),
        (Network, "_outputs"),
        (Network, "_kernel_seconds"),
        (Network, "_total"),
        (Network, "_power"),
        (GraphFeatures, "step"),
        (GraphFeatures, "_present"),
    ],
)
def test_a_network_that_fails_switches_the_hook_off_and_serving_goes_on(
    priced_as_a_gpu: Engine, monkeypatch: pytest.MonkeyPatch, log_records: list[Any], owner: type, name: str
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(f"planted in {name}")

    priced_as_a_gpu.scheduler.add_request(make_request("a", 40, max_tokens=20))
    monkeypatch.setattr(owner, name, fail)
    priced_as_a_gpu.run()
    assert priced_as_a_gpu.outputs[-1].finish_reason is not None
    guard = priced_as_a_gpu.scheduler.llmco2_hook.guard
    assert sum(guard.failures.values()) == 1 and not guard.active
    assert len(log_records) == 1
