"""What is read from the host's objects is read behind the guard, and a switch-off is never silent."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llmco2_vllm.vllm_plugin import flags, frontend
from llmco2_vllm.vllm_plugin.guard import Guard
from tests.vllm_plugin.harness import Engine, make_request


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


@pytest.mark.parametrize(
    "make",
    [
        frontend._add_request,
        frontend._process_outputs,
        frontend._abort_requests,
        frontend._from_base,
        frontend._new_request_output,
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
