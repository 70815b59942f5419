"""The measured side of the ledgers: what was charged at predicted rates, charged again at measured ones.

The scheduler decides and charges at once; a meter answers a tick or two later. So every turn of a ledger is noted
in a journal, in its order, and gone through once more when the steps before it are settled: a request in steady
decode by the difference of running sums, as in ``ledgers.py``, all others step by step.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from llmco2_vllm.core.steps import Step

Quantities = tuple[float, float, float, float]
_NOTHING = array("d", (0.0, 0.0, 0.0, 0.0))


class Turn(IntEnum):
    """What happens to a ledger between steps."""

    ENTER = 0  # steady decode; value: tokens in its KV cache
    INTERRUPT = 1
    REJECT = 2  # value: draft tokens of its last step that were rejected
    LEAVE = 3  # from steady decode or not
    CONCLUDE = 4  # value: share of its energy that was reported to a client, 0 for an aborted request; not noted for 1


# A member by way of its class takes longer than all else in noting a turn.
ENTER, INTERRUPT, REJECT, LEAVE, CONCLUDE = Turn

Journal = deque["Step | tuple[Turn, Account, float]"]


class Paid(NamedTuple):
    """What one request was charged in one step outside steady decode, predicted joules.

    recomputed_joules: part of the prefill that had been computed before a preemption.
    """

    account: Account
    prefill_joules: float
    decode_joules: float
    decode_tokens: int
    recomputed_joules: float


class Sums(NamedTuple):
    """Running sums over settled steps at one moment.

    joules: by quantity (measured, estimated, half width, predicted) the sums of a, b and b * step, as in
    ``DecodeSums``. covered: steps, each by the share of it that windows covered.
    """

    steps: int
    covered: float
    joules: array[float]

    def add_since(self, begin: Sums, offset: int, to: array[float]) -> None:
        """Add the quantities of a request since ``begin``; its context is ``offset`` ahead of the steps."""
        x, y = self.joules, begin.joules
        to[0] += x[0] - y[0] + offset * (x[1] - y[1]) + x[2] - y[2]
        to[1] += x[3] - y[3] + offset * (x[4] - y[4]) + x[5] - y[5]
        to[2] += x[6] - y[6] + offset * (x[7] - y[7]) + x[8] - y[8]
        to[3] += x[9] - y[9] + offset * (x[10] - y[10]) + x[11] - y[11]


class _Running:
    """The sums as they grow; plain additions in place, because they are behind every scheduler step."""

    def __init__(self) -> None:
        self.steps = 0
        self.covered = 0.0
        self._joules = array("d", [0.0] * 12)
        self._moment: Sums | None = None

    @property
    def now(self) -> Sums:
        """The sums at this moment; the same object until a step is added."""
        if self._moment is None:
            self._moment = Sums(self.steps, self.covered, self._joules[:])
        return self._moment

    def add(self, step: Step, ratios: Quantities) -> None:
        """One more step, paid by the requests in steady decode at its predicted rates times ``ratios``."""
        per_token, per_pair, per_sample = step.estimate.decode
        count, joules = step.executions, self._joules
        fixed, slope = count * (per_token + per_sample), count * per_pair
        # As in LedgerBook.advance.
        ramp = per_pair * (count * self.steps + count * (count + 1) // 2)
        place = 0
        for ratio in ratios:
            if ratio:
                joules[place] += ratio * fixed
                joules[place + 1] += ratio * slope
                joules[place + 2] += ratio * ramp
            place += 3
        self.steps += count
        self.covered += count * step.covered_ratio
        self._moment = None


class Account:
    """What the settled steps of one request came to.

    prefill, decode: joules by quantity: measured, estimated (no window covered them: predicted, at the recent ratio),
    half width of the 90 % interval, predicted. covered_steps of ``steps``. recomputed_joules and
    rejected_draft_joules are parts of the first two. final: nothing will be added.
    """

    __slots__ = (
        "_last_decode",
        "covered_steps",
        "decode",
        "entered",
        "final",
        "offset",
        "prefill",
        "recomputed_joules",
        "rejected_draft_joules",
        "steps",
    )

    def __init__(self) -> None:
        # Arrays lie in one place: an account is looked at when the caches have long forgotten it.
        self.prefill, self.decode = _NOTHING[:], _NOTHING[:]
        self.steps = 0
        self.covered_steps = self.recomputed_joules = self.rejected_draft_joules = 0.0
        self.entered: Sums | None = None
        self.offset = 0
        self.final = False
        self._last_decode = (0.0, 1)

    @property
    def measured_joules(self) -> float:
        """What windows said, both phases."""
        return self.prefill[0] + self.decode[0]

    @property
    def value_joules(self) -> float:
        """Measured and estimated, both phases."""
        return self.measured_joules + self.prefill[1] + self.decode[1]

    def settle(self, now: Sums) -> None:
        """Bring an account in steady decode up to date."""
        begin = self.entered
        if begin is None or begin is now:
            return
        now.add_since(begin, self.offset, self.decode)
        self.steps += now.steps - begin.steps
        self.covered_steps += now.covered - begin.covered
        self.entered = now

    def pay(self, paid: Paid, step: Step, ratios: Quantities) -> None:
        """Charge one step again, at ``ratios`` per predicted joule."""
        # Only what is there: eight requests join a busy engine's step.
        _, prefill_joules, decode_joules, decode_tokens, recomputed_joules = paid
        used = ratios[0] + ratios[1]
        if prefill_joules:
            _add(prefill_joules, ratios, self.prefill)
        if decode_tokens:
            _add(decode_joules, ratios, self.decode)
            self._last_decode = (used * decode_joules, decode_tokens)
        if recomputed_joules:
            self.recomputed_joules += used * recomputed_joules
        self.steps += 1
        self.covered_steps += step.covered_ratio

    def reject(self, drafts: int) -> float:
        """Part of the last step's energy that went into rejected drafts."""
        joules, tokens = self._last_decode
        wasted = joules * drafts / tokens
        self.rejected_draft_joules += wasted
        return wasted


def _add(predicted_joules: float, ratios: Quantities, to: array[float]) -> None:
    measured, estimated, half_width, predicted = ratios
    to[0] += measured * predicted_joules
    to[1] += estimated * predicted_joules
    to[2] += half_width * predicted_joules
    to[3] += predicted * predicted_joules


class Settlement:
    """Goes through the journal as far as steps are settled. Totals are joules of all requests.

    measured + estimated of both phases = what all accounts came to; aborted, recomputed and rejected drafts are parts.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._running = _Running()
        self._decoding = 0
        self.prefill_joules = self.decode_joules = self.estimated_joules = 0.0
        self.aborted_joules = self.recomputed_joules = self.rejected_draft_joules = 0.0

    @property
    def now(self) -> Sums:
        """The running sums after the last settled step."""
        return self._running.now

    def advance(self, settled: Iterable[Step], recent_ratio: float) -> None:
        """Charge the ``settled`` steps, which are the next ones of the journal, and take the turns between them."""
        for step in settled:
            self._turns()
            if self._journal.popleft() is not step:
                raise RuntimeError("steps were settled out of order")
            self._charge(step, recent_ratio)
        self._turns()

    def _turns(self) -> None:
        journal = self._journal
        while journal and not isinstance(item := journal[0], Step):
            journal.popleft()
            self._take(*item)

    def _take(self, turn: Turn, account: Account, value: float) -> None:
        if turn is ENTER:
            account.entered = now = self.now
            account.offset = int(value) - now.steps
            self._decoding += 1
        elif turn is LEAVE or turn is INTERRUPT:
            if account.entered is not None:
                self._interrupt(account)
            account.final = turn is LEAVE
        elif turn is REJECT:
            self.rejected_draft_joules += account.reject(int(value))
        else:
            self.aborted_joules += account.value_joules * (1.0 - value)

    def _interrupt(self, account: Account) -> None:
        account.settle(self.now)
        account.entered = None
        self._decoding -= 1
        if not self._decoding:
            self._running = _Running()  # differences of large sums would lose digits

    def _charge(self, step: Step, recent_ratio: float) -> None:
        estimated = (1.0 - step.covered_ratio) * recent_ratio
        widest = max(1.0 - step.estimate.lower_ratio, step.estimate.upper_ratio - 1.0)
        half_width = step.half_width_ratio + estimated * widest
        ratios = (step.measured_ratio, estimated, half_width, 1.0)
        if self._decoding:
            self._running.add(step, ratios)
        for paid in step.paid:
            assert isinstance(paid, Paid)
            paid.account.pay(paid, step, ratios)
            if paid.recomputed_joules:
                self.recomputed_joules += (ratios[0] + estimated) * paid.recomputed_joules
        self.prefill_joules += step.measured_ratio * step.prefill_joules
        self.decode_joules += step.measured_ratio * (step.predicted_joules - step.prefill_joules)
        self.estimated_joules += estimated * step.predicted_joules
