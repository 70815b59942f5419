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

# Growth of the total context after which a steady step is priced anew (docs/adr/0002).
REPRICE_RATIO = 0.01


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
        self.book = LedgerBook()
        self._priced: Estimate | None = None
        self._reprice_at = 0.0
        self.totals = EngineTotals()
        self._clock = clock
        self._tickets: deque[Ticket] = deque()
        self._last_done = float("-inf")

    def begin(self, key: object, slices: list[RequestSlice], encoder_tokens: int = 0) -> Ticket:
        """Price a step before it runs: one token for each decoding request, and ``slices``."""
        shape = self.book.shape(slices, encoder_tokens)
        estimate = self.predictor.estimate(shape)
        for part in slices:
            part.pay(estimate)
        self.book.advance(estimate)
        self._priced, self._reprice_at = None, 0.0
        return self._open(key, estimate, shape.prefill.tokens, shape.decode.tokens)

    def begin_steady(self, key: object) -> Ticket:
        """As :meth:`begin` for a step of decoding requests alone, the same as in the step before.

        The predictor is asked again once their total context has grown by ``REPRICE_RATIO``; in
        between its rates hold, which is exact for every kernel whose bound does not change.
        """
        shape = self.book.shape([])
        _, tokens, pairs, _, samples = shape.decode
        estimate = self._priced
        if estimate is None or pairs > self._reprice_at:
            estimate = self._priced = self.predictor.estimate(shape)
            self._reprice_at = pairs * (1.0 + REPRICE_RATIO)
        else:
            per_token, per_pair, per_sample = estimate.decode
            joules = tokens * per_token + pairs * per_pair + samples * per_sample
            estimate = Estimate(0.0, joules, *estimate[2:])
        self.book.advance(estimate)
        return self._open(key, estimate, 0, tokens)

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
        if not tickets or (tickets[0].key is not key and all(ticket.key is not key for ticket in tickets)):
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

    def finish(self, request_id: str, aborted: bool) -> RequestCharge | None:
        """Close a request's ledger and book it as finished or aborted."""
        charge = self.book.leave(request_id)
        if charge is None:
            return None
        totals = self.totals
        totals.cached_tokens += charge.cached_tokens
        totals.recomputed_tokens += charge.recomputed_tokens
        totals.rejected_draft_tokens += charge.rejected_draft_tokens
        if aborted:
            totals.aborted_requests += 1
            totals.aborted_joules += charge.prefill_joules + charge.decode_joules
        else:
            totals.finished_requests += 1
        return charge

    def reset(self) -> None:
        """Forget open ledgers and tickets; the totals stay."""
        self.book.clear()
        self._priced = None
        self._tickets.clear()

    @property
    def open_tickets(self) -> int:
        """Steps scheduled whose output has not come back."""
        return len(self._tickets)


def empty_batch_costs_nothing(predictor: Predictor) -> bool:
    """Self-check at start: a predictor that prices an empty step above zero is not used."""
    estimate = predictor.estimate(BatchShape())
    return estimate.energy_joules == 0.0 and estimate.duration_seconds == 0.0
