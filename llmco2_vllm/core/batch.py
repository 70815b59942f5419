"""What one scheduler step computes, and the single definition of phase.

Phase (ARCHITECTURE decision 4): *prefill* tokens are those whose values were already known
when the step was scheduled (prompt, or prompt and output replayed after a preemption);
*decode* tokens are the token just sampled, and drafts. ``num_tokens > 1`` is not the test.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """Phase of a token inside a step."""

    PREFILL = "prefill"
    DECODE = "decode"


class PhaseShape(NamedTuple):
    """Totals of one phase of a batch; every field is a count, zero when the phase is absent.

    sequences: requests with at least one token of this phase.
    tokens: tokens computed.
    pairs: (query, key) pairs of causal attention, sum of ``n * context + n * (n + 1) / 2``.
    kv_tokens: cached tokens read by attention, sum of ``context + n``.
    samples: rows that go through the LM head and the sampler.
    """

    sequences: int = 0
    tokens: int = 0
    pairs: int = 0
    kv_tokens: int = 0
    samples: int = 0


EMPTY_PHASE = PhaseShape()


class BatchShape(NamedTuple):
    """Totals of one step, prefill and decode apart. ``encoder_tokens``: multimodal encoder inputs."""

    prefill: PhaseShape = EMPTY_PHASE
    decode: PhaseShape = EMPTY_PHASE
    encoder_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens computed in the step, both phases."""
        return self.prefill.tokens + self.decode.tokens
