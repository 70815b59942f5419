from typing import Any

import pytest

from llmco2_vllm.core.model import ModelSpec

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "tie_word_embeddings": False, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN25_7B = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 131072,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
PHI3_MINI = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 8192, "vocab_size": 32064, "sliding_window": 2047, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA3_27B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 21504, "vocab_size": 262208,
        "sliding_window": 1024,
    },
}  # fmt: skip
BGE_BASE = {
    "model_type": "bert", "architectures": ["BertModel"], "torch_dtype": "float32",
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "vocab_size": 30522,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA_8B, 8.03e9),
        (SMOLLM2, 134.5e6),
        (QWEN3_30B, 30.53e9),
        (MIXTRAL, 46.70e9),
        (QWEN25_7B, 7.616e9),
        (QWEN3_8B, 8.19e9),
        (MISTRAL_7B, 7.242e9),
        (PHI3_MINI, 3.821e9),
        (GEMMA3_27B, 27.0e9),
    ],
)
def test_the_parameter_count_is_the_published_one(config: dict[str, Any], published: float) -> None:
    assert ModelSpec.from_config(config).parameters == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in LLAMA_8B.items() if name != key}
    with pytest.raises(ValueError, match=key):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("value", [0, -1, "32", 1.5, True])
def test_an_impossible_size_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ModelSpec.from_config({**LLAMA_8B, "num_hidden_layers": value})


def test_an_impossible_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="int3"):
        ModelSpec.from_config({**LLAMA_8B, "torch_dtype": "int3"})


def test_a_mixture_without_top_k_is_an_error_that_names_it() -> None:
    config = {name: value for name, value in MIXTRAL.items() if name != "num_experts_per_tok"}
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        ModelSpec.from_config(config)


def test_an_unknown_family_is_read_as_a_generic_decoder() -> None:
    assert ModelSpec.from_config({**LLAMA_8B, "model_type": "novel"}).generic
    assert not ModelSpec.from_config(LLAMA_8B).generic


def test_sliding_windows_follow_the_family_and_the_layer_list() -> None:
    assert ModelSpec.from_config(MISTRAL_7B).sliding_layers == 32
    assert ModelSpec.from_config(GEMMA3_27B).sliding_layers == 52
    assert ModelSpec.from_config(QWEN25_7B).sliding_window is None
    kinds = ["sliding_attention", "full_attention"] * 16
    assert ModelSpec.from_config({**MISTRAL_7B, "layer_types": kinds}).sliding_layers == 16


def test_dense_layers_of_a_mixture_are_counted() -> None:
    assert ModelSpec.from_config({**QWEN3_30B, "mlp_only_layers": [0, 1]}).moe_layers == 46
    assert ModelSpec.from_config({**QWEN3_30B, "decoder_sparse_step": 2}).moe_layers == 24


@pytest.mark.parametrize(
    ("settings", "weight_bytes", "compute_dtype", "generic"),
    [
        ({"quant_method": "fp8"}, 1.0, "fp8", False),
        ({"quant_method": "awq", "bits": 4}, 0.515625, "bf16", False),
        ({"quant_method": "mxfp4"}, 0.53125, "bf16", False),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 8, "type": "int"}}}},
            1.0,
            "int8",
            False,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            1.0,
            "fp8",
            False,
        ),
        ({"quant_method": "gguf"}, 2.0, "bf16", True),
    ],
)
def test_quantised_weights_are_smaller(
    settings: dict[str, Any], weight_bytes: float, compute_dtype: str, generic: bool
) -> None:
    spec = ModelSpec.from_config({**LLAMA_8B, "quantization_config": settings})
    assert (spec.weight_bytes, spec.compute_dtype, spec.generic) == (weight_bytes, compute_dtype, generic)
    assert spec.activation_bytes == 2.0


def test_the_kv_cache_follows_the_model_unless_it_has_a_dtype_of_its_own() -> None:
    assert ModelSpec.from_config(LLAMA_8B).kv_bytes == 2.0
    assert ModelSpec.from_config({**LLAMA_8B, "dtype": "float32"}).kv_bytes == 4.0
    assert ModelSpec.from_config(LLAMA_8B, kv_cache_dtype="fp8").kv_bytes == 1.0


def test_an_encoder_counts_its_matrices_and_is_not_calibrated() -> None:
    spec = ModelSpec.from_config(BGE_BASE)
    # 109.5e6 published; position table, pooler and biases are left out.
    assert spec.parameters == pytest.approx(109.5e6, rel=0.015)
    assert spec.generic


def test_a_pooling_model_has_no_head() -> None:
    assert not ModelSpec.from_config(BGE_BASE).has_lm_head
    assert not ModelSpec.from_config({**QWEN3_8B, "architectures": ["Qwen3ForSequenceClassification"]}).has_lm_head
    assert ModelSpec.from_config(QWEN3_8B).has_lm_head
