"""What one scheduler step computes, and the single definition of phase.

Phase (ARCHITECTURE decision 4): *prefill* tokens are those whose values were already known
when the step was scheduled (prompt, or prompt and output replayed after a preemption);
*decode* tokens are the token just sampled, and drafts. ``num_tokens > 1`` is not the test.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


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


class RequestSlices(NamedTuple):
    """Per-request columns of one step, each of shape (requests,), dtype int64.

    context: tokens already in the KV cache before the step.
    prefill, decode: tokens of each phase, computed in this order.
    prefill_samples: 1 where the step completes a prompt and samples its first token.
    """

    context: IntArray
    prefill: IntArray
    decode: IntArray
    prefill_samples: IntArray

    @property
    def prefill_pairs(self) -> IntArray:
        """(query, key) pairs of the prefill tokens, shape (requests,)."""
        return self.prefill * self.context + self.prefill * (self.prefill + 1) // 2

    @property
    def decode_pairs(self) -> IntArray:
        """(query, key) pairs of the decode tokens, which follow the prefill tokens, shape (requests,)."""
        return self.decode * (self.context + self.prefill) + self.decode * (self.decode + 1) // 2

    def shape(self, encoder_tokens: int = 0) -> BatchShape:
        """Totals over the requests."""
        prefill_rows = self.prefill > 0
        decode_rows = self.decode > 0
        n_decode = int(self.decode.sum())
        decode = PhaseShape(
            int(np.count_nonzero(decode_rows)),
            n_decode,
            int(self.decode_pairs.sum()),
            int(((self.context + self.prefill + self.decode) * decode_rows).sum()),
            n_decode,
        )
        n_prefill = int(self.prefill.sum())
        if n_prefill == 0:
            return BatchShape(EMPTY_PHASE, decode, encoder_tokens)
        prefill = PhaseShape(
            int(np.count_nonzero(prefill_rows)),
            n_prefill,
            int(self.prefill_pairs.sum()),
            int(((self.context + self.prefill) * prefill_rows).sum()),
            int(self.prefill_samples.sum()),
        )
        return BatchShape(prefill, decode, encoder_tokens)
