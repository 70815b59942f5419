"""From a host's SchedulerOutput and requests to the ledger book's slices.

Only attributes that are the same in all supported versions are read: ``num_scheduled_tokens``,
``total_num_scheduled_tokens``, ``scheduled_spec_decode_tokens`` and ``scheduled_encoder_inputs`` of
the output and ``num_computed_tokens``, ``num_tokens``, ``num_prompt_tokens`` of a request, which ``schedule()``
has already advanced when we look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import filterfalse
from typing import Any

from llmco2_vllm.core.ledgers import LedgerBook, RequestCharge, RequestSlice
from llmco2_vllm.monitor import StepMonitor


def known_tokens(request: Any) -> int:
    """Tokens whose values were given when the step was scheduled: all but the one just sampled."""
    prompt: int = request.num_prompt_tokens
    but_one: int = request.num_tokens - 1
    return prompt if prompt > but_one else but_one


class StepReader:
    """Reads steps into a monitor's ledger book and knows when the next one can take the fast path.

    speculative: the deployment may draft tokens. Drafts are taken back after later steps were
    scheduled, so no request is then ever trusted to be in steady decode.
    """

    def __init__(self, monitor: StepMonitor, on_join: Callable[[str, Any], None], speculative: bool = False) -> None:
        self._monitor = monitor
        self._on_join = on_join
        self._speculative = speculative
        self._steady: list[str] | None = None
        self._preempted: set[str] = set()
        self._others: list[tuple[str, int]] = []

    def is_steady(self, output: Any) -> bool:
        """Whether the step repeats the last one: the same requests in the same order, one decode token each.

        As many tokens as requests means one each. The ids are the scheduler's own string objects, so
        the comparison is one of pointers, in C.
        """
        scheduled = output.num_scheduled_tokens
        return (
            self._steady is not None
            and output.total_num_scheduled_tokens == len(scheduled)
            and list(scheduled) == self._steady
            and not output.scheduled_spec_decode_tokens
            and not output.scheduled_encoder_inputs
        )

    def leave_fast_path(self) -> None:
        """A request was freed or reset: the next step is read in full."""
        self._steady = None

    def preempted(self, request_id: str) -> None:
        """The request gave up its KV cache and will replay its tokens."""
        self._preempted.add(request_id)
        self._steady = None
        self._monitor.book.interrupt(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone for good."""
        self._preempted.discard(request_id)
        self._steady = None

    def read(self, output: Any, requests: Mapping[str, Any]) -> list[RequestSlice]:
        """What the step computes besides one token for each of ``book.decoding``.

        Ledgers are opened for requests seen for the first time.
        """
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        book = self._monitor.book
        decoding = book.decoding
        others = [(request_id, scheduled[request_id]) for request_id in filterfalse(decoding.__contains__, scheduled)]
        rest = output.total_num_scheduled_tokens - sum([tokens for _, tokens in others])
        # Most often the decoding requests are all there, with one token each: no need to look at every one.
        if not len(scheduled) - len(others) == len(decoding) == rest:
            for request_id in [r for r in decoding if scheduled.get(r) != 1]:
                book.interrupt(request_id)
            others = [item for item in scheduled.items() if item[0] not in decoding]
        self._steady = None if others else list(scheduled)
        self._others = others
        return [self._slice(book, request_id, tokens, requests[request_id]) for request_id, tokens in others]

    @property
    def charged_alone(self) -> list[str]:
        """Requests of the step last read that were not charged through the running sums."""
        return [request_id for request_id, _ in self._others]

    def charged(self, output: Any) -> None:
        """After the step was charged: requests that decode one token a step from now on enter the sums."""
        if self._speculative or output.scheduled_spec_decode_tokens:
            return
        book = self._monitor.book
        for request_id, _ in self._others:
            charge = book.open[request_id]
            if charge.computed >= charge.known:
                book.enter(request_id)

    def _slice(self, book: LedgerBook, request_id: str, tokens: int, request: Any) -> RequestSlice:
        start = request.num_computed_tokens - tokens
        charge = book.open.get(request_id)
        if charge is None:
            self._preempted.discard(request_id)
            charge = book.join(request_id, start, known_tokens(request), request.num_prompt_tokens)
            self._on_join(request_id, request)
        elif charge.computed != start or request_id in self._preempted:
            self._correct(request_id, charge, start, request)
        part = charge.slice(tokens)
        if part.decode > 1:
            # Drafts, or a session that got a further prompt: only the request knows.
            charge.known = known_tokens(request)
            part = charge.slice(tokens)
        return part

    def _correct(self, request_id: str, charge: RequestCharge, start: int, request: Any) -> None:
        """The scheduler moved the request back (preemption, rejected drafts) or forward (remote KV)."""
        if self._speculative and request_id not in self._preempted and charge.computed > start:
            self._monitor.book.reject(charge, charge.computed - start)
        else:
            self._preempted.discard(request_id)
            charge.rewind(start, known_tokens(request))
