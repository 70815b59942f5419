"""Sizes of token mixers other than plain attention: latent attention (MLA) and Mamba-2 state space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); widths in channels.

    query_rank: of the compressed query, 0 where queries are projected directly.
    latent_rank: of the compressed keys and values that are cached.
    nope_dim, rope_dim: channels of a query or key head without and with rotary position; value_dim: of a value head.
    """

    query_rank: int
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer; all heads share them."""
        return self.latent_rank + self.rope_dim

    def parameters(self, hidden: int, heads: int) -> int:
        """Weights of one layer: query, latent, expansion and output projections, and the two latent norms."""
        query = self.nope_dim + self.rope_dim
        queries = self.query_rank * (hidden + heads * query + 1) if self.query_rank else hidden * heads * query
        latent = hidden * self.cache_width + self.latent_rank
        expansion = self.latent_rank * heads * (self.nope_dim + self.value_dim)
        return queries + latent + expansion + heads * self.value_dim * hidden


@dataclass(frozen=True)
class StateSpace:
    """Mamba-2 (Dao and Gu, arXiv:2405.21060): ``heads`` of ``head_dim`` channels with ``state`` values each.

    groups: heads of a group share the input and output maps B and C. kernel: width of the causal convolution.
    chunk: tokens of a block of the prefill scan. state_bytes: bytes per value of the cached state.
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    chunk: int = 256
    state_bytes: float = 4.0

    @property
    def inner(self) -> int:
        """Channels of all heads together."""
        return self.heads * self.head_dim

    @property
    def state_size(self) -> int:
        """Values of the recurrent state of one sequence in one layer."""
        return self.inner * self.state

    def parameters(self, hidden: int) -> int:
        """Weights of one layer: input and output projection, convolution, gated norm, and A, D, dt of each head."""
        mixed = self.inner + 2 * self.groups * self.state
        projections = hidden * (self.inner + mixed + self.heads) + self.inner * hidden
        return projections + mixed * (self.kernel + 1) + self.inner + 3 * self.heads


class HybridLayers(NamedTuple):
    """Layers of a hybrid model, each of one kind: state space, attention, or MLP (experts included)."""

    state_space: int
    attention: int
    mlp: int
