"""What no step waits for is done while it runs, and no figure hangs on when the host says that it does."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from vllm.pooling_params import PoolingParams
from vllm.v1.request import RequestStatus

from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import EngineTotals, StepMonitor
from llmco2_vllm.telemetry.ledger import KEY, Ledger, decode
from llmco2_vllm.telemetry.metered import METERED_KEY, Metered, decode_metered
from llmco2_vllm.testing import ConstantPredictor, FakeClock
from llmco2_vllm.vllm_plugin import hook as hook_module
from tests.vllm_plugin.harness import Engine, make_request

MakeEngine = Callable[..., Engine]
WHEN = ("while it runs", "never", "after an output", "now and then")


class Told:
    """An engine's loop that says in its own way when a step runs, on a device of 100 W read every tenth second."""

    def __init__(self, engine: Engine, when: str, seed: int) -> None:
        self.engine, self.when = engine, when
        self.rng = random.Random(seed)
        self.clock = FakeClock(10.0)
        self.windows: deque[MeterWindow] = deque()
        self.metering = Metering(Attributor([50.0]), self.windows, clock=self.clock)
        hook = engine.scheduler.llmco2_hook
        hook.monitor = hook.reader._monitor = StepMonitor(ConstantPredictor(), self.clock, self.metering)
        self.edge = self.clock()

    def step(self) -> None:
        """One step of the engine; under some schedules the step is known to run when an older output is back."""
        engine, scheduler = self.engine, self.engine.scheduler
        output = scheduler.schedule()
        engine.steps.append(output)
        engine.queue.append((output, engine._answer(output)))
        when = self.rng.choice(WHEN[:3]) if self.when == "now and then" else self.when
        if when == "while it runs":
            scheduler.get_grammar_bitmask(output)
        if len(engine.queue) >= engine.depth:
            self.clock.advance(0.03)
            engine.collect()
        if when == "after an output":
            scheduler.get_grammar_bitmask(output)
        self.tick()

    def tick(self) -> None:
        """An edge of the counter, if one is due."""
        if (now := self.clock()) - self.edge >= 0.1:
            self.windows.append(MeterWindow(0, self.edge, now, 100.0 * (now - self.edge), 0.05))
            self.edge = now

    def serve(self) -> None:
        """Requests that come, are preempted, leave and end, and whose strings stop them."""
        rng = random.Random(7)
        for i in range(24):
            stop = {"stop": ["never"], "detokenize": True} if i % 3 == 0 else {}
            prompt, length = rng.randint(1, 120), rng.randint(1, 50)
            self.engine.scheduler.add_request(make_request(f"r{i}", prompt, max_tokens=length, **stop))
            if i % 5 == 4:
                self.engine.scheduler.finish_requests(f"r{i - 2}", RequestStatus.FINISHED_ABORTED)
            for _ in range(rng.randint(0, 4)):
                if self.engine.scheduler.has_requests():
                    self.step()
        for _ in range(1000):
            if self.engine.scheduler.has_requests():
                self.step()
        while self.engine.queue:
            self.clock.advance(0.03)
            self.engine.collect()
        self.clock.advance(0.2)
        self.tick()
        self.metering.tend_all()


def finals(engine: Engine) -> dict[str, tuple[Ledger, Metered]]:
    """The last records of each request that ended by itself."""
    return {
        output.request_id: (
            decode(output.trace_headers[KEY])[0],
            decode_metered(output.trace_headers[METERED_KEY]),
        )
        for output in engine.outputs
        if output.finish_reason is not None
    }


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_figure_hangs_on_when_the_host_says_that_a_step_runs(make_engine: MakeEngine, depth: int) -> None:
    found: dict[str, tuple[dict[str, Ledger], EngineTotals, float]] = {}
    # Older versions cannot preempt with three batches in flight.
    blocks = 24 if depth < 3 else 200
    for when in WHEN:
        told = Told(make_engine(depth=depth, blocks=blocks, max_num_seqs=12, max_num_batched_tokens=256), when, depth)
        told.serve()
        hook, settlement = told.engine.scheduler.llmco2_hook, told.metering.settlement
        assert not hook.guard.failures and not hook.monitor.book.open and not hook._leaving and not hook._unsent
        metered = told.metering.attributor.totals.metered_joules
        assert metered > 100.0 and abs(told.metering.residual_joules) < 1e-9 * metered
        ledgers = {name: ledger for name, (ledger, _) in finals(told.engine).items()}
        assert all(ledger.final for ledger in ledgers.values())
        spent = settlement.prefill_joules + settlement.decode_joules
        found[when] = ledgers, hook.monitor.totals, spent
    ledgers, totals, spent = found.pop("while it runs")
    assert len(ledgers) > 15 and totals.aborted_requests and bool(totals.recomputed_tokens) == (depth < 3)
    for other_ledgers, other_totals, other_spent in found.values():
        assert other_ledgers.keys() == ledgers.keys()
        for name, ledger in ledgers.items():
            other = other_ledgers[name]
            # At the pace of one moment or another.
            assert other.held_seconds == pytest.approx(ledger.held_seconds, rel=0.3)
            assert other._replace(held_seconds=0.0) == pytest.approx(ledger._replace(held_seconds=0.0), rel=1e-9)
        assert other_spent == pytest.approx(spent, rel=1e-9)
        assert other_totals.decode_joules == pytest.approx(totals.decode_joules, rel=1e-12)
        assert other_totals.aborted_joules == pytest.approx(totals.aborted_joules, rel=1e-9)
        assert other_totals.recomputed_tokens == totals.recomputed_tokens


def test_a_step_is_priced_before_it_runs_and_charged_while_it_does(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    asked: list[Any] = []
    estimate = hook.monitor.predictor.estimate
    hook.monitor.predictor = type("Asked", (), {"estimate": lambda _, batch: asked.append(batch) or estimate(batch)})()
    engine.scheduler.add_request(make_request("a", 20, max_tokens=3))
    output = engine.scheduler.schedule()
    charge = hook.monitor._book.open["a"]
    assert len(asked) == 1 and (charge.steps, charge.energy_joules) == (0, 0.0)
    engine.scheduler.get_grammar_bitmask(output)
    assert charge.steps == 1 and charge.energy_joules > 0.0
    assert len(asked) == 1


def test_the_meters_work_is_done_while_a_step_runs(make_engine: MakeEngine) -> None:
    told = Told(make_engine(), "while it runs", 0)
    tended: list[str] = []
    tend = told.metering.tend
    place = ["nowhere"]
    told.metering.tend = lambda: tended.append(place[0]) or tend()  # type: ignore[method-assign]
    scheduler = told.engine.scheduler
    scheduler.add_request(make_request("a", 20, max_tokens=60))
    for name in ("schedule", "get_grammar_bitmask", "update_from_output"):
        original = getattr(scheduler, name)

        def at(*arguments: Any, name: str = name, original: Any = original) -> Any:
            place[0] = name
            return original(*arguments)

        setattr(scheduler, name, at)
    while scheduler.has_requests():
        told.step()
    assert set(tended) == {"get_grammar_bitmask"} and len(tended) == len(told.engine.steps)


def test_all_that_leave_with_one_step_take_their_last_records_along(make_engine: MakeEngine) -> None:
    told = Told(make_engine(), "while it runs", 0)
    for i in range(9):
        told.engine.scheduler.add_request(make_request(f"r{i}", 20 + i, max_tokens=12))
    while told.engine.scheduler.has_requests():
        told.step()
    last = told.engine.outputs[-9:]
    assert all(output.finish_reason is not None for output in last)
    records = finals(told.engine)
    assert len(records) == 9 and all(ledger.final for ledger, _ in records.values())
    spent = sum(ledger.energy_joules for ledger, _ in records.values())
    totals = told.engine.scheduler.llmco2_hook.monitor.totals
    assert spent == pytest.approx(totals.prefill_joules + totals.decode_joules)
    assert totals.finished_requests == 9


def test_a_hook_that_is_switched_on_again_has_forgotten_who_was_leaving(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    for i in range(3):
        engine.scheduler.add_request(make_request(f"r{i}", 20, max_tokens=4))
    broken = hook.reader.forget
    hook.reader.forget = lambda _: 1 / 0
    while engine.scheduler.has_requests():
        engine.step()
    assert hook.guard.failures == {"attach": 1} and not hook.guard.active
    hook.reader.forget = broken
    hook.switch(True, list(engine.scheduler.requests))
    assert not hook._leaving
    engine.scheduler.add_request(make_request("new", 20, max_tokens=4))
    engine.run()
    assert decode(engine.outputs[-1].trace_headers[KEY])[0].final
    assert hook.guard.active and not hook.monitor.book.open


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_requests_that_end_with_the_engines_first_step_know_how_long_they_held_it(
    make_engine: MakeEngine, depth: int, pooling: bool
) -> None:
    engine = make_engine(depth=depth)
    engine.tells = not pooling
    for i in range(5):
        request = make_request(f"r{i}", 20, max_tokens=1)
        if pooling:
            request.sampling_params, request.pooling_params = None, PoolingParams(task="embed")
        engine.scheduler.add_request(request)
    engine.run()
    ledgers = [decode(output.trace_headers[KEY])[0] for output in engine.outputs]
    assert len(ledgers) == 5 and all(ledger.final and ledger.held_seconds > 0.0 for ledger in ledgers)


@pytest.mark.parametrize("when", WHEN)
def test_all_charges_are_in_the_hooks_time_and_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    told = Told(make_engine(depth=2, blocks=24, max_num_seqs=12, max_num_batched_tokens=256), when, 0)
    hook, clock, charged = told.engine.scheduler.llmco2_hook, FakeClock(0.0), []
    monkeypatch.setattr(hook_module, "perf_counter", clock)
    original = hook.reader.charged

    def taking_a_second(output: Any) -> None:
        clock.advance(1.0)
        charged.append(output)
        original(output)

    hook.reader.charged = taking_a_second
    told.serve()
    assert hook.hook_seconds == len(charged) > 50


def test_a_charge_that_fails_as_a_snapshot_is_taken_is_counted_and_ends_the_hook(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    engine.scheduler.add_request(make_request("a", 20, max_tokens=3))
    engine.scheduler.schedule()
    hook.reader.charged = lambda _: 1 / 0
    assert hook.snapshot()["failures"]["get_grammar_bitmask"] == 1
    assert not hook.guard.active


def test_outputs_of_requests_without_a_ledger_are_as_the_host_made_them(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    engine.scheduler.add_request(make_request("a", 20, max_tokens=6))
    engine.step()
    hook.switch(False, [])
    hook.switch(True, list(engine.scheduler.requests))
    engine.run()
    assert KEY in engine.outputs[0].trace_headers
    assert len(engine.outputs) == 6 and all(output.trace_headers is None for output in engine.outputs[1:])
