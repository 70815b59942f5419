"""Hugging Face configs of published models, the keys that matter here, by repository name."""

from typing import Any

Config = dict[str, Any]


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, **more: Any) -> Config:
    return {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": intermediate, "vocab_size": 151936, "tie_word_embeddings": False,
        "sliding_window": None, "use_sliding_window": False, **more,
    }  # fmt: skip


def _qwen3_moe(size: tuple[int, int, int, int], experts: int, width: int, **more: Any) -> Config:
    moe = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": experts,
        "num_experts_per_tok": 8, "moe_intermediate_size": width, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "num_key_value_heads": 4,
    }  # fmt: skip
    return _qwen3(*size, **{**moe, **more})


def _vision(text: Config, **more: Any) -> Config:
    vision = {"model_type": "qwen3_vl", "depth": 27, "hidden_size": 1152}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, **more}


def _llama4(experts: int, step: int, **more: Any) -> Config:
    return {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34},
        "text_config": {
            "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "vocab_size": 202048, "num_local_experts": experts, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": step, "attention_chunk_size": 8192, "no_rope_layers": [],
        },
        **more,
    }  # fmt: skip


def _llama3(layers: int, hidden: int, heads: int, intermediate: int, **more: Any) -> Config:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 8,
        "intermediate_size": intermediate, "vocab_size": 128256, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _gemma3(layers: int, hidden: int, heads: tuple[int, int], intermediate: int, **more: Any) -> Config:
    return {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "num_hidden_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "intermediate_size": intermediate,
            "sliding_window": 1024, **more,
        },
    }  # fmt: skip


FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}}
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 18432, "vocab_size": 129280, "tie_word_embeddings": False, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 56, "hidden_size": 4480, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 15680, "vocab_size": 131072, "tie_word_embeddings": False,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "mlp_hidden_act": "relu2",
    "mamba_num_heads": 128, "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "chunk_size": 128, "mamba_ssm_cache_dtype": "float32", "sliding_window": None,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 24, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": 2880, "vocab_size": 201088, "tie_word_embeddings": False,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
    },
}  # fmt: skip
LLAMA_8B = _llama3(32, 4096, 32, 14336)
LLAMA_405B = _llama3(126, 16384, 128, 53248)
LLAMA_405B_FP8 = {
    **LLAMA_405B,
    "quantization_config": {
        "quant_method": "fbgemm_fp8",
        "modules_to_not_convert": [f"model.layers.{layer}.self_attn.q_proj" for layer in range(126)] + ["lm_head"],
    },
}
QWEN3_8B = _qwen3(36, 4096, 32, 12288)
QWEN3_30B = _qwen3_moe((48, 2048, 32, 6144), 128, 768)
QWEN3_235B = _qwen3_moe((94, 4096, 64, 12288), 128, 1536)
SCOUT, MAVERICK = _llama4(16, 1), _llama4(128, 2)
GEMMA3_12B = _gemma3(48, 3840, (16, 8), 15360)
GEMMA2_9B = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "torch_dtype": "bfloat16",
    "num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000, "sliding_window": 4096,
}  # fmt: skip
QWEN3_OMNI = {
    "model_type": "qwen3_omni_moe",
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {**QWEN3_30B, "model_type": "qwen3_omni_moe_text", "vocab_size": 152064},
    },
}
# Config and published parameters of the language model, in units of 1e9.
PUBLISHED: dict[str, tuple[Config, float]] = {
    "meta-llama/Llama-2-7b-hf": (_llama3(32, 4096, 32, 11008, vocab_size=32000, num_key_value_heads=32), 6.738),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA_8B, 8.03),
    "meta-llama/Llama-3.1-405B-Instruct": (LLAMA_405B, 405.849),
    "meta-llama/Llama-3.1-405B-Instruct-FP8": (LLAMA_405B_FP8, 405.849),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (SCOUT, 107.769),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8": (MAVERICK, 400.711),
    "Qwen/Qwen3-8B": (QWEN3_8B, 8.19),
    "Qwen/Qwen3-14B": (_qwen3(40, 5120, 40, 17408), 14.768),
    "Qwen/Qwen3-32B": (_qwen3(64, 5120, 64, 25600), 32.762),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (QWEN3_30B, 30.532),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": (_qwen3_moe((48, 2048, 32, 5472), 128, 768), 30.532),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": (QWEN3_235B, 235.093),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": ({**QWEN3_235B, **FP8}, 235.093),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8": (
        _qwen3_moe((62, 6144, 96, 8192), 160, 2560, num_key_value_heads=8, **FP8), 480.154,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (_vision({**QWEN3_8B, "model_type": "qwen3_vl_text"}), 8.19),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (_vision({**QWEN3_30B, "model_type": "qwen3_vl_moe_text"}), 30.532),
    "Qwen/Qwen3-VL-235B-A22B-Instruct-FP8": (
        _vision({**QWEN3_235B, "model_type": "qwen3_vl_moe_text"}, **FP8), 235.093,
    ),
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": (QWEN3_OMNI, 30.532),
    "deepseek-ai/DeepSeek-R1-0528": ({**DEEPSEEK, **FP8}, 671.025),
    "google/gemma-2-9b-it": (GEMMA2_9B, 9.242),
    "google/gemma-3-12b-it": (GEMMA3_12B, 11.765),
    "google/gemma-3-27b-it": (_gemma3(62, 5376, (32, 16), 21504, head_dim=128), 27.008),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": (NEMOTRON, 8.886),
    "openai/gpt-oss-20b": (GPT_OSS_20B, 20.908),
    "openai/gpt-oss-120b": ({**GPT_OSS_20B, "num_hidden_layers": 36, "num_local_experts": 128,
                             "layer_types": ["sliding_attention", "full_attention"] * 18}, 116.83),
}  # fmt: skip
