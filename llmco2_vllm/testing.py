"""Fakes that are shipped, for our tests and for those who build on the package."""

from __future__ import annotations

from dataclasses import dataclass

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Estimate, Rates


@dataclass
class FakeClock:
    """A clock that stands still until it is told to go on."""

    now_seconds: float = 0.0

    def __call__(self) -> float:
        return self.now_seconds

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_seconds += seconds


_PREFILL = Rates(1.0, 0.001, 5.0)
_DECODE = Rates(2.0, 0.01, 7.0)


@dataclass(frozen=True)
class ConstantPredictor:
    """Joules by fixed rates, so that a test can price a batch by hand; one second per step."""

    prefill: Rates = _PREFILL
    decode: Rates = _DECODE
    lower_ratio: float = 0.5
    upper_ratio: float = 2.0
    in_distribution: bool = True

    @property
    def name(self) -> str:
        """Method and version."""
        return "constant/1"

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy by the fixed rates; a batch without tokens costs nothing."""
        return Estimate(
            _price(batch.prefill, self.prefill),
            _price(batch.decode, self.decode),
            self.prefill,
            self.decode,
            1.0 if batch.tokens else 0.0,
            self.lower_ratio,
            self.upper_ratio,
            self.in_distribution,
        )


def _price(phase: PhaseShape, rates: Rates) -> float:
    return (
        phase.tokens * rates.per_token_joules
        + phase.pairs * rates.per_pair_joules
        + phase.samples * rates.per_sample_joules
    )
