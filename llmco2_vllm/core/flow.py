"""Data flow between the kernels of a step; repeated layers are drawn once."""

from __future__ import annotations

from itertools import pairwise

_BEFORE = ("embedding", "input_norm")
_AFTER_ATTENTION = ("output_projection", "attention_all_reduce")
_PLAIN = ("qkv_projection", "rope_and_kv_write")
_TO_LATENT = (
    ("q_projection", "rope_and_kv_write"),
    ("q_a_projection", "latent_norm", "q_b_projection", "rope_and_kv_write"),
    ("kv_a_projection", "latent_norm", "rope_and_kv_write"),
)
_FROM_LATENT = (
    ("kv_b_projection", "prefill_attention_latent"),
    ("query_absorption", "decode_attention_latent", "value_absorption"),
)
_ATTENTION = (
    "prefill_attention_full",
    "prefill_attention_sliding",
    "decode_attention_full",
    "decode_attention_sliding",
)
_STATE_SPACE = ("prefill_state_space_scan", "decode_state_space_update")
# Ways through a layer: token mixer, then MLP. A way is open when its first kernel is there.
_MIXERS: tuple[tuple[str, ...], ...] = (
    *((*_PLAIN, name, *_AFTER_ATTENTION) for name in _ATTENTION),
    *((*way, *core, *_AFTER_ATTENTION) for way in _TO_LATENT for core in _FROM_LATENT),
    *(
        (
            "state_space_in_projection",
            "state_space_convolution",
            name,
            "state_space_norm",
            "state_space_out_projection",
            "state_space_all_reduce",
        )
        for name in _STATE_SPACE
    ),
)
_MLPS: tuple[tuple[str, ...], ...] = (
    ("gate_up_projection", "activation", "down_projection"),
    ("router", "expert_all_to_all", "expert_gate_up", "expert_activation", "expert_down"),
    ("shared_gate_up", "shared_activation", "shared_down"),
)
_AFTER = ("mlp_all_reduce", "stage_transfer", "final_norm", "lm_head", "sampler")
# Kernels that not every way through them reaches: a way without them is another way, not a shorter one.
_FORKS = frozenset((*_ATTENTION, *_STATE_SPACE))


def data_flow(present: set[str]) -> tuple[tuple[str, str], ...]:
    """(producer, consumer) pairs among the kernels that are there."""
    mixers = [way for way in _MIXERS if way[0] in present and not (_FORKS & set(way)) - present]
    mlps = [way for way in _MLPS if way[0] in present]
    found: dict[tuple[str, str], None] = {}
    for mixer in mixers:
        for mlp in mlps:
            way = (*_BEFORE, *mixer, "post_norm", *mlp, *_AFTER)
            found.update(dict.fromkeys(pairwise(name for name in way if name in present)))
    return tuple(found)
