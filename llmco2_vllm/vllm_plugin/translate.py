"""From a host's SchedulerOutput and requests to slots and slices of the ledger table.

Only attributes that are the same in all supported versions are read: ``num_scheduled_tokens``,
``total_num_scheduled_tokens``, ``scheduled_spec_decode_tokens``, ``scheduled_encoder_inputs`` of
the output and ``num_computed_tokens``, ``num_tokens``, ``num_prompt_tokens`` of a request, which
``schedule()`` has already advanced when we look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np

from llmco2_vllm.core.batch import IntArray, RequestSlices
from llmco2_vllm.core.ledgers import LedgerTable, SlotArray

_computed_tokens = attrgetter("num_computed_tokens")


def known_tokens(request: Any) -> int:
    """Tokens whose values were given when the step was scheduled: all but the one just sampled."""
    return max(int(request.num_prompt_tokens), int(request.num_tokens) - 1)


class StepReader:
    """Reads steps into a :class:`LedgerTable` and knows when the next one can take the fast path."""

    def __init__(self, table: LedgerTable, on_join: Callable[[str, Any], None] = lambda _id, _request: None) -> None:
        self.table = table
        self._on_join = on_join
        self._on_batch: Mapping[str, int] | None = None
        self._preempted: set[str] = set()
        self._drafts_seen = False

    def is_steady(self, output: Any) -> bool:
        """Whether the step repeats the open run: the same requests, one decode token each.

        Dict equality is checked in C, and is quick because keys are identical objects.
        """
        scheduled = output.num_scheduled_tokens
        return (
            self._on_batch is not None
            and not output.scheduled_spec_decode_tokens
            and not output.scheduled_encoder_inputs
            and scheduled == self._on_batch
        )

    def leave_fast_path(self) -> None:
        """A request was preempted, freed or reset: the next step is read in full."""
        self._on_batch = None

    def preempted(self, request_id: str) -> None:
        """The request gave up its KV cache and will replay its tokens."""
        self._preempted.add(request_id)
        self._on_batch = None

    def read(self, output: Any, requests: Mapping[str, Any]) -> tuple[SlotArray, RequestSlices]:
        """Slots and slices of the step, in the order of ``num_scheduled_tokens``.

        Ledgers are opened for requests seen for the first time. The table must have no open run.
        """
        table = self.table
        scheduled: dict[str, int] = output.num_scheduled_tokens
        size = len(scheduled)
        rows = list(map(requests.__getitem__, scheduled))
        tokens = np.fromiter(scheduled.values(), np.int64, size)
        start = np.fromiter(map(_computed_tokens, rows), np.int64, size) - tokens
        if fresh := scheduled.keys() - table.slot_of.keys():
            for position, (request_id, request) in enumerate(zip(scheduled, rows, strict=True)):
                if request_id in fresh:
                    self._join(request_id, request, int(start[position]))
        slots = np.fromiter(map(table.slot_of.__getitem__, scheduled), np.intp, size)
        moved = table.computed[slots] - start
        if moved.any() or self._preempted:
            self._correct(scheduled, rows, slots, moved)
        slices = table.slices(slots, start, tokens)
        if (several := np.flatnonzero(slices.decode > 1)).size:
            # Drafts, or a session that got a further prompt: only the request knows.
            table.known[slots[several]] = [known_tokens(rows[position]) for position in several]
            slices = table.slices(slots, start, tokens)
        self._drafts_seen |= bool(output.scheduled_spec_decode_tokens)
        return slots, slices

    def expect_steady(self, output: Any, slots: SlotArray, slices: RequestSlices) -> None:
        """After the step was charged: open a run if the next step may repeat it."""
        one_each = output.total_num_scheduled_tokens == len(slots) and not output.scheduled_spec_decode_tokens
        if one_each and not self._preempted and int(slices.decode.sum()) == len(slots):
            self.table.open_run(slots)
            self._on_batch = output.num_scheduled_tokens
        else:
            self._on_batch = None

    def _join(self, request_id: str, request: Any, start: int) -> None:
        self._preempted.discard(request_id)
        self.table.join(request_id, start, known_tokens(request), int(request.num_prompt_tokens))
        self._on_join(request_id, request)

    def _correct(
        self, scheduled: Mapping[str, int], rows: list[Any], slots: SlotArray, moved: IntArray
    ) -> None:
        """The scheduler moved some requests back (rejected drafts, preemption) or forward (remote KV)."""
        table = self.table
        rejected = moved > 0 if self._drafts_seen else np.zeros(len(slots), np.bool_)
        for position, request_id in enumerate(scheduled):
            if request_id in self._preempted or (moved[position] and not rejected[position]):
                self._preempted.discard(request_id)
                rejected[position] = False
                start = int(table.computed[slots[position]] - moved[position])
                table.rewind(int(slots[position]), start, known_tokens(rows[position]))
        if rejected.any():
            table.reject(slots[rejected], moved[rejected])
