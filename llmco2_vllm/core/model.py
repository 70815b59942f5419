"""ModelSpec: the sizes of a language model that decide its FLOPs and bytes, from a Hugging Face ``config.json``.

Families that are not known (``families.py``) are read as a generic decoder with ``generic=True``; the predictor
then widens its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmco2_vllm.core.families import (
    FAMILIES,
    Family,
    integer,
    read_attention,
    read_hybrid,
    read_mlp,
    read_window,
    text_config,
)
from llmco2_vllm.core.mixers import HybridLayers, LatentAttention, StateSpace
from llmco2_vllm.core.precision import read_precision

_NO_HEAD = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForRewardModel")


class Precision(NamedTuple):
    """How a weight matrix is stored, bytes per weight, and the dtype its products are computed in."""

    weight_bytes: float
    dtype: str


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one model; counts unless the name says otherwise.

    intermediate: width of the dense MLP; moe_intermediate: of one expert; shared_intermediate: of all
    shared experts of a layer together. moe_layers of ``layers`` have experts instead of the dense MLP.
    sliding_layers of ``layers`` attend to the last ``sliding_window`` tokens only, or with chunked_window to
    the part of their own chunk of that many tokens which lies behind them.
    weight_bytes: bytes per weight of the linear layers; head and embedding stay at activation_bytes.
    attention_weight_bytes: of the attention projections where they are not quantised as the rest; None: as the rest.
    block_quantised: quantised weights with a scale per block (``weight_block_size``), not per tensor or channel.
    compute_dtype: dtype of the products of the linear layers; activation_dtype: of everything else.
    latent: sizes of latent attention, which then replaces the plain one; head_dim is that of its queries.
    hybrid: layers by kind where each layer is a mixer or an MLP, with state_space the sizes of the former.
    generic: the layout was guessed, estimates are out of distribution.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    shared_intermediate: int = 0
    moe_layers: int = 0
    sliding_window: int | None = None
    sliding_layers: int = 0
    activation_dtype: str = "bf16"
    compute_dtype: str = "bf16"
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    kv_bytes: float = 2.0
    has_lm_head: bool = True
    generic: bool = False
    family: str = ""
    chunked_window: bool = False
    attention_weight_bytes: float | None = None
    block_quantised: bool = False
    latent: LatentAttention | None = None
    hybrid: HybridLayers | None = None
    state_space: StateSpace | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], kv_cache_dtype: str = "auto") -> ModelSpec:
        """Read a Hugging Face config (``config.json`` as a dict, multimodal ``text_config`` included).

        ``dtype`` (or ``torch_dtype``) may be overridden in the mapping with what the engine really runs.
        Raises ValueError that names the missing or impossible key.
        """
        merged = text_config(config)
        name = str(merged.get("model_type", ""))
        family = FAMILIES.get(name, Family())
        precision = read_precision(merged, config.get("quantization_config"), kv_cache_dtype)
        # An encoder attends both ways, which the causal pairs of a batch do not count; experts behind a narrower
        # latent width (moe_latent_size) are not described: not calibrated either.
        precision["generic"] |= name not in FAMILIES or family.encoder or bool(merged.get("moe_latent_size"))
        return cls(
            **read_attention(merged),
            **read_mlp(merged),
            **read_window(merged, family),
            **read_hybrid(merged),
            **precision,
            vocab=integer(merged, "vocab_size"),
            gated_mlp=family.gated,
            tied_embeddings=bool(merged.get("tie_word_embeddings", family.tied)),
            has_lm_head=_has_lm_head(config, family),
            family=name,
        )

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; the value heads have the same."""
        return self.kv_heads * self.head_dim

    @property
    def cache_width(self) -> int:
        """Values cached per token and attention layer: keys and values, or the latent that all heads share."""
        return self.latent.cache_width if self.latent else 2 * self.kv_width

    @property
    def attention_layers(self) -> int:
        """Layers with attention."""
        return self.hybrid.attention if self.hybrid else self.layers

    @property
    def state_space_layers(self) -> int:
        """Layers with a recurrent state."""
        return self.hybrid.state_space if self.hybrid else 0

    @property
    def mlp_layers(self) -> int:
        """Layers with an MLP or experts."""
        return self.hybrid.mlp if self.hybrid else self.layers

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP: up and down, and gate."""
        return 3 if self.gated_mlp else 2

    @property
    def linear_precision(self) -> Precision:
        """Of the MLP and of experts."""
        return Precision(self.weight_bytes, self.compute_dtype)

    @property
    def attention_precision(self) -> Precision:
        """Of the projections of attention."""
        if self.attention_weight_bytes is None:
            return self.linear_precision
        return Precision(self.attention_weight_bytes, self.activation_dtype)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding."""
        return self.vocab * self.hidden

    @property
    def attention_parameters(self) -> int:
        """Weights of the attention of one layer, biases left out."""
        if self.latent:
            return self.latent.parameters(self.hidden, self.heads)
        return self.hidden * (2 * self.q_width + 2 * self.kv_width)

    @property
    def non_embedding_parameters(self) -> int:
        """Weights of all layers and the final norm, without embedding and LM head."""
        dense = self.mlp_matrices * self.hidden * self.intermediate
        experts = self.experts * self.mlp_matrices * self.hidden * self.moe_intermediate
        shared = self.mlp_matrices * self.hidden * self.shared_intermediate
        moe = self.hidden * self.experts + experts + shared
        mixers = self.attention_layers * self.attention_parameters
        if self.state_space:
            mixers += self.state_space_layers * self.state_space.parameters(self.hidden)
        norms = (self.attention_layers + self.state_space_layers + self.mlp_layers + 1) * self.hidden
        return mixers + norms + (self.mlp_layers - self.moe_layers) * dense + self.moe_layers * moe

    @property
    def parameters(self) -> int:
        """All weights: layers, embedding, and the LM head where it is not tied; biases are left out."""
        head = self.embedding_parameters if self.has_lm_head and not self.tied_embeddings else 0
        return self.non_embedding_parameters + self.embedding_parameters + head


def _has_lm_head(config: Mapping[str, Any], family: Family) -> bool:
    names = config.get("architectures")
    if not names:
        return not family.encoder
    return not str(names[0]).endswith(_NO_HEAD)
