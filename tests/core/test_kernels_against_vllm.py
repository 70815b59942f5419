"""FLOPs and bytes of the graph against vLLM's own ``vllm/v1/metrics/perf.py``, component by component.

The batches are given in vLLM's convention, every token of a request attending to the request's whole length.
Where vLLM counts differently by design the difference is computed here on its own; docs/adr/0006 lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.families import text_config
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.kernels import DRIVERS, KernelGraph, build_graph, windowed_reads
from llmco2_vllm.core.model import ModelSpec
from tests.core.published import (
    DEEPSEEK,
    FP8,
    GEMMA2_9B,
    GEMMA3_12B,
    GPT_OSS_20B,
    LLAMA_8B,
    LLAMA_405B,
    QWEN3_8B,
    QWEN3_30B,
    QWEN3_235B,
    SCOUT,
)

perf = pytest.importorskip("vllm.v1.metrics.perf", reason="the oracle is vLLM's own count; vllm is not installed")

# Rows of (requests, new tokens, context with the new tokens, prefill).
BATCHES = {
    "decode": [(256, 1, 1500, False)],
    "long decode": [(16, 1, 7000, False)],
    "prefill": [(4, 2048, 2048, True)],
    "prefill behind a prefix": [(2, 512, 3000, True)],
    "mixed": [(64, 1, 2000, False), (1, 1500, 1500, True)],
}
_GEMMA3_TYPES = (["sliding_attention"] * 5 + ["full_attention"]) * 8
DENSE = {
    "Llama 3.1 8B": LLAMA_8B,
    "Llama 3.1 8B FP8": {**LLAMA_8B, **FP8},
    "Llama 3.1 405B": LLAMA_405B,
    "Qwen 3 8B": QWEN3_8B,
    "Gemma 2 9B": {**GEMMA2_9B, "layer_types": ["sliding_attention", "full_attention"] * 21},
    "Gemma 3 12B": {**text_config(GEMMA3_12B), "layer_types": _GEMMA3_TYPES},
}
MIXTURES = {
    "Qwen 3 30B": QWEN3_30B,
    "Qwen 3 235B FP8": {**QWEN3_235B, **FP8},
    "gpt-oss 20B": {key: value for key, value in GPT_OSS_20B.items() if key != "quantization_config"},
    "Llama 4 Scout": text_config(SCOUT),
    "DeepSeek V3": DEEPSEEK,
}
ATTENTION = (
    "prefill_attention_full", "decode_attention_full", "prefill_attention_sliding", "decode_attention_sliding",
    "prefill_attention_latent", "decode_attention_latent",
)  # fmt: skip
BYTES = ("weight_bytes", "activation_bytes", "kv_bytes")


@dataclass
class Case:
    """One step of one deployment, counted by the graph and by vLLM."""

    model: ModelSpec
    topology: Topology
    rows: list[tuple[int, int, int, bool]]
    graph: KernelGraph
    batch: BatchShape
    theirs: Any
    context: Any

    def ours(self, quantities: tuple[str, ...] | str, *names: str) -> float:
        """Sum over kernels of those names and over quantities, one rank, whole step."""
        chosen = [kernel.name in names for kernel in self.graph.kernels]
        listed = (quantities,) if isinstance(quantities, str) else quantities
        drivers = np.array(self.graph.drivers(self.batch))
        return float(sum((self.graph.coefficients(quantity) @ drivers)[chosen].sum() for quantity in listed))

    def vllm_flops(self, *names: str) -> float:
        """Sum over vLLM's operations whose name, without the component, is listed."""
        return _sum(self.theirs.get_num_flops_breakdown(self.context), names)

    def vllm_bytes(self, *names: str) -> float:
        """Read and written bytes of vLLM's operations whose name begins as listed."""
        parts = self.theirs.get_read_bytes_breakdown(self.context), self.theirs.get_write_bytes_breakdown(self.context)
        return sum(_sum(part, names, prefix=True) for part in parts)

    @property
    def read_beside_windows(self) -> float:
        """Bytes of keys and values that a window's queries read and vLLM leaves out: it stops at one window per
        request, while the tokens of a step reach back over the window and over each other."""
        window, model = self.model.sliding_window, self.model
        if window is None:
            return 0.0
        ours = sum(windowed_reads(phase, window)[1] for phase in (self.batch.prefill, self.batch.decode))
        theirs = sum(requests * min(length, window) for requests, _, length, _ in self.rows)
        width = 2 * max(1.0, model.kv_heads / self.topology.tensor_parallel) * model.head_dim
        return (ours - theirs) * width * model.kv_bytes * model.sliding_layers

    @property
    def expert_ratio(self) -> float:
        """Expected distinct experts over those of vLLM, which takes routed tokens to meet a new expert each."""
        drivers = self.graph.drivers(self.batch)
        balanced = min(self.batch.tokens * self.model.experts_per_token, self.model.experts)
        return drivers[DRIVERS.index("experts")] / balanced


def _sum(parts: dict[str, int], names: tuple[str, ...], prefix: bool = False) -> float:
    keys = {key: key.partition(".")[2] for key in parts}
    return float(sum(parts[key] for key, name in keys.items() if (name.startswith(names) if prefix else name in names)))


def vllm_metrics(config: dict[str, Any], topology: Topology) -> Any:
    """vLLM's ModelMetrics of a deployment, from the parts of a VllmConfig that it reads."""
    torch = pytest.importorskip("torch")
    text = {key: value for key, value in config.items() if value is not None and key != "text_config"}
    hf = SimpleNamespace(**text)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 0
    model = SimpleNamespace(
        hf_config=hf, hf_text_config=hf, dtype=torch.bfloat16, is_deepseek_mla="kv_lora_rank" in text,
        get_vocab_size=lambda: text["vocab_size"], get_hidden_size=lambda: text["hidden_size"],
        get_total_num_kv_heads=lambda: text.get("num_key_value_heads", heads), get_head_size=lambda: head_dim,
        get_num_experts=lambda: experts, get_num_experts_per_tok=lambda: text.get("num_experts_per_tok", 0),
        get_sliding_window=lambda: text.get("sliding_window") if text.get("use_sliding_window") is not False else None,
    )  # fmt: skip
    method = (config.get("quantization_config") or {}).get("quant_method")
    return perf.ModelMetrics(
        SimpleNamespace(
            model_config=model,
            cache_config=SimpleNamespace(cache_dtype="auto"),
            quant_config=SimpleNamespace(get_name=lambda: method) if method else None,
            parallel_config=SimpleNamespace(
                data_parallel_size=topology.data_parallel,
                tensor_parallel_size=topology.tensor_parallel,
                pipeline_parallel_size=topology.pipeline_parallel,
                enable_expert_parallel=topology.expert_parallel,
            ),
        )
    )


def case(config: dict[str, Any], topology: Topology, batch: str) -> Case:
    """Both counts of a step; pairs are tokens x whole length, as in vLLM."""
    model, context, rows = ModelSpec.from_config(config), perf.ExecutionContext(), BATCHES[batch]
    phases = {True: PhaseShape(), False: PhaseShape()}
    for requests, tokens, length, is_prefill in rows:
        for _ in range(requests):
            context.add(tokens, length, is_prefill)
        samples = requests if is_prefill else requests * tokens
        phases[is_prefill] = PhaseShape(
            requests, requests * tokens, requests * tokens * length, requests * length, samples
        )
    shape = BatchShape(phases[True], phases[False])
    graph = build_graph(model, topology)
    return Case(model, topology, rows, graph, shape, vllm_metrics(config, topology), context)


def check_attention(case: Case, rel: float) -> None:
    size, tokens = case.model.activation_bytes, case.batch.tokens
    for kernel, flops, moved in (
        ("qkv_projection", "qkv_proj", "qkv_"),
        ("output_projection", "out_proj", "out_"),
    ):
        assert case.ours("flops", kernel) == pytest.approx(case.vllm_flops(flops), rel=rel)
        assert case.ours(BYTES, kernel) == pytest.approx(case.vllm_bytes(moved), rel=rel)
    assert case.ours("flops", *ATTENTION) == pytest.approx(case.vllm_flops("attn_qk", "attn_av"), rel=rel)
    # vLLM leaves out that attention writes its output.
    written = tokens * case.model.q_width / case.topology.tensor_parallel * size * case.model.layers
    moved_bytes = case.ours(BYTES, *ATTENTION) - written + case.ours("kv_bytes", "rope_and_kv_write")
    moved_bytes -= case.read_beside_windows
    assert moved_bytes == pytest.approx(case.vllm_bytes("attn_input", "kv_cache"), rel=rel)


def check_head(case: Case, rel: float) -> None:
    assert case.ours("flops", "lm_head") == pytest.approx(case.vllm_flops("unembed"), rel=rel)
    assert case.ours(BYTES, "lm_head") == pytest.approx(case.vllm_bytes("input", "weight", "output"), rel=rel)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_step_has_the_flops_and_bytes_that_vllm_counts(name: str, ranks: int, batch: str) -> None:
    step = case(DENSE[name], Topology(ranks), batch)
    check_attention(step, 0.01)
    check_head(step, 0.01)
    mlp = ("gate_up_projection", "down_projection")
    assert step.ours("flops", *mlp) == pytest.approx(step.vllm_flops("dense_ffn"), rel=0.01)
    products = step.vllm_bytes("dense_up_gate", "dense_down")
    assert step.ours(BYTES, *mlp) == pytest.approx(products, rel=0.01)
    assert step.ours(BYTES, "activation") == pytest.approx(step.vllm_bytes("dense_silu"), rel=0.01)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_step_as_a_whole_agrees_once_the_listed_differences_are_taken_off(
    name: str, ranks: int, batch: str
) -> None:
    step = case(DENSE[name], Topology(ranks), batch)
    counted = (
        "qkv_projection", "output_projection", "gate_up_projection", "down_projection", "activation", "lm_head",
    )  # fmt: skip
    model, tokens = step.model, step.batch.tokens
    flops = step.ours("flops", *counted, *ATTENTION) - step.ours("flops", "activation")
    assert flops == pytest.approx(step.theirs.get_num_flops(step.context), rel=0.01)
    written = tokens * model.q_width / ranks * model.activation_bytes * model.layers
    moved = step.ours(BYTES, *counted, *ATTENTION) + step.ours("kv_bytes", "rope_and_kv_write")
    moved -= written + step.read_beside_windows
    theirs = step.theirs.get_read_bytes(step.context) + step.theirs.get_write_bytes(step.context)
    assert moved == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("topology", [Topology(), Topology(4), Topology(8, expert_parallel=True)], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_the_flops_and_bytes_that_vllm_counts(name: str, topology: Topology, batch: str) -> None:
    step = case(MIXTURES[name], topology, batch)
    if not step.model.latent:
        check_attention(step, 0.05)
    check_head(step, 0.05)
    experts = ("expert_gate_up", "expert_down")
    assert step.ours("flops", *experts) == pytest.approx(step.vllm_flops("routed_ffn"), rel=0.05)
    activations = step.vllm_bytes("routed_up_gate_input", "routed_up_gate_output", "routed_down_input",
                                  "routed_down_output")  # fmt: skip
    assert step.ours("activation_bytes", *experts) == pytest.approx(activations, rel=0.05)
    assert step.ours(BYTES, "expert_activation") == pytest.approx(step.vllm_bytes("routed_silu"), rel=0.05)
    streamed = step.vllm_bytes("routed_up_gate_weights", "routed_down_weights") * step.expert_ratio
    assert step.ours("weight_bytes", *experts) == pytest.approx(streamed, rel=0.05)


@pytest.mark.parametrize("batch", ["decode", "prefill", "mixed"])
def test_many_tokens_reach_every_expert_as_vllm_takes_for_granted(batch: str) -> None:
    assert case(QWEN3_30B, Topology(), batch).expert_ratio == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("batch", BATCHES)
def test_shared_experts_and_dense_layers_of_deepseek_agree(batch: str) -> None:
    step = case(DEEPSEEK, Topology(4), batch)
    shared, dense = ("shared_gate_up", "shared_down"), ("gate_up_projection", "down_projection")
    assert step.ours("flops", *shared) == pytest.approx(step.vllm_flops("shared_ffn"), rel=0.01)
    assert step.ours(BYTES, *shared) == pytest.approx(step.vllm_bytes("shared_up_gate", "shared_down"), rel=0.01)
    assert step.ours(BYTES, "shared_activation") == pytest.approx(step.vllm_bytes("shared_silu"), rel=0.01)
    assert step.ours("flops", *dense) == pytest.approx(step.vllm_flops("dense_ffn"), rel=0.01)
    assert step.ours(BYTES, *dense) == pytest.approx(step.vllm_bytes("dense_up_gate", "dense_down"), rel=0.01)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_projections_of_latent_attention_agree(ranks: int, batch: str) -> None:
    step = case(DEEPSEEK, Topology(ranks), batch)
    for kernel, flops, moved in (
        ("q_a_projection", "q_a_proj", "q_a_"),
        ("q_b_projection", "q_b_proj", "q_b_"),
        ("kv_a_projection", "kv_a_proj", "kv_a_"),
        ("output_projection", "out_proj", "out_"),
    ):
        assert step.ours("flops", kernel) == pytest.approx(step.vllm_flops(flops), rel=0.01)
        assert step.ours(BYTES, kernel) == pytest.approx(step.vllm_bytes(moved), rel=0.01)
    assert step.ours("kv_bytes", "rope_and_kv_write") == pytest.approx(step.vllm_bytes("kv_cache"), rel=0.01)


@pytest.mark.parametrize("ranks", [1, 8])
def test_latent_prefill_agrees_with_vllm_in_the_expanded_form(ranks: int) -> None:
    step = case(DEEPSEEK, Topology(ranks), "prefill")
    attention = "prefill_attention_latent"
    assert step.ours("flops", attention) == pytest.approx(step.vllm_flops("attn_qk", "attn_av"), rel=0.01)
    assert step.ours("flops", "kv_b_projection") == pytest.approx(step.vllm_flops("kv_b_proj"), rel=0.01)
    # The graph reads the latent with its rope channels, from the cache.
    assert step.ours(BYTES, "kv_b_projection") == pytest.approx(step.vllm_bytes("kv_b_"), rel=0.03)
    written = step.batch.tokens * 128 / ranks * 128 * 2 * 61
    assert step.ours(BYTES, attention) - written == pytest.approx(step.vllm_bytes("attn_input"), rel=0.01)


@pytest.mark.parametrize("ranks", [1, 8])
def test_latent_decode_differs_from_vllm_by_the_absorbed_form(ranks: int) -> None:
    step = case(DEEPSEEK, Topology(ranks), "decode")
    attention = "decode_attention_latent"
    absorbed, expanded = (512 + 64) + 512, (128 + 64) + 128
    ratio = step.ours("flops", attention) / step.vllm_flops("attn_qk", "attn_av")
    assert ratio == pytest.approx(absorbed / expanded)
    both = ("query_absorption", "value_absorption")
    assert step.ours("flops", *both) == pytest.approx(step.vllm_flops("kv_b_proj"), rel=0.01)
    assert step.ours("weight_bytes", *both) == pytest.approx(step.vllm_bytes("kv_b_weight"), rel=0.01)
    queries = step.batch.tokens * 128 / ranks * 192 * 2 * 61
    assert step.ours("kv_bytes", attention) == pytest.approx(step.vllm_bytes("attn_input") - queries, rel=0.01)


def test_the_causal_half_is_what_vllm_counts_beyond_our_pairs() -> None:
    step = case(LLAMA_8B, Topology(), "prefill")
    requests, tokens = 4, 2048
    causal = step.batch.prefill._replace(pairs=requests * tokens * (tokens + 1) // 2)
    ours = Case(**{**vars(step), "batch": BatchShape(causal, step.batch.decode)}).ours("flops", *ATTENTION)
    assert ours / step.vllm_flops("attn_qk", "attn_av") == pytest.approx((tokens + 1) / (2 * tokens))
