"""Metering: whatever the schedule and the windows, the joules of requests, idle and rest are those of the counter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm import metering as metering_module
from llmco2_vllm.core import attribution, ledgers
from llmco2_vllm.core.attribution import Activity, Attributor, WindowAccount
from llmco2_vllm.core.ledgers import RequestCharge
from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.core.settlement import Settled
from llmco2_vllm.core.steps import Step
from llmco2_vllm.metering import HostEnergy, Metering
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.testing import ConstantPredictor, FakeClock

IDLE_WATTS = 50.0


class NotingMetering(Metering):
    """Keeps the step of every execution, for the slow path."""

    steps: list[Step]

    def opened(self, step: Step) -> Step:
        self.steps.append(step)
        return super().opened(step)

    def repeated(self, step: Step, now_seconds: float) -> bool:
        taken = super().repeated(step, now_seconds)
        if taken:
            self.steps.append(step)
        return taken


@dataclass
class Engine:
    """A small scheduler over a StepMonitor with a meter: prefill in chunks, decode, preemption, drafts, aborts."""

    devices: int = 1
    predictor: ConstantPredictor = field(default_factory=ConstantPredictor)
    patient: bool = False
    least_seconds: float = 0.0  # of a step

    def __post_init__(self) -> None:
        self.clock = FakeClock(10.0)
        self.windows: deque[MeterWindow] = deque()
        self.accounts: list[WindowAccount] = []
        self.metering = NotingMetering(Attributor([IDLE_WATTS] * self.devices), self.windows, self, self.clock)
        self.metering.steps = []
        self.monitor = StepMonitor(self.predictor, self.clock, self.metering)
        self.charges: list[RequestCharge] = []
        self.left: dict[str, int] = {}  # prompt tokens to compute
        self.in_flight: deque[object] = deque()
        self.edges = [10.0] * self.devices
        self.held: list[MeterWindow] = []
        # Per step, what it was predicted to cost each request: the slow path.
        self.slow: list[tuple[object, dict[int, float]]] = []

    def account(self, account: WindowAccount) -> None:
        self.accounts.append(account)

    def working(self, busy: bool, asleep: bool, now_seconds: float) -> None:
        pass

    def join(self, prompt: int) -> None:
        name = f"r{len(self.charges)}"
        self.charges.append(self.monitor.book.join(name, 0, prompt, prompt))
        self.left[name] = prompt

    def settled(self, place: int) -> Settled:
        """What the settled steps of a request came to."""
        account = self.charges[place].account
        assert account is not None
        return account.settled(self.metering.settlement.now)

    def all_settled(self) -> list[Settled]:
        return [self.settled(place) for place in range(len(self.charges))]

    def running(self) -> list[str]:
        return list(self.monitor.book.open)

    def schedule(self, chunk: int) -> None:
        """A step: a chunk of each prompt, one token of all others."""
        if not self.running():
            return
        before = self.spent()
        book, key, slices, ids = self.monitor.book, object(), [], []
        for name in self.running():
            if name not in book.decoding:
                charge = book.open[name]
                slices.append(charge.slice(min(chunk, max(charge.known - charge.computed, 1))))
                ids.append(name)
        if slices or not self.slow:
            self.monitor.begin(key, slices)
        else:
            self.monitor.begin_steady(key)
        for name in ids:
            if book.open[name].computed >= book.open[name].known:
                self.monitor.book.enter(name)
        after = self.spent()
        self.slow.append((key, {i: after[i] - before[i] for i in range(len(after))}))
        self.in_flight.append(key)

    def execute(self, seconds: float, chunk: int = 8) -> None:
        """A step that is scheduled, runs for so long, and comes back."""
        self.schedule(chunk)
        self.clock.advance(seconds)
        self.output()

    def spent(self) -> list[float]:
        book = self.monitor.book
        for charge in book.open.values():
            book.settle(charge)
        return [charge.energy_joules for charge in self.charges]

    def output(self) -> None:
        if self.in_flight:
            self.clock.advance(self.least_seconds)
            self.monitor.end(self.in_flight.popleft())
            self.tend()

    def preempt(self, name: str) -> None:
        self.monitor.book.interrupt(name)
        charge = self.monitor.book.open[name]
        charge.rewind(0, charge.computed)

    def leave(self, name: str, aborted: bool) -> None:
        charge = self.monitor.finish(name)
        assert charge is not None
        self.monitor.conclude(charge, 0.0 if aborted else charge.energy_joules)

    def edge(self, device: int, watts: float | None, doubt: Doubt = Doubt.NONE) -> None:
        """The counter of a device is read."""
        begin, end = self.edges[device], self.clock()
        if end > begin:
            joules = None if watts is None else watts * (end - begin)
            self.windows.append(MeterWindow(device, begin, end, joules, 0.1, doubt))
            self.edges[device] = end
            self.tend()

    def hold(self, device: int) -> None:
        """The counter is read, and nobody is told before the end."""
        begin, end = self.edges[device], self.clock()
        if end > begin:
            self.held.append(MeterWindow(device, begin, end, 100.0 * (end - begin), 0.1))
            self.edges[device] = end

    def tend(self) -> None:
        if not self.patient:
            self.metering.tend()

    def finish(self, watts: float | None = 100.0) -> None:
        self.windows.extend(self.held)
        while self.in_flight:
            self.output()
        for name in self.running():
            self.leave(name, aborted=False)
        self.clock.advance(0.5)
        for device in range(self.devices):
            self.edge(device, watts)
        self.metering.tend_all()


ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 40)),
    st.tuples(st.just("schedule"), st.integers(1, 16)),
    st.tuples(st.just("output"), st.just(0)),
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("pause"), st.integers(1, 300)),
    st.tuples(st.just("edge"), st.tuples(st.integers(0, 1), st.floats(0, 900))),
    st.tuples(st.just("preempt"), st.integers(0, 5)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("asleep"), st.booleans()),
)


# A window that comes behind later ones of its device.
HELD = st.tuples(st.just("hold"), st.integers(0, 1))


def run(
    actions: list[tuple[str, object]],
    devices: int,
    patient: bool = False,
    least_seconds: float = 0.0,
    check: Callable[[Engine], None] = lambda engine: assert_conserved(engine.metering),
) -> Engine:
    """Go through a schedule. patient: nothing is split or settled before its end. check: before each action."""
    engine = Engine(devices, patient=patient, least_seconds=least_seconds)
    for action, value in actions:
        check(engine)
        running = engine.running()
        match action, value:
            case "join", int(prompt):
                engine.join(prompt)
            case "schedule", int(chunk) if len(engine.in_flight) < 2:
                engine.schedule(chunk)
            case "output", _:
                engine.output()
            case "decode", int(steps) if len(engine.in_flight) < 2:
                for _ in range(steps):
                    engine.execute(0.004, 1)
            case "pause", int(milliseconds):
                engine.clock.advance(milliseconds / 1e3)
            case "edge", (int(device), float(watts)):
                engine.edge(device % devices, watts)
            case "hold", int(device):
                engine.hold(device % devices)
            case "preempt", int(place) if running and not engine.in_flight:
                engine.preempt(running[place % len(running)])
            case "leave", int(place) if running:
                engine.leave(running[place % len(running)], aborted=place > 5)
            case "asleep", bool(asleep):
                engine.metering.switched(Activity.SLEEPING if asleep else Activity.AWAKE)
    engine.finish()
    return engine


def assert_conserved(metering: Metering) -> None:
    totals = metering.attributor.totals
    scale = max(totals.metered_joules, abs(totals.unattributed_joules), 1.0)
    assert abs(metering.residual_joules) <= 1e-9 * scale


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS | HELD, max_size=60), st.integers(1, 2))
def test_requests_idle_and_rest_are_the_counters_joules(actions: list[tuple[str, object]], devices: int) -> None:
    engine = run(actions, devices)
    totals = engine.metering.attributor.totals
    metered = sum(account.window.energy_joules or 0.0 for account in engine.accounts)
    measured = sum(settled.measured_joules for settled in engine.all_settled())
    rest = totals.idle_joules + totals.sleeping_joules + totals.unattributed_joules
    scale = max(metered, abs(totals.unattributed_joules), 1.0)
    assert totals.metered_joules == pytest.approx(metered, rel=1e-12)
    assert abs(measured + rest - metered) <= 1e-9 * scale
    assert_conserved(engine.metering)
    settled = engine.metering.settlement
    assert settled.prefill_joules + settled.decode_joules == pytest.approx(measured, rel=1e-9, abs=1e-9 * scale)
    covered = engine.metering.state()["coverage_ratio"]
    assert covered is None or 0.0 <= covered <= 1.0


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=50), st.integers(1, 2))
def test_running_sums_give_each_request_what_single_steps_give(actions: list[tuple[str, object]], devices: int) -> None:
    engine = run(actions, devices)
    for place, charge in enumerate(engine.charges):
        assert charge.account is not None and charge.account.final
        settled = engine.settled(place)
        slow = sum(
            step.measured_ratio * spent.get(place, 0.0)
            for step, (_, spent) in zip(engine.metering.steps, engine.slow, strict=True)
        )
        assert settled.measured_joules == pytest.approx(slow, rel=1e-7, abs=1e-6)
        assert settled.predicted_prefill_joules == pytest.approx(charge.prefill_joules, rel=1e-9)
        assert settled.predicted_decode_joules == pytest.approx(charge.decode_joules, rel=1e-9)


def predicted_of_settled_steps(engine: Engine) -> list[float]:
    """Joules of each request in the steps that are settled so far, by single steps."""
    joules, waiting = [0.0] * len(engine.charges), {id(step) for step in engine.metering.attributor._steps}
    for step, (_, spent) in zip(engine.metering.steps, engine.slow, strict=True):
        if id(step) not in waiting:
            for place, part in spent.items():
                joules[place] += part
    return joules


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTIONS | HELD, max_size=40), st.integers(1, 2), st.sampled_from([7, ledgers.REBASE_STEPS]))
def test_at_any_moment_a_request_came_to_its_share_of_the_steps_settled_so_far(
    actions: list[tuple[str, object]], devices: int, rebase_steps: int
) -> None:
    def check(engine: Engine) -> None:
        expected = predicted_of_settled_steps(engine)
        found = [s.predicted_prefill_joules + s.predicted_decode_joules for s in engine.all_settled()]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)

    with pytest.MonkeyPatch.context() as patch:
        # So that the running sums begin anew within the schedule.
        patch.setattr(ledgers, "REBASE_STEPS", rebase_steps)
        run(actions, devices, check=check)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=50), st.integers(1, 3))
def test_figures_do_not_depend_on_how_often_windows_are_looked_for(
    actions: list[tuple[str, object]], devices: int
) -> None:
    # Short of the time after which steps are left to prediction; and a step without length may lie on an edge.
    brief = [(name, value % 60 if isinstance(value, int) and name == "pause" else value) for name, value in actions]
    with pytest.MonkeyPatch.context() as patch:
        # A step of several executions ends where a window is looked for.
        patch.setattr(attribution, "LONGEST_STEP_SECONDS", 0.0)
        eager, patient = (run(brief, devices, patient, 0.001) for patient in (False, True))
    for one, other in zip(eager.all_settled(), patient.all_settled(), strict=True):
        assert one.measured_joules == pytest.approx(other.measured_joules, rel=1e-9, abs=1e-9)
        assert one.half_width_joules == pytest.approx(other.half_width_joules, rel=1e-6, abs=1e-9)


def decode_under_load(longest_step_seconds: float) -> Engine:
    """Requests come and go over two seconds of short steps and pauses of 1 ms, at two powers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "LONGEST_STEP_SECONDS", longest_step_seconds)
        engine = Engine()
        for number in range(400):
            if number % 70 == 0:
                engine.join(30)
            if number % 90 == 89:
                engine.leave(engine.running()[0], aborted=False)
            engine.execute(0.003 + 0.001 * (number % 3))
            engine.clock.advance(0.001)
            if number % 20 == 19:
                engine.edge(0, 300.0 + 100.0 * (number > 200))
        engine.finish()
    return engine


def test_short_executions_of_one_batch_are_one_step_to_the_meter_and_cost_their_requests_the_same() -> None:
    single, together = decode_under_load(0.0), decode_under_load(0.02)
    steps = {id(step): step for step in together.metering.steps}.values()
    assert len(single.metering.steps) == len(together.metering.steps) == sum(step.executions for step in steps)
    assert len(steps) < len(single.metering.steps) / 2 and max(step.executions for step in steps) <= 5
    for one, other in zip(single.all_settled(), together.all_settled(), strict=True):
        assert one.predicted_decode_joules == pytest.approx(other.predicted_decode_joules, rel=1e-9)
        assert one.measured_joules == pytest.approx(other.measured_joules, rel=0.005)
    assert_conserved(together.metering)


def test_a_window_over_many_steps_is_split_behind_several_of_them_and_no_joule_moves_before_it_is() -> None:
    engine = Engine()
    engine.join(4)
    for _ in range(200):
        engine.execute(0.021)
    engine.edge(0, 300.0)
    metering, tends = engine.metering, 1
    while not engine.accounts:
        assert metering.attributor.totals.metered_joules == metering.attributor.unsettled_joules == 0.0
        metering.tend()
        tends += 1
    assert tends >= 200 / metering_module.SPLIT_AT_ONCE / 2 and len(engine.accounts[0].parts) == 200
    assert metering.attributor.unsettled_joules == pytest.approx(300 * 4.2)
    assert_conserved(metering)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_all_windows_of_a_tick_are_split_and_settled_before_the_next(devices: int, steps: int) -> None:
    engine = Engine(devices)
    engine.join(4)
    for _ in range(2 + 600 // steps):
        assert not engine.metering.attributor.waiting
        for device in range(devices):
            engine.edge(device, 300.0)
        for _ in range(max(steps, 40)):
            engine.execute(0.4 / steps)
    assert len(engine.metering.journal.open) <= 2 * max(steps, 40)


def busy(seconds: float, watts: float, engine: Engine | None = None) -> Engine:
    """One request decodes in steps of 10 ms, its device read every 100 ms."""
    engine = engine or Engine(predictor=ConstantPredictor())
    engine.join(4)
    for tick in range(round(seconds * 100)):
        engine.execute(0.01)
        if tick % 10 == 9:
            engine.edge(0, watts)
    return engine


def test_a_step_cut_by_an_edge_pays_by_its_share_on_either_side() -> None:
    engine = Engine()
    engine.join(4)
    engine.schedule(4)
    engine.clock.advance(0.3)
    engine.edge(0, 100.0)
    engine.clock.advance(0.1)
    engine.output()
    engine.edge(0, 500.0)
    engine.finish(0.0)
    assert engine.settled(0).measured_joules == pytest.approx(0.3 * 100 + 0.1 * 500)


def test_gaps_are_idle_and_a_window_without_steps_is_idle_entirely() -> None:
    engine = Engine()
    engine.clock.advance(3.0)
    engine.edge(0, 70.0)
    engine.join(4)
    engine.schedule(4)
    engine.clock.advance(0.5)
    engine.output()
    engine.clock.advance(0.5)
    engine.edge(0, 400.0)
    engine.finish(0.0)
    totals = engine.metering.attributor.totals
    # 3 s at 70 W teach the idle power that is then taken off the gap of half a second.
    assert totals.idle_joules == pytest.approx(3 * 70 + 0.5 * 70)
    assert totals.attributed_joules == pytest.approx(400 - 35)


def test_idle_power_is_learned_apart_for_an_engine_that_sleeps() -> None:
    engine = Engine()
    engine.clock.advance(2.0)
    engine.edge(0, 80.0)
    engine.metering.switched(Activity.SLEEPING)
    engine.clock.advance(0.5)
    engine.edge(0, 30.0)
    engine.clock.advance(2.0)
    engine.edge(0, 20.0)
    attributor = engine.metering.attributor
    assert attributor.idle_power_watts() == pytest.approx(80)
    assert attributor.idle_power_watts(Activity.SLEEPING) == pytest.approx((0.5 * 30 + 2 * 20) / 2.5)
    assert attributor.totals.sleeping_joules == pytest.approx(55)


def test_a_window_far_from_the_recent_ratio_is_bounded_and_its_rest_is_a_line_of_its_own() -> None:
    engine = busy(10.0, 200.0)
    engine.metering.tend_all()
    recent = engine.metering.attributor.recent_ratio
    busy(0.1, 9000.0, engine)
    engine.metering.tend_all()
    account = engine.accounts[-1]
    assert not account.trusted and account.ratio is not None and account.ratio > 3 * recent
    assert account.attributed_joules == pytest.approx(3 * recent * account.predicted_joules)
    assert account.attributed_joules + account.unattributed_joules + account.idle_joules == pytest.approx(900)


@pytest.mark.parametrize("watts", [0.0, 8000.0])
def test_the_interval_of_a_request_in_bounded_windows_is_as_wide_as_its_figure(watts: float) -> None:
    engine = busy(10.0, 200.0)
    engine.leave("r0", aborted=False)
    busy(0.1, watts, engine)
    engine.finish(0.0)
    settled = engine.settled(1)
    assert settled.half_width_joules == pytest.approx(settled.measured_joules, rel=0.01)


@pytest.mark.parametrize("watts", [1e-300, 1e-12])
def test_a_counter_that_hardly_moved_leaves_an_interval_that_is_a_number(watts: float) -> None:
    engine = busy(0.1, watts)
    engine.finish(watts)
    assert 0.0 <= engine.settled(0).half_width_joules < 1.0


def test_energy_of_a_shared_board_is_nobodys() -> None:
    engine = Engine()
    engine.join(4)
    engine.schedule(4)
    engine.clock.advance(1.0)
    engine.output()
    engine.edge(0, 700.0, Doubt.SHARED)
    engine.finish(0.0)
    totals = engine.metering.attributor.totals
    assert totals.unattributed_joules == pytest.approx(700) and totals.idle_joules == 0.0
    assert engine.settled(0).measured_joules == 0.0


def test_while_the_hook_is_off_energy_is_nobodys_and_teaches_no_idle_power() -> None:
    engine = busy(1.0, 200.0)
    engine.schedule(8)
    engine.metering.switch(False)
    for _ in range(600):
        engine.clock.advance(0.1)
        engine.edge(0, 400.0)
    engine.metering.tend_all()
    totals, attributor = engine.metering.attributor.totals, engine.metering.attributor
    assert totals.idle_joules == 0.0 and totals.unattributed_joules == pytest.approx(24_000)
    assert attributor.idle_power_watts() == IDLE_WATTS
    assert sum(map(len, attributor._windows)) == 0
    engine.metering.switch(True)
    engine.clock.advance(3.0)
    engine.edge(0, 70.0)
    assert totals.idle_joules == pytest.approx(210)


def test_windows_that_wait_for_a_step_which_never_ends_are_bounded_and_their_energy_is_counted() -> None:
    engine = Engine()
    engine.join(4)
    engine.schedule(4)
    for _ in range(6000):
        engine.clock.advance(0.1)
        engine.edge(0, 100.0)
    engine.metering.tend_all()
    assert sum(map(len, engine.metering.attributor._windows)) <= 4096
    assert engine.metering.attributor.totals.unattributed_joules == pytest.approx((6000 - 4096) * 10)


def test_long_steps_two_in_flight_are_measured() -> None:
    engine = Engine()
    engine.join(64)
    for _ in range(20):
        while len(engine.in_flight) < 2:
            engine.schedule(4)
        for _ in range(60):
            engine.clock.advance(0.1)
            engine.edge(0, 200.0)
        engine.output()
    engine.finish(200.0)
    settled = engine.settled(0)
    assert settled.estimated_joules == pytest.approx(0.0) and settled.measured_joules > 0.0


def test_a_window_that_comes_too_late_charges_nobody_twice() -> None:
    engine = busy(1.0, 200.0)
    for _ in range(800):  # the meter stalls for eight seconds
        engine.execute(0.01)
        engine.metering.tend()
    engine.metering.tend_all()
    engine.edge(0, 200.0, Doubt.GAP)
    engine.finish(0.0)
    settled, totals = engine.settled(0), engine.metering.attributor.totals
    # Three of the nine seconds had been left to prediction when the window came: their energy is nobody's.
    assert settled.estimated_joules > 0.0 and totals.unattributed_joules == pytest.approx(600, rel=0.02)
    assert settled.measured_joules == pytest.approx(1200, rel=0.02)


def test_idle_power_asleep_is_learned_although_the_sampler_marks_such_windows() -> None:
    engine = Engine()
    engine.metering.switched(Activity.SLEEPING)
    engine.clock.advance(2.0)
    engine.edge(0, 30.0, Doubt.SLEEPING)
    attributor = engine.metering.attributor
    assert attributor.idle_power_watts(Activity.SLEEPING) == pytest.approx(30)
    assert attributor.idle_power_learned(Activity.SLEEPING) and not attributor.idle_power_learned(Activity.AWAKE)


def test_integrated_power_teaches_as_a_counter_does() -> None:
    engine = Engine()
    engine.clock.advance(2.0)
    engine.edge(0, 70.0, Doubt.INTEGRATED_POWER)
    assert engine.metering.attributor.idle_power_watts() == pytest.approx(70)


def test_a_window_of_a_device_that_is_not_ours_is_left_out() -> None:
    engine = Engine()
    engine.windows.append(MeterWindow(3, 10.0, 11.0, 100.0))
    engine.metering.tend()
    assert engine.metering.attributor.totals.metered_joules == 0.0


def test_a_predictor_that_is_far_off_is_followed_from_the_start() -> None:
    engine = busy(20.0, 20_000.0)
    totals = engine.metering.attributor.totals
    assert totals.unattributed_joules == pytest.approx(0.0, abs=1e-6 * totals.metered_joules)
    assert all(account.trusted for account in engine.accounts)


@pytest.mark.parametrize("doubt", [Doubt.LOST, Doubt.FROZEN, Doubt.COUNTER_DECREASED])
def test_steps_that_no_meter_saw_are_predicted_at_the_recent_ratio_and_say_so(doubt: Doubt) -> None:
    engine = busy(2.0, 200.0)
    engine.monitor.book.settle(engine.charges[0])
    for tick in range(20):
        engine.execute(0.01)
        if tick % 10 == 9:
            engine.edge(0, None, doubt)
    engine.finish()
    steps = engine.metering.steps
    assert engine.metering.attributor.totals.unmetered_seconds == pytest.approx(0.2)
    unseen = sum(spent[0] for step, (_, spent) in zip(steps, engine.slow, strict=True) if not step.covered_ratio)
    settled, spent_joules = engine.settled(0), engine.charges[0].energy_joules
    assert settled.predicted_prefill_joules + settled.predicted_decode_joules == pytest.approx(spent_joules)
    assert settled.estimated_joules > 0.0
    assert settled.estimated_joules == pytest.approx(unseen * engine.metering.attributor.recent_ratio)


def test_a_meter_that_falls_silent_leaves_the_steps_to_prediction_after_a_while() -> None:
    engine = busy(0.5, 200.0)
    for _ in range(700):
        engine.execute(0.01)
        engine.metering.tend()
    assert len(engine.metering.journal.open) < 600
    settled = engine.settled(0)
    assert settled.measured_joules == pytest.approx(0.5 * 200)
    assert settled.estimated_joules > 2 * settled.measured_joules


def test_aborted_recomputed_and_rejected_energy_are_lines_of_their_own() -> None:
    engine = Engine()
    for prompt in (8, 8):
        engine.join(prompt)
    for _ in range(5):
        engine.execute(0.1)
    engine.preempt("r0")
    engine.schedule(32)
    engine.clock.advance(0.1)
    engine.output()
    engine.leave("r1", aborted=True)
    engine.edge(0, 300.0)
    engine.finish()
    settlement, (first, second) = engine.metering.settlement, engine.all_settled()
    assert settlement.aborted_joules == pytest.approx(second.energy_joules)
    assert settlement.recomputed_joules == pytest.approx(first.recomputed_joules) and first.recomputed_joules > 0
    assert first.recomputed_joules < first.prefill_joules


def test_rejected_drafts_take_their_part_of_the_step_that_computed_them() -> None:
    engine = Engine()
    engine.join(4)
    charge = engine.charges[0]
    engine.monitor.begin("prompt", [charge.slice(4)])
    engine.clock.advance(0.1)
    engine.monitor.end("prompt")
    engine.monitor.begin("drafts", [charge.slice(4)])
    engine.clock.advance(0.1)
    engine.monitor.end("drafts")
    engine.monitor.book.reject(charge, 3)
    engine.edge(0, 300.0)
    engine.finish()
    settled = engine.settled(0)
    assert settled.rejected_draft_joules == pytest.approx(0.75 * settled.decode_joules)
    assert engine.metering.settlement.rejected_draft_joules == settled.rejected_draft_joules > 0.0


def test_prefill_that_is_taken_back_is_no_rejected_draft_and_costs_what_its_steps_did() -> None:
    engine = Engine()
    engine.join(30)
    charge, monitor = engine.charges[0], engine.monitor

    def step(tokens: int) -> None:
        monitor.begin(engine, [charge.slice(tokens)])
        engine.clock.advance(0.01)
        monitor.end(engine)

    step(30)
    step(4)
    engine.edge(0, 300.0)
    engine.metering.tend_all()
    charge.rewind(0, charge.computed)
    for number in range(24):
        step(1)
        if number == 13:  # blocks of the KV cache were lost on their way
            monitor.book.reject(charge, 2)
    engine.finish(300.0)
    settled = engine.settled(0)
    assert settled.rejected_draft_joules == 0.0
    assert settled.predicted_prefill_joules + settled.predicted_decode_joules == pytest.approx(charge.energy_joules)
    assert settled.measured_joules == pytest.approx(engine.metering.attributor.totals.attributed_joules)


def test_a_reset_forgets_ledgers_and_goes_on_counting_energy() -> None:
    engine = busy(0.5, 200.0)
    engine.schedule(8)
    engine.monitor.reset()
    engine.in_flight.clear()
    engine.charges.clear()
    engine.slow.clear()
    busy(0.5, 200.0, engine)
    engine.finish()
    totals = engine.metering.attributor.totals
    assert totals.metered_joules == pytest.approx(250)
    assert engine.settled(0).measured_joules > 0


def test_the_host_is_counted_apart_and_what_its_meter_does_not_know_is_not_zero() -> None:
    windows = deque([MeterWindow(0, 0.0, 1.0, 40.0), MeterWindow(0, 1.0, 3.0, None, 0.0, Doubt.LOST)])
    faults = ["RAPL: no permission", "", "no answer yet"]
    silent = HostEnergy(deque([MeterWindow(0, 0.0, 1.0, None)]), "rapl", faults.pop)
    assert silent.state() == {"unmetered_seconds": 1.0, "source": "rapl", "reason": "no answer yet"}
    host = HostEnergy(windows, "rapl", faults.pop)
    assert host.state() == {"joules": 40.0, "unmetered_seconds": 2.0, "source": "rapl", "reason": ""}
    windows.append(MeterWindow(0, 3.0, 4.0, 2.0))
    assert host.state() == {
        "joules": 42.0,
        "unmetered_seconds": 2.0,
        "source": "rapl",
        "reason": "RAPL: no permission",
    }
    assert not windows


@pytest.mark.parametrize("pause_seconds", [0.001, 0.05])
def test_an_execution_whose_output_never_comes_holds_no_window_up(pause_seconds: float) -> None:
    """With a short pause it is part of a step that others belong to, with a long one it is a step of its own."""
    engine = Engine()
    engine.join(4)
    for number in range(60):
        engine.schedule(8)
        engine.clock.advance(0.004)
        if number == 30:
            engine.clock.advance(pause_seconds)
            engine.schedule(8)
            engine.clock.advance(0.004)
            engine.in_flight.popleft()  # the output of the next one comes, this one's does not
        engine.output()
        if number % 20 == 19:
            engine.edge(0, 300.0)
    assert engine.monitor.totals.lost_tickets == 1
    engine.finish(300.0)
    totals, (charge,) = engine.metering.attributor.totals, engine.charges
    assert len(engine.accounts) == 4 and not engine.metering.attributor.waiting
    assert charge.account is not None and charge.account.final and charge.steps == 61
    assert engine.settled(0).predicted_decode_joules == pytest.approx(charge.decode_joules)
    assert totals.attributed_joules > 0.9 * 300.0 * 0.24
    assert_conserved(engine.metering)


def test_windows_that_wait_too_long_for_a_step_are_counted_and_their_energy_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attribution, "MOST_WAITING", 3)
    engine = Engine()
    engine.join(4)
    engine.schedule(8)
    for _ in range(5):
        engine.clock.advance(0.1)
        engine.edge(0, 300.0)
    state = engine.metering.state()
    assert (state["dropped_windows"], state["unattributed_joules"]) == (2, pytest.approx(60.0))
    engine.finish(300.0)
    assert_conserved(engine.metering)


def test_the_recent_coverage_is_unknown_at_first_and_falls_where_no_window_is() -> None:
    engine = Engine()
    assert engine.metering.state()["coverage_ratio"] is None
    engine = busy(2.0, 200.0)
    engine.finish()
    assert engine.metering.state()["coverage_ratio"] == pytest.approx(1.0)
    engine.join(4)
    for _ in range(100):
        engine.execute(0.1)
    engine.edge(0, None, Doubt.LOST)
    engine.finish()
    assert 0.0 < engine.metering.state()["coverage_ratio"] < 0.8


def test_a_lost_output_hides_no_step_that_ran_from_a_window() -> None:
    engine = Engine()
    engine.join(4)
    engine.execute(0.1)
    engine.clock.advance(0.03)
    for prompt, chunk in ((400, 1), (10, 400)):
        engine.join(prompt)
        engine.schedule(chunk)
    engine.in_flight.popleft()
    for seconds in (1.2, 0.4):  # both windows end inside the second step
        engine.clock.advance(seconds)
        engine.edge(0, 300.0)
    engine.clock.advance(0.4)
    engine.output()
    engine.clock.advance(0.001)
    engine.edge(0, 300.0)
    engine.metering.tend_all()
    assert [account.busy_seconds > 0.0 for account in engine.accounts] == [True] * 3
    assert engine.metering.state()["idle_joules"] < 10.0 and not engine.metering.state()["idle_power_watts"]


def test_nothing_is_added_to_a_step_that_a_window_under_way_may_lie_over() -> None:
    engine = Engine()
    engine.join(4)
    for seconds in (*[0.021] * 30, 0.003):
        engine.execute(seconds)
    engine.schedule(8)
    engine.clock.advance(0.003)
    engine.monitor.end(engine.in_flight.popleft())  # not tended yet
    last = engine.metering.steps[-1]
    engine.edge(0, 300.0)
    assert last.executions == 2 and not last.sealed and engine.metering.attributor.waiting
    engine.schedule(8)
    assert engine.metering.steps[-1] is not last
    engine.finish(300.0)
    assert last.covered_ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("devices", "step_seconds", "window_seconds"),
    [(1, 0.1, 0.1), (1, 0.5, 0.1), (2, 0.1, 0.1), (8, 0.05, 0.4), (8, 0.02, 0.1), (8, 0.003, 0.1), (4, 0.2, 0.4)],
)
def test_what_waits_does_not_grow_however_long_steps_and_windows_are(
    devices: int, step_seconds: float, window_seconds: float
) -> None:
    engine = Engine(devices, patient=True)
    engine.join(4)
    most, due = 0, engine.clock()
    for step in range(1500):
        engine.schedule(8)
        engine.clock.advance(step_seconds)
        while engine.clock() >= due + window_seconds:
            for device in range(devices):
                engine.windows.append(MeterWindow(device, due, due + window_seconds, 200.0 * window_seconds, 0.1))
            due += window_seconds
        engine.output()
        if step % 16:
            engine.metering.tend()
        if step > 750:
            most = max(most, len(engine.metering.journal.open) + engine.metering.attributor.waiting)
    assert most < 3 * devices * (window_seconds / step_seconds + step_seconds / window_seconds) + 30
    assert_conserved(engine.metering)
