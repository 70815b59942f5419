"""Ledgers of all running requests: a step costs as much as what changed in it.

A request in steady decode (one token a step) is not charged step by step. Its share of step s is
``a(s) + b(s) * context``, and its context grows by one a step, so it is enough to keep running
sums of a + b * s and b for the whole engine and to note where each request entered them
(ARCHITECTURE decision 7, docs/adr/0001). All other requests of a step, those in prefill or with
drafts, are charged one by one. Plain Python numbers: at a few changes per step, the first call of
an array operation costs more than the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Estimate
from llmco2_vllm.core.settlement import Account, Concluded, Journal, decode_terms

# The sums are begun anew after so many steps, or differences of large sums would lose digits.
REBASE_STEPS = 1 << 16
_NEVER = 1 << 62


class DecodeSums(NamedTuple):
    """Running sums over decode steps at one moment; fixed, slope = sums of a + b * step and of b.

    outside_at: the last step whose estimate was out of distribution, -1 before there was one.
    """

    steps: int = 0
    fixed: float = 0.0
    slope: float = 0.0
    lower_fixed: float = 0.0
    lower_slope: float = 0.0
    upper_fixed: float = 0.0
    upper_slope: float = 0.0
    outside_at: int = -1

    def since(self, begin: DecodeSums, offset: int) -> tuple[float, float, float]:
        """(joules, lower, upper) of a request since ``begin``; its context is ``offset`` ahead of the steps."""
        _, fixed, slope, lower_fixed, lower_slope, upper_fixed, upper_slope, _ = self
        _, fixed_then, slope_then, lower_fixed_then, lower_slope_then, upper_fixed_then, upper_slope_then, _ = begin
        return (
            fixed - fixed_then + offset * (slope - slope_then),
            lower_fixed - lower_fixed_then + offset * (lower_slope - lower_slope_then),
            upper_fixed - upper_fixed_then + offset * (upper_slope - upper_slope_then),
        )


class RequestCharge:
    """What one running request has been charged. Joules are predicted.

    computed: tokens in the KV cache. known: tokens whose values are given, hence prefill.
    samples_at: tokens after which a prefill step samples. high_water: most tokens ever computed
    before a preemption. entered, offset: where it entered the running sums, and its context minus
    their steps then; entered is None outside steady decode. account: the same as metered, None without a meter.
    """

    __slots__ = (
        "account",
        "cached_tokens",
        "computed",
        "decode_joules",
        "decode_tokens",
        "entered",
        "high_water",
        "in_distribution",
        "known",
        "lower_joules",
        "offset",
        "prefill_joules",
        "prefill_tokens",
        "recomputed_joules",
        "recomputed_tokens",
        "rejected_draft_tokens",
        "samples_at",
        "steps",
        "upper_joules",
    )

    def __init__(self, cached: int, known: int, prompt_tokens: int) -> None:
        self.prefill_joules = self.decode_joules = self.lower_joules = self.upper_joules = 0.0
        self.recomputed_joules = 0.0
        self.account: Account | None = None
        self.prefill_tokens = self.decode_tokens = self.steps = 0
        self.recomputed_tokens = self.rejected_draft_tokens = self.high_water = 0
        self.cached_tokens = self.computed = cached
        self.in_distribution = True
        self.known = known
        # A replay ends in the token sampled before the preemption, which is decode: it completes no prompt.
        self.samples_at = prompt_tokens if known <= prompt_tokens else _NEVER
        self.entered: DecodeSums | None = None
        self.offset = 0

    @property
    def energy_joules(self) -> float:
        """Both phases."""
        return self.prefill_joules + self.decode_joules

    def rewind(self, start: int, known: int) -> None:
        """A preempted request comes back behind ``start`` tokens and replays what it had computed."""
        self.high_water = max(self.high_water, self.computed)
        self.computed, self.known = start, known
        if known > self.samples_at:
            self.samples_at = _NEVER

    def reject(self, drafts: int) -> None:
        """Take back rejected draft tokens: computed and paid for, but not in the KV cache."""
        self.rejected_draft_tokens += drafts
        self.computed -= drafts

    def slice(self, tokens: int) -> RequestSlice:
        """Split the next ``tokens`` of this request into prefill and decode."""
        computed = self.computed
        prefill = self.known - computed
        prefill = 0 if prefill < 0 else prefill if prefill < tokens else tokens
        samples = prefill == tokens and computed + tokens >= self.samples_at
        decode, context = tokens - prefill, computed + prefill
        prefill_pairs = prefill * computed + prefill * (prefill + 1) // 2
        decode_pairs = decode * context + decode * (decode + 1) // 2
        return RequestSlice(self, prefill, decode, int(samples), prefill_pairs, decode_pairs)


class RequestSlice(NamedTuple):
    """One request's part of a step that is not steady decode: tokens, of which those of decode follow those of prefill.

    prefill_samples: 1 if it completes the prompt. prefill_pairs, decode_pairs: (query, key) pairs of the tokens.
    """

    charge: RequestCharge
    prefill: int
    decode: int
    prefill_samples: int
    prefill_pairs: int
    decode_pairs: int

    def pay(self, estimate: Estimate) -> tuple[float, float, float]:
        """Charge this part of a step at the rates of its estimate, and advance the request.

        Returns joules: prefill, decode, and what part of the prefill was computed again.
        """
        charge = self.charge
        joules = prefill_joules = recomputed_joules = decode_joules = 0.0
        if self.prefill:
            per_token, per_pair, per_sample = estimate.prefill
            joules = self.prefill * per_token + self.prefill_pairs * per_pair + self.prefill_samples * per_sample
            prefill_joules = joules
            charge.prefill_joules += joules
            charge.prefill_tokens += self.prefill
        if self.decode:
            per_token, per_pair, per_sample = estimate.decode
            decode_joules = self.decode * (per_token + per_sample) + self.decode_pairs * per_pair
            charge.decode_joules += decode_joules
            charge.decode_tokens += self.decode
            joules += decode_joules
        charge.lower_joules += joules * estimate.lower_ratio
        charge.upper_joules += joules * estimate.upper_ratio
        end = charge.computed + self.prefill + self.decode
        if charge.high_water > charge.computed:
            again = min(end, charge.high_water) - charge.computed
            charge.recomputed_tokens += again
            recomputed_joules = prefill_joules * min(1.0, again / (self.prefill or again))
            charge.recomputed_joules += recomputed_joules
        charge.computed = end
        charge.steps += 1
        charge.in_distribution = charge.in_distribution and estimate.in_distribution
        return prefill_joules, decode_joules, recomputed_joules


class LedgerBook:
    """All open ledgers. ``decoding`` are those in steady decode, charged through the running sums.

    journal: where the moments are found at which metered accounts turn, None without a meter.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self.open: dict[str, RequestCharge] = {}
        self.decoding: dict[str, RequestCharge] = {}
        self._context = 0  # total over the decoding requests
        self._now = DecodeSums()

    @property
    def sums(self) -> DecodeSums:
        """The running sums, after the last step that was charged."""
        return self._now

    def join(self, request_id: str, cached: int, known: int, prompt_tokens: int) -> RequestCharge:
        """Open a ledger for a request whose first step starts behind ``cached`` tokens."""
        charge = self.open[request_id] = RequestCharge(cached, known, prompt_tokens)
        if self._journal is not None:
            charge.account = Account()
        return charge

    def leave(self, request_id: str) -> RequestCharge | None:
        """Close a ledger and return it with its last figures, or None if there was none."""
        charge = self.open.pop(request_id, None)
        if charge is not None:
            if self._journal is not None and charge.account is not None:
                charge.account.leave(self._journal.mark())
            if self.decoding.pop(request_id, None) is not None:
                self._stop(charge)
        return charge

    def reject(self, charge: RequestCharge, drafts: int) -> None:
        """Take back rejected draft tokens of a request."""
        charge.reject(drafts)
        if self._journal is not None and charge.account is not None and (lost := charge.account.reject(drafts)):
            self._journal.open.append(lost)

    def conclude(self, charge: RequestCharge, reported_ratio: float) -> None:
        """This share of a closed ledger's energy was reported to its client, and not just all of it."""
        if self._journal is not None and charge.account is not None:
            self._journal.open.append(Concluded(charge.account, reported_ratio))

    def enter(self, request_id: str) -> None:
        """From its next step on the request decodes one token a step."""
        charge = self.open[request_id]
        charge.entered = self._now
        charge.offset = charge.computed - self._now.steps
        self.decoding[request_id] = charge
        self._context += charge.computed
        if self._journal is not None and charge.account is not None:
            charge.account.enter(self._journal.mark(), charge.computed)

    def interrupt(self, request_id: str) -> None:
        """The request is not in steady decode any more: settle what it owes."""
        charge = self.decoding.pop(request_id, None)
        if charge is not None:
            if self._journal is not None and charge.account is not None:
                charge.account.interrupt(self._journal.mark())
            self._stop(charge)

    def _stop(self, charge: RequestCharge) -> None:
        self.settle(charge)
        charge.entered = None
        self._context -= charge.computed
        if self._journal is not None and not self.decoding:
            self._journal.begin_anew()

    def settle(self, charge: RequestCharge) -> None:
        """Bring a decoding request's figures up to date; others are so already."""
        begin, now = charge.entered, self._now
        if begin is None or begin is now:
            return
        steps = now.steps - begin.steps
        joules, lower, upper = now.since(begin, charge.offset)
        charge.decode_joules += joules
        charge.lower_joules += lower
        charge.upper_joules += upper
        charge.decode_tokens += steps
        charge.steps += steps
        charge.computed += steps
        charge.in_distribution = charge.in_distribution and now.outside_at <= begin.steps
        charge.entered = now

    def shape(self, slices: list[RequestSlice], encoder_tokens: int = 0) -> BatchShape:
        """Totals of a step: one token for every decoding request, and ``slices``."""
        count = len(self.decoding)
        pairs = self._context + count
        decode = PhaseShape(count, count, pairs, pairs, count)
        if not slices:
            return BatchShape(EMPTY_PHASE, decode, encoder_tokens)
        sequences = tokens = prefill_pairs = kv_tokens = samples = 0
        more_sequences = more_tokens = more_pairs = more_kv_tokens = 0
        for item in slices:
            charge, n_prefill, n_decode, sampled, n_prefill_pairs, n_decode_pairs = item
            if n_prefill:
                sequences += 1
                tokens += n_prefill
                prefill_pairs += n_prefill_pairs
                kv_tokens += charge.computed + n_prefill
                samples += sampled
            if n_decode:
                more_sequences += 1
                more_tokens += n_decode
                more_pairs += n_decode_pairs
                more_kv_tokens += charge.computed + n_prefill + n_decode
        decode = PhaseShape(
            count + more_sequences, count + more_tokens, pairs + more_pairs, pairs + more_kv_tokens, count + more_tokens
        )
        return BatchShape(PhaseShape(sequences, tokens, prefill_pairs, kv_tokens, samples), decode, encoder_tokens)

    def advance(self, estimate: Estimate, steps: int = 1) -> None:
        """Charge ``steps`` steps of one token to every decoding request at the rates of ``estimate``."""
        if not self.decoding:
            return
        now = self._now
        fixed, slope = decode_terms(estimate, now.steps, steps)
        lower, upper = estimate.lower_ratio, estimate.upper_ratio
        self._now = DecodeSums(
            now.steps + steps,
            now.fixed + fixed,
            now.slope + slope,
            now.lower_fixed + lower * fixed,
            now.lower_slope + lower * slope,
            now.upper_fixed + upper * fixed,
            now.upper_slope + upper * slope,
            now.outside_at if estimate.in_distribution else now.steps + steps,
        )
        self._context += steps * len(self.decoding)
        if self._now.steps >= REBASE_STEPS:
            self._rebase()

    def _rebase(self) -> None:
        decoding = list(self.decoding)
        for request_id in decoding:
            self.interrupt(request_id)
        self._now = DecodeSums()
        for request_id in decoding:
            self.enter(request_id)
