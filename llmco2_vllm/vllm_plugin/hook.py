"""EngineHook: what happens at each scheduler step and at each turn of a request's life.

Runs on the engine core's main thread, each entry behind a guard. Everything it does is arrays,
and O(1) Python in steady decode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import compress, islice
from operator import attrgetter
from time import perf_counter, time
from typing import Any

from llmco2_vllm.core.ledgers import RequestCharge
from llmco2_vllm.metering import Metering
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.telemetry.ledger import KEY, SUMS_KEY, Origin, Provenance, encode, encode_sums
from llmco2_vllm.telemetry.metered import METERED_KEY, Metered, encode_metered, metered_of
from llmco2_vllm.vllm_plugin.guard import Guard
from llmco2_vllm.vllm_plugin.translate import StepReader

# Steps between ledgers that are sent although nothing happened to their request.
PERIOD_STEPS = 16
# Requests kept until the front end has said whether they ended or their client left.
MOST_UNDECIDED = 10_000
_ABORTED = ("FINISHED_ABORTED", "FINISHED_ERROR")
_request_id = attrgetter("request_id")
_UNWRITTEN: dict[str, str] = {}


class EngineHook:
    """What the mixin calls. One per scheduler; holds the monitor, the reader and the outbox."""

    def __init__(self, monitor: StepMonitor, origin: Origin, guard: Guard, speculative: bool = False) -> None:
        self.monitor = monitor
        self.origin = origin
        self.guard = guard
        self.reader = StepReader(monitor, self._joined, speculative)
        # Further parts that tell how they are: the meter, the sample store.
        self.states: dict[str, Callable[[], Any]] = {}
        # What is true of the meter at this moment: its name, and why it does not measure.
        self.meter_now: Callable[[], tuple[str, str]] = lambda: origin.provenance[1:]
        self.started_seconds = time()
        self.hook_seconds = 0.0
        # Requests whose ledger goes with their next output, with its records where they are written already, and those
        # with stop strings.
        self._unsent: dict[str, dict[str, str]] = {}
        self._stopping: set[str] = set()
        self._sums_steps = 0
        self._strangers: set[str] = set()
        # Requests with stop strings end in the front end, and the engine sees an abort either way. Joules
        # of those that are gone here, and what the front end counted of those still here.
        self._ended: dict[str, RequestCharge] = {}
        self._counted: dict[str, float] = {}
        # Requests that are gone and the share of their energy that was reported, until the meter has covered their
        # last step and the front end has asked.
        self._late: dict[str, tuple[RequestCharge, float]] = {}
        self._dark = False  # the meter knows that the hook is off
        # The step that was priced last, until it is charged; whether the host told us that it runs.
        self._priced: Any = None
        self._told = False
        # Requests that the scheduler let go of in this update: id, whether its client left, headers of its last output
        # unless that has no ledger.
        self._leaving: list[tuple[str, bool, dict[str, str] | None]] = []
        self._updating = False
        self._cursor = 0  # outputs that have come back
        # How many had when it was last asked what is true of the meter and of the pace.
        self._followed, self._seconds_per_joule = -1, 0.0

    # -- schedule() -----------------------------------------------------------------------

    def scheduled(self, output: Any, scheduler: Any) -> None:
        """Price the step that ``schedule()`` returned."""
        if not output.total_num_scheduled_tokens:
            return
        begin = perf_counter()
        self._charge()
        if self.reader.is_steady(output):
            self.monitor.begin_steady(output)
        else:
            slices = self.reader.read(output, scheduler.requests)
            if slices and self.monitor.metering is not None:
                self.monitor.metering.working(True)
            self.monitor.begin(output, slices, _encoder_inputs(output))
            self._priced = output
        self.hook_seconds += perf_counter() - begin

    # -- while the step runs --------------------------------------------------------------

    def running(self) -> None:
        """What no step has to wait for: charges, and some of the meter's work."""
        begin = perf_counter()
        self._told = True
        if self._priced is not None or (self._cursor + 1) % PERIOD_STEPS == 0:
            self._follow()  # ledgers are due when its output is back
            self._charge()
        if self.monitor.metering is not None:
            self.monitor.metering.tend()
        self.hook_seconds += perf_counter() - begin

    def _charge(self) -> None:
        if self._priced is None:
            return
        output, self._priced = self._priced, None
        self.monitor.charge()
        self.reader.charged(output)
        alone = self.reader.charged_alone
        for request_id in alone:
            if request_id in self._unsent and request_id not in self._stopping:
                self._unsent[request_id] = self._live(request_id)
        if self._stopping:
            # Charged by itself in this step, or left out of it: the sums do not say its figures.
            self._resend(self._stopping.intersection(alone))
            self._resend(self._stopping.difference(self.monitor.book.decoding))

    def _charge_late(self) -> None:
        """Where somebody waits for it, and nobody else takes its time."""
        begin = perf_counter()
        self._charge()
        self.hook_seconds += perf_counter() - begin

    def _resend(self, request_ids: Iterable[str]) -> None:
        self._unsent.update(dict.fromkeys(request_ids, _UNWRITTEN))

    def _joined(self, request_id: str, request: Any) -> None:
        sampling = request.sampling_params
        if request_id in self._strangers or sampling is None:
            return  # what is pooled has one output, its last
        self._unsent[request_id] = _UNWRITTEN
        # The engine never learns of a stop string: the front end ends the request and aborts it here.
        if sampling.stop:
            self._stopping.add(request_id)

    # -- update_from_output() -------------------------------------------------------------

    def executed(self, output: Any) -> None:
        """Close the step's window: its output has come back."""
        self._cursor += 1
        self._updating = True
        if output.total_num_scheduled_tokens:
            if not self._told:
                self.running()  # some hosts do not tell us, those that pool with batches in flight among them
            self._told = False
            if self._priced is not None:
                self._charge_late()
            self.monitor.end(output)

    def attach(self, outputs_by_client: Mapping[int, Any] | None) -> None:
        """Put the ledgers that are due into the outputs' trace headers.

        Due are the first output of a request, and every 16th step one other in turn: a live figure at a cost
        independent of the batch. The last one brings its ledger along since the request was freed. With a request
        with stop strings goes, of each step, what the front end needs to know its figures: its ledger, or the running
        sums it is charged by.
        """
        self._updating = False
        periodic = self._cursor % PERIOD_STEPS == 0
        if not (periodic or self._leaving or self._unsent or self._stopping):
            return
        begin = perf_counter()
        if self._leaving:
            self._let_go()
        sums = self._sums_record() if self._stopping else None
        for outputs in (outputs_by_client or {}).values():
            if sums is not None and outputs.outputs:
                _add_headers(outputs.outputs[0], {SUMS_KEY: sums})
            if self._unsent:
                self._attach_first(outputs.outputs)
            if periodic and outputs.outputs:
                self._attach_periodic(outputs.outputs)
        self.hook_seconds += perf_counter() - begin

    def _follow(self) -> None:
        """Records say what is true when they are sent, of the pace and of the meter: it may be lost and come back."""
        self._followed, self._seconds_per_joule = self._cursor, self.monitor.seconds_per_joule
        provenance, now = self.origin.provenance, self.meter_now()
        if provenance[1:] != now:
            self.origin = replace(self.origin, provenance=Provenance(provenance.predictor, *now))

    def _sums_record(self) -> str:
        sums = self.monitor.book.sums
        if sums.steps < self._sums_steps:
            self._resend(self._stopping)  # the sums were begun anew
        self._sums_steps = sums.steps
        return encode_sums(sums, self.origin.engine)

    def _attach_first(self, outputs: list[Any]) -> None:
        # Those of requests that are new in a step come last: most often it ends with the first few it looks at.
        due = map(self._unsent.__contains__, map(_request_id, reversed(outputs)))
        for output in list(islice(compress(reversed(outputs), due), len(self._unsent))):
            records = self._unsent.pop(output.request_id, _UNWRITTEN)
            _add_headers(output, records or self._live(output.request_id))

    def _attach_periodic(self, outputs: list[Any]) -> None:
        output = outputs[self._cursor // PERIOD_STEPS % len(outputs)]
        if KEY not in (output.trace_headers or ()) and output.request_id not in self._strangers:
            _add_headers(output, self._live(output.request_id))

    def _live(self, request_id: str) -> dict[str, str]:
        """The records of a request under way; none of one that is not ours."""
        book = self.monitor.book
        charge = book.open.get(request_id)
        if charge is None:
            return {}
        book.settle(charge)
        stops = request_id in self._stopping
        context = charge.computed if stops and charge.entered is not None else -1
        # As long as nothing of it is settled, a ledger goes alone where its last one is sure to come.
        alone = not stops and charge.account is not None and not charge.account.begun
        return self._records(charge, False, context, alone)

    def _records(self, charge: RequestCharge, final: bool, context: int = -1, alone: bool = False) -> dict[str, str]:
        if self._cursor - self._followed > 1 or not self._seconds_per_joule:
            self._follow()
        records = {KEY: encode(charge, self.origin, final, context, self._seconds_per_joule)}
        if not alone and (metered := self._metered(charge)) is not None:
            records[METERED_KEY] = encode_metered(metered)
        return records

    def _metered(self, charge: RequestCharge, reported_ratio: float = 1.0) -> Metered | None:
        metering = self.monitor.metering
        if metering is None:
            return None
        return metered_of(charge, metering.settlement, metering.attributor.recent_ratio, reported_ratio)

    # -- the request's life ---------------------------------------------------------------

    def freed(self, request: Any) -> None:
        """The scheduler lets go of a request: finished, aborted or failed."""
        begin = perf_counter()
        request_id, headers = request.request_id, None
        aborted = request.status._name_ in _ABORTED  # .name is a property, and slower
        undecided = aborted and request_id in self._stopping  # the front end ended it, or its client left
        if request_id in self.monitor.book.open and request_id not in self._strangers and not undecided:
            # The host gives its last output these headers, which are filled when the outputs are made: all at once.
            request.trace_headers = headers = dict(request.trace_headers or ())
        self._leaving.append((request_id, aborted, headers))
        if not self._updating:
            self._let_go()
        self.hook_seconds += perf_counter() - begin

    def _let_go(self) -> None:
        self._charge()
        leaving, self._leaving = self._leaving, []
        for request_id, aborted, headers in leaving:
            self.reader.forget(request_id)
            undecided = aborted and request_id in self._stopping
            self._unsent.pop(request_id, None)
            self._stopping.discard(request_id)
            counted = self._counted.pop(request_id, None)
            self._strangers.discard(request_id)
            charge = self.monitor.finish(request_id)
            if charge is None:
                continue
            if counted is not None:
                self._conclude(request_id, charge, counted)
            elif undecided:
                self._ended[request_id] = charge
            else:
                self._conclude(request_id, charge, 0.0 if aborted else charge.energy_joules)
            if headers is not None:
                headers.update(self._records(charge, final=True))
        while len(self._ended) > MOST_UNDECIDED:
            self._decide(next(iter(self._ended)), 0.0)
        while len(self._late) > MOST_UNDECIDED:
            del self._late[next(iter(self._late))]
        if self.monitor.metering is not None and not self.monitor.book.open:
            self.monitor.metering.working(False)

    def decide(self, counted: Mapping[str, float]) -> None:
        """What the front end counted, in joules, of requests it ended itself; 0 where the client left."""
        for request_id, joules in counted.items():
            if request_id in self._ended:
                self._decide(request_id, joules)
            elif request_id in self._stopping:
                self._counted[request_id] = joules

    def _decide(self, request_id: str, joules: float) -> None:
        self._conclude(request_id, self._ended.pop(request_id), joules)

    def _conclude(self, request_id: str, charge: RequestCharge, joules: float) -> None:
        ratio = self.monitor.conclude(charge, joules)
        if ratio > 0.0 and charge.account is not None:
            self._late[request_id] = charge, ratio

    def preempted(self, request: Any) -> None:
        """The scheduler takes a running request's KV cache away; it will replay its tokens."""
        if self._priced is not None:
            self._charge_late()
        self.reader.preempted(request.request_id)

    def switch(self, on: bool, request_ids: Iterable[str]) -> None:
        """Turn the hook off, or on again; requests under way at that moment stay without a figure."""
        if on == self.guard.active:
            return
        if on:
            self.reader.leave_fast_path()
            self._priced, self._updating = None, False
            self._leaving.clear()
            self.monitor.reset()
            self._strangers = set(request_ids)
            self._unsent.clear()
            self._stopping.clear()
            self._counted.clear()
        self.guard.active = on
        if self.monitor.metering is not None:
            self.monitor.metering.switch(on)
            self._dark = not on

    def settled(self, request_ids: Iterable[str]) -> dict[str, str]:
        """The final records of those of these requests that no further window can change."""
        found = {}
        for request_id in request_ids:
            late = self._late.get(request_id)
            if late is not None and (record := self._metered(*late)) is not None and record.final:
                # Kept: an answer may be lost on its way, and is then asked for again.
                found[request_id] = encode_metered(record)
        return found

    def _tend(self, metering: Metering) -> None:
        if not self.guard.active and not self._dark:
            self._dark = True  # switched off by a failure
            metering.switch(False)
        self.guard.call("tend", metering.tend_all)

    def snapshot(self) -> dict[str, Any]:
        """Cumulative figures and identity, for the front end; plain JSON values."""
        metering = self.monitor.metering
        self.guard.call("get_grammar_bitmask", self._charge_late)
        if metering is not None:
            self._tend(metering)
        self._follow()
        return {
            "engine": self.origin.engine,
            "started_seconds": self.started_seconds,
            "active": self.guard.active,
            "provenance": self.origin.provenance._asdict(),
            "failures": self.guard.counts,
            "hook_seconds": self.hook_seconds,
            "running_requests": len(self.monitor.book.open),
            "open_tickets": self.monitor.open_tickets,
            **asdict(self.monitor.totals),
            **({} if metering is None else {"metered": metering.state()}),
            **{name: state() for name, state in self.states.items()},
        }


def _add_headers(to: Any, records: Mapping[str, str]) -> None:
    if records:
        # A new dict: the request's own is shared with the tracing of the host.
        to.trace_headers = {**(to.trace_headers or {}), **records}


def _encoder_inputs(output: Any) -> int:
    return sum(map(len, output.scheduled_encoder_inputs.values())) if output.scheduled_encoder_inputs else 0
