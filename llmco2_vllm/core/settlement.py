"""The measured side of the ledgers: what was charged at predicted rates, charged again at measured ones.

The scheduler decides and charges at once; a meter answers a tick or two later. So a request keeps what it was charged
with the marks of the steps, and its figures are found when somebody asks for them: of steady decode by the difference
of running sums between two marks, as in ``ledgers.py``, of all else by the ratio of the step. Nothing is done for
single requests as their steps are settled (docs/adr/0019).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from llmco2_vllm.core.estimate import Estimate
from llmco2_vllm.core.steps import Mark, Step

# A request's oldest parts are added up as soon as so many of them are settled, or somebody asks for its figures.
PARTS_AT_ONCE = 16


class Rejected(NamedTuple):
    """Drafts were rejected that a step had computed; predicted joules."""

    mark: Mark
    joules: float


class Concluded(NamedTuple):
    """A request is gone of whose energy this share was told to its client: 0 of an aborted one, above 1 if too much."""

    account: Account
    reported_ratio: float


class Journal:
    """What the scheduler decided and no meter has answered yet, in its order: steps, and what else totals are made of.

    A mark among them: the running sums begin anew there, no request is in steady decode.
    """

    def __init__(self) -> None:
        self.open: deque[Step | Mark | Rejected | Concluded] = deque()
        self._newest: Step | Mark
        self.begin_anew()

    def opened(self, step: Step) -> None:
        """A step was scheduled."""
        self.open.append(step)
        self._newest = step

    def begin_anew(self) -> None:
        """Nobody is in steady decode: sums over many steps would lose the digits of those over a few."""
        mark = Mark()
        self.open.append(mark)
        self._newest = mark

    def mark(self) -> Mark:
        """The moment behind the newest step."""
        newest = self._newest
        if isinstance(newest, Mark):
            return newest
        if newest.mark is None:
            newest.mark = Mark()
        return newest.mark

    def is_at(self, step: Step) -> bool:
        """Whether nothing has happened since this step was scheduled: nobody joined, nobody left."""
        return step.mark is None and bool(self.open) and self.open[-1] is step

    def settles(self, step: Step) -> None:
        """Whoever comes behind the newest step finds its mark although the step is settled."""
        if step is self._newest:
            self.mark()


def decode_terms(estimate: Estimate, steps: int, count: int = 1) -> tuple[float, float]:
    """What ``count`` steps behind ``steps`` others add to the running sums of a + b * step and of b, joules."""
    per_token, per_pair, per_sample = estimate.decode
    # The context of a request before step s is offset + s; its token sees one more.
    ramp = count * steps + count * (count + 1) // 2
    return count * (per_token + per_sample) + per_pair * ramp, count * per_pair


class _Running:
    """Running sums over settled steps, of all quantities of a mark."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums = (0.0,) * 8

    def mark(self, mark: Mark) -> None:
        """This is the moment of a mark."""
        mark.steps, mark.sums = self._steps, self._sums

    def add(self, step: Step, ratios: tuple[float, float, float]) -> None:
        """One more step, paid by the requests in steady decode at its predicted rates times these ratios."""
        value, estimated, half_width = ratios
        fixed, slope = decode_terms(step.estimate, self._steps, step.executions)
        a, b, c, d, e, f, g, h = self._sums
        self._sums = (
            a + value * fixed,
            b + value * slope,
            c + estimated * fixed,
            d + estimated * slope,
            e + half_width * fixed,
            f + half_width * slope,
            g + fixed,
            h + slope,
        )
        self._steps += step.executions


class Settled(NamedTuple):
    """What the settled steps of a request came to, joules.

    prefill_joules, decode_joules: measured, and predicted times the recent ratio where no window was; estimated_joules
    is that part of both, recomputed_joules and rejected_draft_joules are others. half_width_joules: of the 90 %
    interval of their sum. predicted_*: of the same steps.
    """

    prefill_joules: float
    decode_joules: float
    half_width_joules: float
    predicted_prefill_joules: float
    predicted_decode_joules: float
    recomputed_joules: float
    rejected_draft_joules: float
    estimated_joules: float

    @property
    def energy_joules(self) -> float:
        """Both phases."""
        return self.prefill_joules + self.decode_joules

    @property
    def measured_joules(self) -> float:
        """What windows said of both phases."""
        return self.energy_joules - self.estimated_joules


# What a request was charged by itself in the step of a mark: joules of prefill and of decode, and the parts of it that
# had been computed before a preemption and that rejected drafts took.
_Part = tuple[Mark, float, float, float, float]
# Steady decode between two marks, with so many tokens in the KV cache at the first.
_Run = tuple[Mark, Mark, int]


class Account:
    """What one request was charged, until meters have answered: its own parts of steps, and its runs of steady decode.

    Few words in one place: it is looked at when the caches have long forgotten it.
    """

    __slots__ = ("_context", "_drafted", "_entered", "_left", "_parts", "_runs", "_sums")

    def __init__(self) -> None:
        self._parts: list[_Part] = []  # in the order of steps
        self._runs: tuple[_Run, ...] = ()
        self._entered: Mark | None = None
        self._left: Mark | None = None
        self._context = 0
        self._drafted: tuple[Mark, float] | None = None  # joules per token of its last step in decode
        self._sums: list[float] | None = None  # of parts and runs that are added up, as in Settled

    def pay(self, mark: Mark, joules: tuple[float, float, float], decode_tokens: int) -> None:
        """It was charged by itself in a step; predicted joules of prefill, decode, and prefill computed again."""
        prefill, decode, recomputed = joules
        parts = self._parts
        parts.append((mark, prefill, decode, recomputed, 0.0))
        if recomputed:
            mark.recomputed_joules += recomputed
        # Behind a step without decode no drafts were rejected: what is taken back there was prefill.
        self._drafted = (mark, decode / decode_tokens) if decode_tokens else None
        if len(parts) > PARTS_AT_ONCE and parts[PARTS_AT_ONCE - 1][0].sums is not None:
            self._add_up()

    def enter(self, mark: Mark, context: int) -> None:
        """It is in steady decode from now on, with so many tokens in its KV cache."""
        self._entered, self._context = mark, context

    def interrupt(self, mark: Mark) -> None:
        """It is not any more."""
        if self._entered is not None:
            self._runs = (*self._runs, (self._entered, mark, self._context))
            self._entered = None
            self._add_up()

    def leave(self, mark: Mark) -> None:
        """It is gone; nothing will be added."""
        self._left = mark
        self.interrupt(mark)

    def reject(self, drafts: int) -> Rejected | None:
        """What of its last step went into rejected drafts."""
        if self._drafted is None:
            return None
        mark, per_token = self._drafted
        joules = per_token * drafts
        self._parts.append((mark, 0.0, 0.0, 0.0, joules))
        return Rejected(mark, joules)

    @property
    def begun(self) -> bool:
        """Whether a step of it is settled."""
        return self._sums is not None or (bool(self._parts) and self._parts[0][0].sums is not None)

    @property
    def final(self) -> bool:
        """Whether all steps there will be are settled."""
        return self._left is not None and self._left.sums is not None

    def settled(self, now: Mark) -> Settled:
        """Its figures. now: the moment behind the last settled step of all, for one that is still in steady decode."""
        self._add_up()
        sums = self._sums[:] if self._sums else [0.0] * 8
        for entered, _, context in self._runs:
            if entered.sums is not None:
                _add_run(sums, entered, now, context)
        if self._entered is not None and self._entered.sums is not None:
            _add_run(sums, self._entered, now, self._context)
        return Settled._make(sums)

    def _add_up(self) -> None:
        """What is settled, for good: its marks are let go."""
        parts, runs, sums = self._parts, self._runs, self._sums or [0.0] * 8
        if parts and parts[0][0].sums is not None:
            count = 0
            for part in parts:
                if part[0].sums is None:
                    break
                _add_part(sums, part)
                count += 1
            del parts[:count]
            self._sums = sums
        while runs and runs[0][1].sums is not None:
            _add_run(sums, *runs[0])
            self._runs = runs = runs[1:]
            self._sums = sums


def _add_part(sums: list[float], part: _Part) -> None:
    mark, prefill, decode, recomputed, rejected = part
    assert mark.sums is not None
    value, estimated, half_width = mark.ratios
    both = prefill + decode
    sums[0] += value * prefill
    sums[1] += value * decode
    sums[2] += half_width * both
    sums[3] += prefill
    sums[4] += decode
    sums[5] += value * recomputed
    sums[6] += value * rejected
    sums[7] += estimated * both


def _add_run(sums: list[float], entered: Mark, left: Mark, context: int) -> None:
    assert entered.sums is not None and left.sums is not None
    offset = context - entered.steps  # it is so much ahead of the steps
    value, value_slope, estimated, estimated_slope, width, width_slope, predicted, predicted_slope = left.sums
    a, b, c, d, e, f, g, h = entered.sums
    sums[1] += value - a + offset * (value_slope - b)
    sums[7] += estimated - c + offset * (estimated_slope - d)
    sums[2] += width - e + offset * (width_slope - f)
    sums[4] += predicted - g + offset * (predicted_slope - h)


class Settlement:
    """Goes through the journal as far as steps are settled. Totals are joules of all requests.

    measured + estimated of both phases = what all accounts came to; aborted, recomputed and rejected drafts are parts.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._running = _Running()
        self._now: Mark | None = None
        self.prefill_joules = self.decode_joules = self.estimated_joules = 0.0
        self.aborted_joules = self.recomputed_joules = self.rejected_draft_joules = 0.0

    @property
    def now(self) -> Mark:
        """The moment behind the last settled step."""
        if self._now is None:
            self._now = Mark()
            self._running.mark(self._now)
        return self._now

    def advance(self, settled: Iterable[Step], recent_ratio: float) -> None:
        """Charge the ``settled`` steps, which are the next ones of the journal, and what stands between them."""
        for step in settled:
            self._others()
            if self._journal.open.popleft() is not step:
                raise RuntimeError("steps were settled out of order")
            self._charge(step, recent_ratio)
        self._others()

    def _others(self) -> None:
        journal = self._journal.open
        while journal and not isinstance(item := journal[0], Step):
            journal.popleft()
            if isinstance(item, Mark):
                self._running, self._now = _Running(), None
                self._running.mark(item)
            elif isinstance(item, Rejected):
                self.rejected_draft_joules += item.mark.ratios[0] * item.joules
            else:
                self.aborted_joules += item.account.settled(self.now).energy_joules * (1.0 - item.reported_ratio)

    def _charge(self, step: Step, recent_ratio: float) -> None:
        measured, half_width = step.measured_ratio, step.half_width_ratio
        estimated = (1.0 - step.covered_ratio) * recent_ratio
        if estimated:
            half_width += estimated * max(1.0 - step.estimate.lower_ratio, step.estimate.upper_ratio - 1.0)
            self.estimated_joules += estimated * step.predicted_joules
        value = measured + estimated
        ratios = value, estimated, half_width
        self._running.add(step, ratios)
        self._now = None
        self._journal.settles(step)
        if (mark := step.mark) is not None:
            mark.ratios = ratios
            self._running.mark(mark)
            self.recomputed_joules += value * mark.recomputed_joules
        self.prefill_joules += measured * step.prefill_joules
        self.decode_joules += measured * (step.predicted_joules - step.prefill_joules)
