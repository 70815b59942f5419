"""What a predictor answers before a step runs, and the protocol it answers by."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from llmco2_vllm.core.batch import BatchShape, PhaseShape


class Rates(NamedTuple):
    """Energy of one phase of a step, as joules per unit of its drivers (ARCHITECTURE decision 5).

    per_token_joules: dense kernels, and streamed weights shared equally by the tokens present.
    per_pair_joules: attention, per (query, key) pair.
    per_sample_joules: LM head and sampler, per sampled row.
    """

    per_token_joules: float = 0.0
    per_pair_joules: float = 0.0
    per_sample_joules: float = 0.0

    def joules(self, phase: PhaseShape) -> float:
        """Energy of one phase of a step at these rates."""
        _, tokens, pairs, _, samples = phase
        return tokens * self[0] + pairs * self[1] + samples * self[2]


NO_RATES = Rates()


class Estimate(NamedTuple):
    """Predicted energy and duration of one step.

    For each phase ``tokens * per_token + pairs * per_pair + samples * per_sample`` equals
    ``prefill_joules`` or ``decode_joules`` to rounding, so a split over requests by the rates
    loses nothing and counts nothing twice.

    lower_ratio, upper_ratio: 90 % interval of the energy, as factors on the prediction.
    in_distribution: False when the batch or the deployment lies outside what the predictor
        was calibrated on; the interval is widened accordingly.
    """

    prefill_joules: float
    decode_joules: float
    prefill: Rates
    decode: Rates
    duration_seconds: float
    lower_ratio: float
    upper_ratio: float
    in_distribution: bool

    @property
    def energy_joules(self) -> float:
        """Predicted energy of the whole step."""
        return self.prefill_joules + self.decode_joules


@runtime_checkable
class Predictor(Protocol):
    """Prices a step before it runs. Called on the scheduler thread: no I/O, no locks, numpy only."""

    @property
    def name(self) -> str:
        """Method and version as published, for example ``roofline/1-h100``."""
        ...

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy and duration of ``batch``; a batch without tokens is priced at zero."""
        ...
