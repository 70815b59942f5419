"""StepMonitor: every scheduler step becomes a ticket, priced before it runs and closed after.

It knows its parts as protocols and nothing of vLLM. It lives on the scheduler thread alone,
takes no lock, does no I/O and logs nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate, Predictor
from llmco2_vllm.core.ledgers import LedgerBook, RequestCharge, RequestSlice
from llmco2_vllm.core.recent import RecentGrowth
from llmco2_vllm.core.steps import Mark, Step
from llmco2_vllm.metering import Metering

# A steady step is priced anew after this growth of the total context, and not before so many steps (docs/adr/0002).
REPRICE_RATIO = 0.01
REPRICE_STEPS = 16
# The recent pace is that of the last one to two times so much busy time.
PACE_SECONDS = 30.0


class Ticket(NamedTuple):
    """A step between ``schedule()`` and its output. ``key`` is the object that names the step.

    In steady decode ``estimate`` is that of the step that was last priced. step: for the meter, None without one.
    """

    key: object
    scheduled_seconds: float
    estimate: Estimate
    step: Step | None = None


class StepWindow(NamedTuple):
    """Time a closed step occupied, ``[begin, end)`` on the monitor's clock (ARCHITECTURE decision 2)."""

    begin_seconds: float
    end_seconds: float
    estimate: Estimate


@dataclass(slots=True)
class EngineTotals:
    """Cumulative since start. Joules are predicted; ``aborted`` is contained in the phase totals."""

    steps: int = 0
    prefill_joules: float = 0.0
    decode_joules: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    aborted_joules: float = 0.0
    aborted_requests: int = 0
    finished_requests: int = 0
    cached_tokens: int = 0
    recomputed_joules: float = 0.0
    recomputed_tokens: int = 0
    rejected_draft_tokens: int = 0
    predicted_seconds: float = 0.0
    step_seconds: float = 0.0
    lost_tickets: int = 0


class StepMonitor:
    """Prices steps, charges ledgers and tiles busy time over the steps of one engine.

    metering: weighs the steps afterwards, None without a meter.
    """

    def __init__(
        self,
        predictor: Predictor,
        clock: Callable[[], float] = time.monotonic,
        metering: Metering | None = None,
    ) -> None:
        self.predictor = predictor
        self.metering = metering
        self._clock = clock
        self._book = self._new_book()
        self._totals = EngineTotals()
        self._tickets: deque[Ticket] = deque()
        self._last_done = float("-inf")
        # Steady steps not yet in the book: counted, at the rates of the step that was last priced.
        self._priced: Estimate | None = None
        self._repeats = 0
        self._repeats_allowed = 0
        # The step that is priced and not charged.
        self._due: tuple[list[RequestSlice], BatchShape, Estimate] | None = None
        # Of busy seconds and predicted joules, for the pace.
        self._recent = RecentGrowth(PACE_SECONDS, 0.0, 0.0)
        self._pace = 0.0, 0.0  # (busy seconds it was found at, pace)
        # What the run's first step computed, its steps since, and the meter's last one of them.
        self._run_shape, self._run_steps = BatchShape(), 0
        self._run_step: Step | None = None

    def _new_book(self) -> LedgerBook:
        return LedgerBook(None if self.metering is None else self.metering.journal)

    @property
    def book(self) -> LedgerBook:
        """The ledgers, up to date."""
        if self._repeats or self._due is not None:
            self._catch_up()
        return self._book

    @property
    def totals(self) -> EngineTotals:
        """The cumulative figures, up to date."""
        self._catch_up()
        return self._totals

    def begin(self, key: object, slices: list[RequestSlice], encoder_tokens: int = 0) -> Ticket:
        """Price a step before it runs: one token for each decoding request, and ``slices``.

        Nobody waits for the charges: they are made when the ledgers are next asked for, or by :meth:`charge`.
        """
        shape = self.book.shape(slices, encoder_tokens)
        estimate = self.predictor.estimate(shape)
        now, step = self._clock(), None
        if self.metering is not None:
            step = self.metering.opened(Step(now, estimate, shape))
        self._due = slices, shape, estimate
        self._priced, self._repeats_allowed = None, 0
        return self._open(key, now, estimate, step)

    def charge(self) -> None:
        """Charge the step that was priced by :meth:`begin`."""
        if self._due is None:
            return
        (slices, shape, estimate), self._due = self._due, None
        if self.metering is None:
            for part in slices:
                part.pay(estimate)
        elif slices:
            _pay(slices, estimate, self.metering.journal.mark())
        self._book.advance(estimate)
        self._add(shape, estimate)

    def begin_steady(self, key: object) -> Ticket:
        """As :meth:`begin` for a step of decoding requests alone, the same as in the step before.

        The predictor is asked again once their total context has grown by ``REPRICE_RATIO`` and
        ``REPRICE_STEPS`` have passed. In between its rates hold, which is exact for every kernel whose
        bound does not change, and a step is only counted.
        """
        estimate = self._priced
        if estimate is None or self._repeats >= self._repeats_allowed:
            estimate = self._price_run()
        self._repeats += 1
        if self.metering is None:
            return self._open(key, self._clock(), estimate)
        now, step = self._clock(), self._run_step
        if step is None or not self.metering.repeated(step, now):
            step = Step(now, estimate, self._run_shape, self._run_steps)
            self._run_step = self.metering.opened(step)
        self._run_steps += 1
        return self._open(key, now, estimate, step)

    def _price_run(self) -> Estimate:
        self._run_shape = shape = self.book.shape([])
        self._run_steps, self._run_step = 0, None
        self._priced = estimate = self.predictor.estimate(shape)
        tokens, pairs = shape.decode.tokens, shape.decode.pairs
        self._repeats_allowed = max(REPRICE_STEPS, int(REPRICE_RATIO * pairs / max(tokens, 1)))
        return estimate

    def _catch_up(self) -> None:
        self.charge()
        repeats, self._repeats = self._repeats, 0
        estimate = self._priced
        if not repeats or estimate is None:
            return
        _, tokens, pairs, _, samples = self._book.shape([]).decode
        per_token, per_pair, per_sample = estimate.decode
        # Every step reads one more token of each request than the step before.
        all_pairs = repeats * pairs + tokens * repeats * (repeats - 1) // 2
        totals = self._totals
        totals.steps += repeats
        totals.decode_tokens += repeats * tokens
        totals.decode_joules += repeats * (tokens * per_token + samples * per_sample) + all_pairs * per_pair
        totals.predicted_seconds += repeats * estimate.duration_seconds
        self._book.advance(estimate, repeats)

    def _add(self, shape: BatchShape, estimate: Estimate) -> None:
        totals = self._totals
        totals.steps += 1
        totals.prefill_joules += estimate.prefill_joules
        totals.decode_joules += estimate.decode_joules
        totals.prefill_tokens += shape.prefill.tokens
        totals.decode_tokens += shape.decode.tokens
        totals.predicted_seconds += estimate.duration_seconds

    def _open(self, key: object, now_seconds: float, estimate: Estimate, step: Step | None = None) -> Ticket:
        ticket = Ticket(key, now_seconds, estimate, step)
        self._tickets.append(ticket)
        return ticket

    def end(self, key: object) -> StepWindow | None:
        """Close the step named by ``key``. None when its ticket is unknown (it is then counted lost).

        Outputs come in the order the steps were scheduled; tickets that were passed over are lost.
        """
        self.charge()  # a step is settled after it was charged
        ticket = self._tickets.popleft() if self._tickets else None
        if ticket is None or ticket.key is not key:
            ticket = self._search(key, ticket)
            if ticket is None:
                return None
        done = self._clock()
        window = StepWindow(max(ticket.scheduled_seconds, self._last_done), done, ticket.estimate)
        self._last_done = done
        if self.metering is not None and ticket.step is not None:
            self.metering.closed(ticket.step, window.begin_seconds, done)
        self._totals.step_seconds += done - window.begin_seconds
        return window

    def _search(self, key: object, first: Ticket | None) -> Ticket | None:
        """The ticket of ``key`` behind ``first``, which was taken from the queue; what is before it is lost."""
        tickets, totals = self._tickets, self._totals
        if first is not None:
            tickets.appendleft(first)
        if all(ticket.key is not key for ticket in tickets):
            totals.lost_tickets += 1
            return None
        while (ticket := tickets.popleft()).key is not key:
            totals.lost_tickets += 1
            if self.metering is not None and ticket.step is not None:
                self.metering.lost(ticket.step)
        return ticket

    @property
    def seconds_per_joule(self) -> float:
        """Busy time per predicted joule of the recent past; 0 until a step has closed."""
        if self._pace[0] == self._totals.step_seconds:
            return self._pace[1]  # asked for every request that ends with a step
        totals = self.totals
        still_open = sum(ticket.estimate.energy_joules for ticket in self._tickets)
        now = totals.step_seconds
        seconds, joules = self._recent.until(now, totals.prefill_joules + totals.decode_joules - still_open)
        pace = seconds / joules if joules > 0.0 and seconds > 0.0 else 0.0
        self._pace = now, pace
        return pace

    def finish(self, request_id: str) -> RequestCharge | None:
        """Close a request's ledger; None if there was none. Say how it ended with :meth:`conclude`."""
        charge = self.book.leave(request_id)
        self._priced = None  # the run has lost a request
        if charge is None:
            return None
        totals = self._totals
        totals.cached_tokens += charge.cached_tokens
        totals.recomputed_joules += charge.recomputed_joules
        totals.recomputed_tokens += charge.recomputed_tokens
        totals.rejected_draft_tokens += charge.rejected_draft_tokens
        return charge

    def conclude(self, charge: RequestCharge, reported_joules: float) -> float:
        """Book a closed ledger: what its client was told, and the rest as aborted. 0 told means it was aborted.

        Returns the share of its energy that was told; 0 of nothing.
        """
        totals, spent_joules = self._totals, charge.energy_joules
        ratio = reported_joules / spent_joules if spent_joules > 0.0 else 0.0
        totals.aborted_joules += spent_joules - reported_joules
        if ratio != 1.0 and spent_joules > 0.0:
            self._book.conclude(charge, ratio)
        if reported_joules:
            totals.finished_requests += 1
        else:
            totals.aborted_requests += 1
        return ratio

    def reset(self) -> None:
        """Forget open ledgers and tickets; the totals stay."""
        self._catch_up()
        if self.metering is not None:
            for request_id in list(self._book.decoding):
                self._book.interrupt(request_id)
            self.metering.reset()
        self._book = self._new_book()
        self._priced = None
        self._tickets.clear()

    @property
    def open_tickets(self) -> int:
        """Steps scheduled whose output has not come back."""
        return len(self._tickets)


def _pay(slices: list[RequestSlice], estimate: Estimate, mark: Mark) -> None:
    for part in slices:
        joules, account = part.pay(estimate), part.charge.account
        assert account is not None
        account.pay(mark, joules, part.decode)


def empty_batch_costs_nothing(predictor: Predictor) -> bool:
    """Self-check at start: a predictor that prices an empty step above zero is not used."""
    estimate = predictor.estimate(BatchShape())
    return estimate.energy_joules == 0.0 and estimate.duration_seconds == 0.0
