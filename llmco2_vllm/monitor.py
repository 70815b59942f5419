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

from llmco2_vllm.core.batch import BatchShape, RequestSlices
from llmco2_vllm.core.estimate import Estimate, Predictor
from llmco2_vllm.core.ledgers import (
    CACHED,
    DECODE,
    PREFILL,
    RECOMPUTED,
    REJECTED,
    LedgerRow,
    LedgerTable,
    SlotArray,
)


class Ticket(NamedTuple):
    """A step between ``schedule()`` and its output. ``key`` is the object that names the step."""

    key: object
    scheduled_seconds: float
    estimate: Estimate


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
    recomputed_tokens: int = 0
    rejected_draft_tokens: int = 0
    predicted_seconds: float = 0.0
    step_seconds: float = 0.0
    lost_tickets: int = 0


class StepMonitor:
    """Prices steps, charges ledgers and tiles busy time over the steps of one engine."""

    def __init__(self, predictor: Predictor, clock: Callable[[], float] = time.monotonic) -> None:
        self.predictor = predictor
        self.table = LedgerTable()
        self.totals = EngineTotals()
        self._clock = clock
        self._tickets: deque[Ticket] = deque()
        self._last_done = float("-inf")

    def begin(self, key: object, slots: SlotArray, slices: RequestSlices, encoder_tokens: int = 0) -> Ticket:
        """Price a step before it runs and charge it to the requests at ``slots``; no run may be open."""
        estimate = self.predictor.estimate(slices.shape(encoder_tokens))
        self.table.charge(slots, slices, estimate)
        return self._open(key, estimate, int(slices.prefill.sum()), int(slices.decode.sum()))

    def begin_steady(self, key: object) -> Ticket:
        """As :meth:`begin` for one more step of the open run; cost independent of the batch size."""
        run = self.table.run
        if run is None:
            raise RuntimeError("no steady run is open")
        shape = run.next_shape()
        estimate = self.predictor.estimate(shape)
        run.add(estimate)
        return self._open(key, estimate, 0, shape.decode.tokens)

    def _open(self, key: object, estimate: Estimate, prefill_tokens: int, decode_tokens: int) -> Ticket:
        totals = self.totals
        totals.steps += 1
        totals.prefill_joules += estimate.prefill_joules
        totals.decode_joules += estimate.decode_joules
        totals.prefill_tokens += prefill_tokens
        totals.decode_tokens += decode_tokens
        totals.predicted_seconds += estimate.duration_seconds
        ticket = Ticket(key, self._clock(), estimate)
        self._tickets.append(ticket)
        return ticket

    def end(self, key: object) -> StepWindow | None:
        """Close the step named by ``key``. None when its ticket is unknown (it is then counted lost).

        Outputs come in the order the steps were scheduled; tickets that were passed over are lost.
        """
        tickets = self._tickets
        if not any(ticket.key is key for ticket in tickets):
            self.totals.lost_tickets += 1
            return None
        ticket = tickets.popleft()
        while ticket.key is not key:
            self.totals.lost_tickets += 1
            ticket = tickets.popleft()
        done = self._clock()
        window = StepWindow(max(ticket.scheduled_seconds, self._last_done), done, ticket.estimate)
        self._last_done = done
        self.totals.step_seconds += done - window.begin_seconds
        return window

    def finish(self, request_id: str, aborted: bool) -> LedgerRow | None:
        """Close a request's ledger and book it as finished or aborted."""
        row = self.table.leave(request_id)
        if row is None:
            return None
        totals = self.totals
        totals.cached_tokens += row.counts[CACHED]
        totals.recomputed_tokens += row.counts[RECOMPUTED]
        totals.rejected_draft_tokens += row.counts[REJECTED]
        if aborted:
            totals.aborted_requests += 1
            totals.aborted_joules += row.joules[PREFILL] + row.joules[DECODE]
        else:
            totals.finished_requests += 1
        return row

    def reset(self) -> None:
        """Forget open ledgers and tickets; the totals stay."""
        self.table.clear()
        self._tickets.clear()

    @property
    def open_tickets(self) -> int:
        """Steps scheduled whose output has not come back."""
        return len(self._tickets)


def empty_batch_costs_nothing(predictor: Predictor) -> bool:
    """Self-check at start: a predictor that prices an empty step above zero is not used."""
    estimate = predictor.estimate(BatchShape())
    return estimate.energy_joules == 0.0 and estimate.duration_seconds == 0.0
