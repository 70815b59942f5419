"""Ledgers of all running requests as NumPy columns: charging a step costs array operations only.

Steady decode (the same requests, one token each) is not charged step by step. With
``e_i = a + b * context_i`` for every request and contexts that grow by one a step, a run of
such steps needs only sums of a and b (ARCHITECTURE decision 7); :meth:`LedgerTable.settle`
turns the sums into joules per request when the batch changes, :meth:`LedgerTable.read`
when a ledger is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import BatchShape, IntArray, PhaseShape, RequestSlices
from llmco2_vllm.core.estimate import Estimate

SlotArray = NDArray[np.intp]

# Columns of LedgerTable.joules
PREFILL, DECODE, LOWER, UPPER = range(4)
# Columns of LedgerTable.counts
PREFILL_TOKENS, DECODE_TOKENS, CACHED, RECOMPUTED, REJECTED, STEPS = range(6)
_INITIAL_SLOTS = 256
# A replay ends in the token sampled before the preemption, which is decode: no prompt is completed.
_NEVER = np.iinfo(np.int64).max


class LedgerRow(NamedTuple):
    """One request's figures: joules (prefill, decode, lower, upper) and counts, in column order."""

    joules: Sequence[float]
    counts: Sequence[int]
    in_distribution: bool


class SteadyRun:
    """Sums over consecutive decode steps of one unchanged set of requests, one token each."""

    __slots__ = ("context", "fixed", "in_distribution", "lower", "pairs", "per_context", "slots", "steps", "upper")

    def __init__(self, slots: SlotArray, context: IntArray) -> None:
        self.slots = slots
        self.context = context
        self.pairs = int(context.sum())
        self.steps = 0
        self.fixed = self.per_context = 0.0
        self.lower = self.upper = (0.0, 0.0)
        self.in_distribution = True

    def next_shape(self) -> BatchShape:
        """Shape of the next step: every request computes one token on top of its context."""
        n = len(self.slots)
        pairs = self.pairs + n * (self.steps + 1)
        return BatchShape(decode=PhaseShape(n, n, pairs, pairs, n))

    def add(self, estimate: Estimate) -> None:
        """Charge one more step at the rates of ``estimate``."""
        per_token, per_pair, per_sample = estimate.decode
        self.steps += 1
        fixed = per_token + per_sample + per_pair * self.steps
        self.fixed += fixed
        self.per_context += per_pair
        lower, upper = estimate.lower_ratio, estimate.upper_ratio
        self.lower = (self.lower[0] + lower * fixed, self.lower[1] + lower * per_pair)
        self.upper = (self.upper[0] + upper * fixed, self.upper[1] + upper * per_pair)
        if not estimate.in_distribution:
            self.in_distribution = False

    def joules(self, context: IntArray) -> NDArray[np.float64]:
        """(decode, lower, upper) joules of requests that began the run with ``context``, shape (n, 3)."""
        fixed = np.array([self.fixed, self.lower[0], self.upper[0]])
        slope = np.array([self.per_context, self.lower[1], self.upper[1]])
        return fixed + np.multiply.outer(context, slope)


class LedgerTable:
    """A slot per running request. ``computed``: tokens in the KV cache; ``known``: tokens whose
    values are given (see :class:`RequestSlices`); ``high_water``: most tokens ever computed."""

    def __init__(self) -> None:
        self.slot_of: dict[str, int] = {}
        self._free: list[int] = []
        self.joules = np.zeros((0, 4))
        self.counts = np.zeros((0, 6), np.int64)
        self.computed = np.zeros(0, np.int64)
        self.known = np.zeros(0, np.int64)
        self.samples_at = np.zeros(0, np.int64)
        self.high_water = np.zeros(0, np.int64)
        self.in_distribution = np.zeros(0, np.bool_)
        self._in_run = np.zeros(0, np.bool_)
        self.run: SteadyRun | None = None
        self._grow(_INITIAL_SLOTS)

    def __len__(self) -> int:
        return len(self.slot_of)

    def clear(self) -> None:
        """Forget every ledger."""
        self.settle()
        for request_id in list(self.slot_of):
            self.leave(request_id)

    def _grow(self, slots: int) -> None:
        old = len(self.computed)
        for name in ("joules", "counts", "computed", "known", "samples_at", "high_water", "in_distribution", "_in_run"):
            column = getattr(self, name)
            extra = np.zeros((slots - old, *column.shape[1:]), column.dtype)
            setattr(self, name, np.concatenate([column, extra]))
        self._free.extend(range(slots - 1, old - 1, -1))

    def join(self, request_id: str, cached: int, known: int, prompt_tokens: int) -> int:
        """Open a ledger for a request whose first step starts behind ``cached`` tokens; its slot.

        Only call it while no run is open: a run may still hold a slot that was freed.
        """
        if not self._free:
            self._grow(2 * len(self.computed))
        slot = self._free.pop()
        self.slot_of[request_id] = slot
        self.joules[slot] = 0.0
        self.counts[slot] = 0
        self.counts[slot, CACHED] = cached
        self.computed[slot] = cached
        self.known[slot] = known
        self.samples_at[slot] = prompt_tokens if known <= prompt_tokens else _NEVER
        self.high_water[slot] = 0
        self.in_distribution[slot] = True
        return slot

    def leave(self, request_id: str) -> LedgerRow | None:
        """Close a ledger and return its last figures, or None if there was none."""
        slot = self.slot_of.pop(request_id, None)
        if slot is None:
            return None
        row = self.read([slot])[0]
        self._free.append(slot)
        return row

    def rewind(self, slot: int, start: int, known: int) -> None:
        """A preempted request comes back behind ``start`` tokens and replays what it had computed."""
        self.high_water[slot] = max(self.high_water[slot], self.computed[slot])
        self.known[slot] = known
        self.computed[slot] = start
        if known > self.samples_at[slot]:
            self.samples_at[slot] = _NEVER

    def reject(self, slots: SlotArray, drafts: IntArray) -> None:
        """Take back ``drafts`` (n,) rejected draft tokens: computed and paid for, not in the KV cache."""
        self.counts[slots, REJECTED] += drafts
        self.computed[slots] -= drafts

    def slices(self, slots: SlotArray, start: IntArray, tokens: IntArray) -> RequestSlices:
        """Split ``tokens`` (n,) computed from ``start`` (n,) into prefill and decode."""
        prefill = np.clip(self.known[slots] - start, 0, tokens)
        decode = tokens - prefill
        samples = ((start + tokens >= self.samples_at[slots]) & (decode == 0) & (prefill > 0)).astype(np.int64)
        return RequestSlices(start, prefill, decode, samples)

    def charge(self, slots: SlotArray, slices: RequestSlices, estimate: Estimate) -> None:
        """Split ``estimate`` over the requests at ``slots`` (n,), which must be distinct."""
        prefill_rates, decode_rates = estimate.prefill, estimate.decode
        decode = slices.decode * (decode_rates.per_token_joules + decode_rates.per_sample_joules)
        decode += slices.decode_pairs * decode_rates.per_pair_joules
        block = np.zeros((len(slots), 4))
        block[:, DECODE] = decode
        if estimate.prefill_joules:
            prefill = slices.prefill * prefill_rates.per_token_joules
            prefill += slices.prefill_pairs * prefill_rates.per_pair_joules
            prefill += slices.prefill_samples * prefill_rates.per_sample_joules
            block[:, PREFILL] = prefill
            decode = decode + prefill
        block[:, LOWER] = decode * estimate.lower_ratio
        block[:, UPPER] = decode * estimate.upper_ratio
        self.joules[slots] += block
        end = slices.context + slices.prefill + slices.decode
        counts = np.zeros((len(slots), 6), np.int64)
        counts[:, PREFILL_TOKENS] = slices.prefill
        counts[:, DECODE_TOKENS] = slices.decode
        counts[:, RECOMPUTED] = np.maximum(np.minimum(end, self.high_water[slots]) - slices.context, 0)
        counts[:, STEPS] = 1
        self.counts[slots] += counts
        self.computed[slots] = end
        if not estimate.in_distribution:
            self.in_distribution[slots] = False

    def open_run(self, slots: SlotArray) -> None:
        """Begin a steady run of the requests at ``slots``, all of which are decoding."""
        self.run = SteadyRun(slots, self.computed[slots])
        self._in_run[slots] = True

    def settle(self) -> None:
        """Close the open run: charge its sums to its requests."""
        run, self.run = self.run, None
        if run is None:
            return
        self._in_run[run.slots] = False
        if run.steps == 0:
            return
        self.joules[run.slots, DECODE:] += run.joules(run.context)
        self.counts[run.slots, DECODE_TOKENS] += run.steps
        self.counts[run.slots, STEPS] += run.steps
        self.computed[run.slots] += run.steps
        if not run.in_distribution:
            self.in_distribution[run.slots] = False

    def read(self, slots: Sequence[int]) -> list[LedgerRow]:
        """Figures of the requests at ``slots`` as of now, an open run included."""
        index = np.array(slots, np.intp)
        joules, counts = self.joules[index], self.counts[index]
        in_distribution = self.in_distribution[index].tolist()
        run = self.run
        if run is not None and run.steps:
            inside = self._in_run[index]  # waiting and preempted requests are outside
            joules[inside, DECODE:] += run.joules(self.computed[index[inside]])
            counts[inside, DECODE_TOKENS] += run.steps
            counts[inside, STEPS] += run.steps
            if not run.in_distribution:
                in_distribution = [flag and not hit for flag, hit in zip(in_distribution, inside, strict=True)]
        return [
            LedgerRow(j, c, bool(d))
            for j, c, d in zip(joules.tolist(), counts.tolist(), in_distribution, strict=True)
        ]
