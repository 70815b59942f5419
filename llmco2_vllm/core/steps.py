"""Executed steps: what each was predicted to take, when it ran, and what meters said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate


class Step:
    """One step of the schedule, open until its output is back; then what the meters said of it.

    predicted_joules: of all devices, at the rates of ``estimate``, which in steady decode may be that of an earlier
    step (docs/adr/0002), ``later`` steps ago. paid: what single requests were charged in it, for settlement.
    measured_ratio: measured joules per predicted joule, over the part of the step that windows cover.
    half_width_ratio: of the 90 % interval of the same. covered_ratio: 0 to 1.
    pace_ratio: its duration over the predicted one, against the recent past.
    """

    __slots__ = (
        "_later",
        "_shape",
        "begin_seconds",
        "covered_ratio",
        "end_seconds",
        "estimate",
        "half_width_ratio",
        "lost",
        "measured_ratio",
        "pace_ratio",
        "paid",
        "predicted_joules",
        "prefill_joules",
        "scheduled_seconds",
    )

    def __init__(self, scheduled_seconds: float, estimate: Estimate, shape: BatchShape, later: int = 0) -> None:
        self.scheduled_seconds = self.begin_seconds = scheduled_seconds
        self.end_seconds = math.inf
        self.estimate = estimate
        self._shape, self._later = shape, later
        self.prefill_joules = estimate.prefill.joules(shape.prefill)
        per_pair = estimate.decode.per_pair_joules
        decode_joules = estimate.decode.joules(shape.decode) + later * shape.decode.tokens * per_pair
        self.predicted_joules = self.prefill_joules + decode_joules
        self.paid: Sequence[object] = ()
        self.measured_ratio = self.half_width_ratio = self.covered_ratio = 0.0
        self.pace_ratio = 1.0
        self.lost = False

    def lose(self, now_seconds: float) -> None:
        """No output came: when it ran, if it did, is not known, so no window pays for it."""
        self.begin_seconds = self.end_seconds = now_seconds
        self.lost = True

    @property
    def shape(self) -> BatchShape:
        """What the step computes: in steady decode that of a step before, with one token of context more for each."""
        prefill, decode, encoder_tokens = self._shape
        more = self._later * decode.tokens
        longer = decode._replace(pairs=decode.pairs + more, kv_tokens=decode.kv_tokens + more)
        return BatchShape(prefill, longer, encoder_tokens)

    def share_in(self, begin_seconds: float, end_seconds: float) -> float:
        """Share of the step's time in ``[begin, end)``; a step without length lies where it begins."""
        length = self.end_seconds - self.begin_seconds
        if length <= 0.0:
            return float(begin_seconds <= self.begin_seconds < end_seconds)
        overlap = min(self.end_seconds, end_seconds) - max(self.begin_seconds, begin_seconds)
        return max(0.0, overlap) / length


class StepShare(NamedTuple):
    """A step, and the share of it that lies in a window."""

    step: Step
    share: float
