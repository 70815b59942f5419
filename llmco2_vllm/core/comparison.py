"""Prediction against measurement, over windows long enough to report (METERING section 3: 5 s or more)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from llmco2_vllm.core.attribution import WindowAccount

REPORT_SECONDS = 5.0
# Reports that a front end may still ask for.
REPORTS_KEPT = 256
# Share of the predicted energy of a window that one phase must have for the window to bear its name.
NEARLY_ALL = 0.9
# Joules of the past count ever less: half after about this much busy time.
BIAS_HALF_LIFE_SECONDS = 600.0


class PhaseMix(StrEnum):
    """What the work of a window was, by predicted energy."""

    PREFILL = "prefill"
    MIXED = "mixed"
    DECODE = "decode"

    @classmethod
    def of(cls, prefill_ratio: float) -> PhaseMix:
        """The mix with this share of prefill."""
        if prefill_ratio >= NEARLY_ALL:
            return cls.PREFILL
        return cls.DECODE if prefill_ratio <= 1.0 - NEARLY_ALL else cls.MIXED


class Report(NamedTuple):
    """One reporting window of all devices. error_ratio: predicted / measured dynamic energy - 1."""

    number: int
    mix: PhaseMix
    predicted_joules: float
    measured_joules: float
    duration_seconds: float

    @property
    def error_ratio(self) -> float:
        """Relative error of the prediction, positive when it was too high."""
        return self.predicted_joules / self.measured_joules - 1.0


@dataclass(slots=True)
class Bias:
    """Predicted and measured joules of one phase mix, the past forgotten by half every ``BIAS_HALF_LIFE_SECONDS``."""

    predicted_joules: float = 0.0
    measured_joules: float = 0.0
    windows: int = 0

    @property
    def ratio(self) -> float | None:
        """predicted / measured - 1; None while nothing was measured."""
        return self.predicted_joules / self.measured_joules - 1.0 if self.measured_joules > 0.0 else None


@dataclass(slots=True)
class Comparison:
    """Joins the accounts of windows to reports. Only windows that are trusted count."""

    reports: deque[Report] = field(default_factory=lambda: deque(maxlen=REPORTS_KEPT))
    bias: dict[PhaseMix, Bias] = field(default_factory=lambda: {mix: Bias() for mix in PhaseMix})
    _number: int = 0
    # Seconds of the counted windows, by device: they need not follow each other.
    _seconds: dict[int, float] = field(default_factory=dict)
    _predicted: float = 0.0
    _prefill: float = 0.0
    _measured: float = 0.0
    _busy: float = 0.0

    def add(self, account: WindowAccount) -> None:
        """Count a window; a report is made of it and those before once they last ``REPORT_SECONDS`` together."""
        window = account.window
        if not account.trusted or not account.parts:
            return
        self._predicted += account.predicted_joules
        self._prefill += account.prefill_joules
        self._measured += account.attributed_joules
        self._busy += account.busy_seconds
        seconds = self._seconds.get(window.device, 0.0) + window.duration_seconds
        self._seconds[window.device] = seconds
        if seconds >= REPORT_SECONDS:
            self._report(seconds)

    def _report(self, duration_seconds: float) -> None:
        if self._measured > 0.0 and self._predicted > 0.0:
            mix = PhaseMix.of(self._prefill / self._predicted)
            self._number += 1
            report = Report(self._number, mix, self._predicted, self._measured, duration_seconds)
            self.reports.append(report)
            bias, keep = self.bias[mix], 0.5 ** (self._busy / BIAS_HALF_LIFE_SECONDS)
            bias.predicted_joules = keep * bias.predicted_joules + report.predicted_joules
            bias.measured_joules = keep * bias.measured_joules + report.measured_joules
            bias.windows += 1
        self._seconds = {}
        self._predicted = self._prefill = self._measured = self._busy = 0.0
