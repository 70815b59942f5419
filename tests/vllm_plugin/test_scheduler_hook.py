"""The hook over vLLM's real scheduler classes: what is charged, to whom, in which phase."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from llmco2_vllm.core import ledgers as ledgers_module
from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.ledgers import DecodeSums
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.telemetry.ledger import KEY, SUMS_KEY, Ledger, RequestLedger, decode, decode_sums
from llmco2_vllm.telemetry.metered import METERED_KEY
from llmco2_vllm.testing import ConstantPredictor, FakeClock
from tests.vllm_plugin.harness import EOS, Engine, make_request

MakeEngine = Callable[..., Engine]


def finals(engine: Engine) -> dict[str, Ledger]:
    """The last ledger of each finished request, as the front end would read it."""
    found = {}
    for output in engine.outputs:
        if output.finish_reason is not None:
            found[output.request_id] = decode(output.trace_headers[KEY])[0]
    return found


def prefill_joules(tokens: int, context: int = 0, samples: int = 1) -> float:
    rates = ConstantPredictor().prefill
    pairs = tokens * context + tokens * (tokens + 1) // 2
    return tokens * rates.per_token_joules + pairs * rates.per_pair_joules + samples * rates.per_sample_joules


def decode_joules(tokens: int, context: int) -> float:
    rates = ConstantPredictor().decode
    pairs = sum(context + i + 1 for i in range(tokens))
    return tokens * (rates.per_token_joules + rates.per_sample_joules) + pairs * rates.per_pair_joules


def assert_conserved(engine: Engine) -> None:
    """Every joule of every step is in the ledger of one request that ended."""
    totals = engine.scheduler.llmco2_hook.monitor.totals
    assert not engine.scheduler.llmco2_hook.monitor.book.open
    finished = sum(ledger.energy_joules for ledger in finals(engine).values())
    assert finished + totals.aborted_joules == pytest.approx(totals.prefill_joules + totals.decode_joules, rel=1e-8)


def test_a_request_pays_for_its_prompt_and_its_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.scheduler.add_request(make_request("a", 100, max_tokens=10))
    engine.run()
    ledger = finals(engine)["a"]
    assert ledger.final
    assert (ledger.prefill_tokens, ledger.decode_tokens, ledger.steps) == (100, 9, 10)
    assert ledger.prefill_joules == pytest.approx(prefill_joules(100))
    assert ledger.decode_joules == pytest.approx(decode_joules(9, 100))
    assert ledger.lower_joules == pytest.approx(0.5 * ledger.energy_joules)
    assert ledger.upper_joules == pytest.approx(2.0 * ledger.energy_joules)
    assert_conserved(engine)


def test_chunked_prefill_costs_the_sum_of_its_chunks_and_samples_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=8)
    engine.scheduler.add_request(make_request("a", 150, max_tokens=3))
    engine.run()
    ledger = finals(engine)["a"]
    expected = prefill_joules(64, 0, 0) + prefill_joules(64, 64, 0) + prefill_joules(22, 128, 1)
    assert (ledger.prefill_tokens, ledger.decode_tokens, ledger.steps) == (150, 2, 5)
    assert ledger.prefill_joules == pytest.approx(expected)


def test_a_mixed_step_is_priced_as_one_batch_and_split_by_phase(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.scheduler.add_request(make_request("a", 40, max_tokens=8))
    engine.step()
    engine.scheduler.add_request(make_request("b", 60, max_tokens=8))
    engine.run()
    ledgers = finals(engine)
    assert ledgers["a"].decode_joules == pytest.approx(decode_joules(7, 40))
    assert ledgers["b"].prefill_joules == pytest.approx(prefill_joules(60))
    assert_conserved(engine)


def test_cached_prompt_tokens_are_not_charged_as_computed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(10, 611))
    engine.scheduler.add_request(make_request("first", prompt, max_tokens=2))
    engine.run()
    engine.scheduler.add_request(make_request("again", prompt, max_tokens=2))
    engine.run()
    again = finals(engine)["again"]
    assert again.cached_tokens == 592
    assert again.prefill_tokens == 601 - 592
    assert again.prefill_joules == pytest.approx(prefill_joules(9, 592))


def test_a_preempted_request_pays_for_its_replay_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=14, max_num_seqs=4)
    for name in "ab":
        engine.scheduler.add_request(make_request(name, 60, max_tokens=80))
    engine.run()
    ledgers = finals(engine)
    preempted = [ledger for ledger in ledgers.values() if ledger.recomputed_tokens]
    assert len(preempted) == 1
    assert preempted[0].prefill_tokens == 60 + preempted[0].recomputed_tokens
    assert preempted[0].decode_tokens == 79
    assert_conserved(engine)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_energy_of_an_aborted_request_is_booked_as_aborted(make_engine: MakeEngine, depth: int) -> None:
    from vllm.v1.request import RequestStatus

    engine = make_engine(depth=depth)
    engine.scheduler.add_request(make_request("stays", 30, max_tokens=12))
    engine.scheduler.add_request(make_request("leaves", 30, max_tokens=500))
    for _ in range(6):
        engine.step()
    engine.scheduler.finish_requests("leaves", RequestStatus.FINISHED_ABORTED)
    engine.run()
    totals = engine.scheduler.llmco2_hook.monitor.totals
    assert totals.aborted_requests == 1
    assert totals.aborted_joules > 0
    assert set(finals(engine)) == {"stays"}
    assert_conserved(engine)


@pytest.mark.parametrize(("depth", "paid"), [(1, 4), (2, 5), (3, 6)])
def test_an_end_of_sequence_under_async_scheduling_keeps_the_steps_it_caused(
    make_engine: MakeEngine, depth: int, paid: int
) -> None:
    def sample(request: Any) -> list[int]:
        return [EOS if request.num_computed_tokens >= 50 + 4 else 7]

    engine = make_engine(depth=depth, sample=sample)
    engine.scheduler.add_request(make_request("a", 50, max_tokens=100))
    engine.run()
    ledger = finals(engine)["a"]
    assert ledger.decode_tokens == paid
    assert ledger.decode_joules == pytest.approx(decode_joules(paid, 50))
    assert_conserved(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stop_at_max_tokens_does_not_overshoot(make_engine: MakeEngine, depth: int) -> None:
    engine = make_engine(depth=depth)
    engine.scheduler.add_request(make_request("a", 50, max_tokens=9))
    engine.run()
    assert finals(engine)["a"].decode_tokens == 8


def test_rejected_drafts_are_paid_for_and_reported(make_engine: MakeEngine) -> None:
    engine = make_engine(
        speculative={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    )
    scheduler = engine.scheduler

    def step_with_drafts() -> None:
        for request in scheduler.running:
            if request.num_computed_tokens >= request.num_prompt_tokens:
                request.spec_token_ids = [5, 5, 5]
        engine.step()

    scheduler.add_request(make_request("a", 20, max_tokens=10))
    engine.step()
    while scheduler.has_requests():
        step_with_drafts()
    ledger = finals(engine)["a"]
    # Nine steps of one token and three drafts, none accepted; the last steps have room for fewer drafts or none.
    drafts = sum(len(s.scheduled_spec_decode_tokens.get("a", ())) for s in engine.steps)
    assert drafts > 0
    assert ledger.decode_tokens == 9 + drafts
    assert 0 <= drafts - ledger.rejected_draft_tokens <= 3  # those of the last step are never taken back
    assert_conserved(engine)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_fast_path_charges_what_the_full_path_charges(make_engine: MakeEngine, depth: int, seed: int) -> None:
    def drive(full: bool) -> tuple[Engine, dict[str, Ledger]]:
        rng = random.Random(seed)
        engine = make_engine(depth=depth, blocks=70, max_num_seqs=12, max_num_batched_tokens=256)
        hook = engine.scheduler.llmco2_hook
        if full:
            hook.reader.charged = lambda _output: None  # no request ever enters the running sums
        for i in range(25):
            engine.scheduler.add_request(make_request(f"r{i}", rng.randint(1, 120), max_tokens=rng.randint(1, 60)))
            for _ in range(rng.randint(0, 12)):
                if engine.scheduler.has_requests():
                    engine.step()
        engine.run()
        assert not hook.guard.failures
        assert_conserved(engine)
        return engine, finals(engine)

    fast_engine, fast = drive(full=False)
    full_engine, full = drive(full=True)
    assert fast.keys() == full.keys() and len(fast) == 25
    for request_id, ledger in fast.items():
        assert ledger.held_seconds > 0, "by the clock: no two runs take the same time"
        assert ledger._replace(held_seconds=1) == pytest.approx(full[request_id]._replace(held_seconds=1), rel=1e-8)
    fast_totals = fast_engine.scheduler.llmco2_hook.monitor.totals
    full_totals = full_engine.scheduler.llmco2_hook.monitor.totals
    assert fast_totals.decode_joules == pytest.approx(full_totals.decode_joules, rel=1e-12)
    assert fast_totals.recomputed_tokens == full_totals.recomputed_tokens


def test_the_fast_path_is_taken_in_steady_decode(make_engine: MakeEngine) -> None:
    engine = make_engine()
    taken = []
    hook = engine.scheduler.llmco2_hook
    begin_steady = hook.monitor.begin_steady
    hook.monitor.begin_steady = lambda key: taken.append(key) or begin_steady(key)
    for i in range(8):
        engine.scheduler.add_request(make_request(f"r{i}", 20, max_tokens=30))
    engine.run()
    assert len(taken) == 28  # thirty steps: one prefill, one decode that opens the run


def test_every_token_computed_is_counted_once(make_engine: MakeEngine) -> None:
    engine = make_engine(depth=2, blocks=60, max_num_batched_tokens=128, max_num_seqs=16)
    for i in range(20):
        engine.scheduler.add_request(make_request(f"r{i}", 30 + 7 * i, max_tokens=5 + i))
    engine.run()
    computed = sum(step.total_num_scheduled_tokens for step in engine.steps)
    totals = engine.scheduler.llmco2_hook.monitor.totals
    assert totals.prefill_tokens + totals.decode_tokens == computed
    ledgers = finals(engine).values()
    assert sum(ledger.prefill_tokens + ledger.decode_tokens for ledger in ledgers) == computed


def test_steps_tile_busy_time_without_overlap(make_engine: MakeEngine) -> None:
    engine = make_engine(depth=3)
    monitor = engine.scheduler.llmco2_hook.monitor
    windows = []
    end = monitor.end
    monitor.end = lambda key: windows.append(end(key)) or windows[-1]
    for i in range(6):
        engine.scheduler.add_request(make_request(f"r{i}", 40, max_tokens=15))
    engine.run()
    assert len(windows) == monitor.totals.steps
    assert None not in windows and monitor.open_tickets == 0
    for earlier, later in pairwise(windows):
        assert later.begin_seconds >= earlier.end_seconds
    spent = sum(w.end_seconds - w.begin_seconds for w in windows)
    assert monitor.totals.step_seconds == pytest.approx(spent)


class FrontEndCopies:
    """The ledgers as a front end keeps them, held against the engine's own at every output that has one there."""

    def __init__(self, engine: Engine, checked: set[str]) -> None:
        self.engine = engine
        self.checked = checked
        self.live: dict[str, RequestLedger] = {}
        self.sums: dict[int, DecodeSums] = {}
        self.records = self.compared = 0

    def step(self) -> None:
        self.engine.step()
        outputs, self.engine.outputs = self.engine.outputs, []
        for output in outputs:
            self._take(output)

    def _take(self, output: Any) -> None:
        headers = output.trace_headers or {}
        if SUMS_KEY in headers:
            self.sums = dict([decode_sums(headers[SUMS_KEY])])
        ledger = self.live.setdefault(output.request_id, RequestLedger())
        if KEY in headers:
            ledger.receive(headers[KEY], self.sums)
            self.records += output.request_id in self.checked
        book = self.engine.scheduler.llmco2_hook.monitor.book
        charge = book.open.get(output.request_id)
        if charge is not None and output.request_id in self.checked:
            if ledger.follows_sums:
                ledger.settle(self.sums[0])
            book.settle(charge)
            assert ledger.ledger.energy_joules == pytest.approx(charge.energy_joules, rel=1e-12)
            assert ledger.ledger.upper_joules == pytest.approx(charge.upper_joules, rel=1e-12)
            assert ledger.ledger.steps == charge.steps
            self.compared += 1


@pytest.mark.parametrize("depth", [1, 2])
def test_with_stop_strings_the_front_end_can_tell_the_figures_at_every_output(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr(ledgers_module, "REBASE_STEPS", 13)
    engine = make_engine(depth=depth, blocks=30, max_num_seqs=4, max_num_batched_tokens=64)
    for i in range(6):
        stop = {"stop": ["x"], "detokenize": True} if i % 2 else {}
        engine.scheduler.add_request(make_request(f"r{i}", 40 + 50 * i, max_tokens=60 + i, **stop))
    copies = FrontEndCopies(engine, {"r1", "r3", "r5"})
    while engine.scheduler.has_requests():
        copies.step()
    assert copies.compared > 150
    assert copies.records < copies.compared / 2


@pytest.mark.skipif(
    len(signature(Scheduler._preempt_request).parameters) < 4,
    reason="this vLLM does not take a request out whose output is on its way",
)
def test_a_request_with_stop_strings_that_is_left_out_of_a_step_is_not_charged_for_it(make_engine: MakeEngine) -> None:
    engine = make_engine(depth=2, max_num_seqs=4)
    for name in "ab":
        engine.scheduler.add_request(make_request(name, 40, max_tokens=60, stop=["x"], detokenize=True))
    copies = FrontEndCopies(engine, {"a", "b"})
    for step in range(40):
        if step == 12:
            # As under memory pressure: "b" gives up its cache while the output of its last step is on its way.
            engine.scheduler._preempt_request(engine.scheduler.running.pop(), 0.0)
        copies.step()
    assert copies.compared > 50


def test_a_running_request_sends_its_ledger_first_last_and_now_and_then(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for i in range(10):
        engine.scheduler.add_request(make_request(f"r{i}", 20, max_tokens=50))
    engine.run()
    assert sum(KEY in (output.trace_headers or {}) for output in engine.outputs) > 20
    for i in range(10):
        outputs = [o for o in engine.outputs if o.request_id == f"r{i}"]
        with_ledger = [KEY in (o.trace_headers or {}) for o in outputs]
        assert with_ledger[0] and with_ledger[-1]
        joules = [decode(o.trace_headers[KEY])[0].energy_joules for o in outputs if KEY in (o.trace_headers or {})]
        assert joules == sorted(joules)


def test_tracing_headers_of_the_host_survive_beside_ours(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = make_request("a", 20, max_tokens=3)
    request.trace_headers = headers = {"traceparent": "00-1-1-01"}
    engine.scheduler.add_request(request)
    engine.run()
    assert all(output.trace_headers["traceparent"] == "00-1-1-01" for output in engine.outputs)
    assert [KEY in output.trace_headers for output in engine.outputs] == [True, False, True]
    assert headers == {"traceparent": "00-1-1-01"}


def test_a_scheduler_of_the_users_own_gets_the_hook_too(make_engine: MakeEngine) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    steps = []

    class Mine(Scheduler):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            steps.append(self)
            return super().schedule(*args, **kwargs)

    engine = make_engine(base=Mine)
    engine.scheduler.add_request(make_request("a", 20, max_tokens=3))
    engine.run()
    assert isinstance(engine.scheduler, Mine) and len(steps) >= 3
    assert finals(engine)["a"].prefill_tokens == 20


def test_reset_of_the_prefix_cache_replays_running_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.scheduler.add_request(make_request("a", 64, max_tokens=20))
    for _ in range(5):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    ledger = finals(engine)["a"]
    assert ledger.recomputed_tokens == 68
    assert ledger.prefill_tokens == 64 + 68
    assert ledger.decode_tokens == 19
    assert_conserved(engine)


def test_records_say_what_is_true_of_the_meter_when_they_are_sent(make_engine: MakeEngine) -> None:
    engine = make_engine()
    hook = engine.scheduler.llmco2_hook
    told, said = [], [("nvml", ""), ("nvml", "nvml: device 0: device lost"), ("nvml", "")]
    for now in said:
        hook.meter_now = lambda now=now: now
        engine.scheduler.add_request(make_request(f"r{len(told)}", 20, max_tokens=2))
        engine.run()
        told.append(decode(engine.outputs[-1].trace_headers[KEY])[1][1:])
        assert tuple(hook.snapshot()["provenance"].values())[1:] == now
    assert told == said


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("stop", [False, True])
def test_before_anything_is_measured_ledgers_travel_alone_unless_the_front_end_may_end_the_request(
    make_engine: MakeEngine, drafts: bool, stop: bool
) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    engine = make_engine(
        sample=lambda request: [20 + request.num_output_tokens], **({"speculative": speculative} if drafts else {})
    )
    hook = engine.scheduler.llmco2_hook
    clock = FakeClock(10.0)
    metering = Metering(Attributor([50.0]), deque(), clock=clock)
    hook.monitor = hook.reader._monitor = StepMonitor(ConstantPredictor(), clock, metering)
    sampling: dict[str, Any] = {"stop": ["never"], "detokenize": True} if stop else {}
    engine.scheduler.add_request(make_request("a", 40, max_tokens=20, **sampling))
    engine.run()
    told = [output.trace_headers for output in engine.outputs if KEY in (output.trace_headers or {})]
    assert METERED_KEY in told[-1] and hook.guard.active
    assert all(METERED_KEY in headers for headers in told) == stop
