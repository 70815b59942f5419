from typing import Any

import pytest

from llmco2_vllm.core.mixers import HybridLayers, LatentAttention, StateSpace
from llmco2_vllm.core.model import ModelSpec, Precision
from tests.core.published import (
    DEEPSEEK,
    FP8,
    GEMMA2_9B,
    GEMMA3_12B,
    GPT_OSS_20B,
    LLAMA_8B,
    LLAMA_405B_FP8,
    MAVERICK,
    NEMOTRON,
    PUBLISHED,
    QWEN3_30B,
    SCOUT,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_known_and_has_its_published_parameters(name: str) -> None:
    config, billions = PUBLISHED[name]
    spec = ModelSpec.from_config(config)
    assert spec.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert not spec.generic


def test_latent_attention_is_read_with_its_ranks() -> None:
    spec = ModelSpec.from_config(DEEPSEEK)
    assert spec.latent == LatentAttention(1536, 512, 128, 64, 128)
    assert spec.head_dim == 192
    assert spec.cache_width == 576
    assert ModelSpec.from_config({**DEEPSEEK, "q_lora_rank": None}).latent == LatentAttention(0, 512, 128, 64, 128)


def test_the_first_layers_of_deepseek_are_dense_and_the_rest_share_an_expert() -> None:
    spec = ModelSpec.from_config(DEEPSEEK)
    assert (spec.moe_layers, spec.experts, spec.experts_per_token, spec.shared_intermediate) == (58, 256, 8, 2048)
    assert ModelSpec.from_config({**DEEPSEEK, "moe_layer_freq": 2}).moe_layers == 29


def test_the_layers_of_a_hybrid_are_counted_by_kind() -> None:
    spec = ModelSpec.from_config(NEMOTRON)
    assert spec.hybrid == HybridLayers(state_space=27, attention=4, mlp=25)
    assert spec.state_space == StateSpace(128, 80, 128, 8, 4, 128, 4.0)
    assert (spec.layers, spec.gated_mlp, spec.moe_layers) == (56, False, 0)


def test_a_hybrid_reads_the_same_from_the_list_that_transformers_makes_of_its_pattern() -> None:
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    listed = {key: value for key, value in NEMOTRON.items() if key != "hybrid_override_pattern"}
    listed["layers_block_type"] = [names[kind] for kind in NEMOTRON["hybrid_override_pattern"]]
    # Transformers fills in experts that no layer of this model has.
    listed |= {"n_routed_experts": 8, "moe_intermediate_size": 7688, "n_shared_experts": 1}
    assert ModelSpec.from_config(listed) == ModelSpec.from_config(NEMOTRON)


def test_experts_of_a_hybrid_are_counted_and_a_narrower_expert_width_is_not_calibrated() -> None:
    moe = {"n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "n_shared_experts": 1,
           "moe_shared_expert_intermediate_size": 3712, "hybrid_override_pattern": "MEME*E-"}  # fmt: skip
    spec = ModelSpec.from_config({**NEMOTRON, **moe})
    assert (spec.layers, spec.mlp_layers, spec.moe_layers, spec.shared_intermediate) == (7, 4, 3, 3712)
    assert ModelSpec.from_config({**NEMOTRON, **moe, "moe_latent_size": 1024}).generic


@pytest.mark.parametrize(("pattern", "named"), [("M-X", "X"), ("", "hybrid_override_pattern")])
def test_a_hybrid_with_an_impossible_pattern_is_an_error_that_names_it(pattern: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelSpec.from_config({**NEMOTRON, "hybrid_override_pattern": pattern})


def test_every_fourth_layer_of_llama_4_attends_to_everything_and_the_others_to_their_chunk() -> None:
    scout = ModelSpec.from_config(SCOUT)
    assert (scout.sliding_window, scout.sliding_layers, scout.chunked_window) == (8192, 36, True)
    rotary = [1, 0] * 24
    text = {**SCOUT["text_config"], "no_rope_layers": rotary}
    assert ModelSpec.from_config({**SCOUT, "text_config": text}).sliding_layers == 24
    kinds = ["chunked_attention"] * 47 + ["full_attention"]
    text = {**SCOUT["text_config"], "layer_types": kinds}
    assert ModelSpec.from_config({**SCOUT, "text_config": text}).sliding_layers == 47


def test_llama_4_interleaves_experts_and_has_one_that_is_shared() -> None:
    scout, maverick = ModelSpec.from_config(SCOUT), ModelSpec.from_config(MAVERICK)
    assert (scout.moe_layers, maverick.moe_layers) == (48, 24)
    assert (maverick.intermediate, maverick.moe_intermediate, maverick.shared_intermediate) == (16384, 8192, 8192)
    assert maverick.experts_per_token == 1
    listed = {**MAVERICK["text_config"], "moe_layers": [1, 3, 5]}
    assert ModelSpec.from_config({**MAVERICK, "text_config": listed}).moe_layers == 3


def test_gemma_alternates_windows_and_leaves_sizes_to_its_class() -> None:
    assert ModelSpec.from_config(GEMMA2_9B).sliding_layers == 21
    spec = ModelSpec.from_config(GEMMA3_12B)
    assert (spec.sliding_layers, spec.head_dim, spec.vocab, spec.tied_embeddings) == (40, 256, 262208, True)


def test_a_family_with_keys_of_latent_attention_is_read_with_it_but_flagged() -> None:
    spec = ModelSpec.from_config({**DEEPSEEK, "model_type": "novel"})
    assert spec.latent is not None
    assert spec.generic


@pytest.mark.parametrize(
    ("config", "attention", "rest"),
    [
        (GPT_OSS_20B, Precision(2.0, "bf16"), Precision(0.53125, "bf16")),
        (LLAMA_405B_FP8, Precision(2.0, "bf16"), Precision(1.0, "fp8")),
        ({**DEEPSEEK, **FP8}, Precision(1.0, "fp8"), Precision(1.0, "fp8")),
        (QWEN3_30B, Precision(2.0, "bf16"), Precision(2.0, "bf16")),
    ],
)
def test_attention_that_is_left_out_of_the_quantisation_keeps_the_dtype_of_the_model(
    config: dict[str, Any], attention: Precision, rest: Precision
) -> None:
    spec = ModelSpec.from_config(config)
    assert (spec.attention_precision, spec.linear_precision) == (attention, rest)


@pytest.mark.parametrize(
    ("settings", "weight_bytes", "compute_dtype"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.515625, "bf16"),
        ({"quant_method": "gptq", "bits": 8}, 1.0, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 1.0, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, 0.5625, "fp4"),
    ],
)
def test_quantised_weights_have_their_bytes_and_dtype(
    settings: dict[str, Any], weight_bytes: float, compute_dtype: str
) -> None:
    spec = ModelSpec.from_config({**LLAMA_8B, "quantization_config": settings})
    assert (spec.weight_bytes, spec.compute_dtype, spec.generic) == (weight_bytes, compute_dtype, False)
