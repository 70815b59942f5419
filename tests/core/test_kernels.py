from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.kernels import DRIVERS, KernelGraph, KernelKind, build_graph, windowed_reads
from llmco2_vllm.core.model import ModelSpec

LLAMA_8B = ModelSpec(32, 4096, 32, 8, 128, 14336, 128256)
SMALL = ModelSpec(30, 576, 9, 3, 64, 1536, 49152, tied_embeddings=True)
MOE = ModelSpec(
    48, 2048, 32, 4, 128, 6144, 151936, experts=128, experts_per_token=8, moe_intermediate=768, moe_layers=48
)
BYTES = ("weight_bytes", "activation_bytes", "kv_bytes")


def prefill(tokens: int, context: int = 0) -> BatchShape:
    pairs = tokens * context + tokens * (tokens + 1) // 2
    return BatchShape(PhaseShape(1, tokens, pairs, context + tokens, 1), EMPTY_PHASE)


def decode(requests: int, context: int) -> BatchShape:
    return BatchShape(EMPTY_PHASE, PhaseShape(requests, requests, requests * context, requests * context, requests))


def total(graph: KernelGraph, quantity: str, batch: BatchShape) -> float:
    return float((graph.coefficients(quantity) @ np.array(graph.drivers(batch))).sum())


@pytest.mark.parametrize("model", [LLAMA_8B, SMALL])
def test_prefill_takes_two_flops_per_parameter_and_token_and_the_attention(model: ModelSpec) -> None:
    tokens = 1024
    graph = build_graph(replace(model, has_lm_head=False), Topology())
    attention = 4 * model.q_width * model.layers * tokens * (tokens + 1) / 2
    expected = 2 * model.non_embedding_parameters * tokens + attention
    assert total(graph, "flops", prefill(tokens)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("model", [LLAMA_8B, SMALL])
def test_one_decode_token_streams_every_weight_but_the_embedding_table(model: ModelSpec) -> None:
    graph = build_graph(model, Topology())
    streamed = model.non_embedding_parameters + model.embedding_parameters
    moved = sum(total(graph, quantity, decode(1, 1)) for quantity in BYTES)
    assert moved == pytest.approx(2 * streamed, rel=0.02)


def test_a_mixed_step_streams_the_weights_once() -> None:
    graph = build_graph(LLAMA_8B, Topology())
    mixed = BatchShape(prefill(100).prefill, decode(7, 50).decode)
    once = total(graph, "weight_bytes", decode(1, 50))
    assert total(graph, "weight_bytes", mixed) == pytest.approx(once, rel=1e-12)


def test_one_token_streams_its_top_k_experts_and_many_tokens_all_of_them() -> None:
    graph = build_graph(MOE, Topology())
    index = DRIVERS.index("experts")
    assert graph.drivers(decode(1, 10))[index] == pytest.approx(8)
    assert graph.drivers(decode(4096, 10))[index] == pytest.approx(128)
    two = graph.drivers(decode(2, 10))[index]
    assert two == pytest.approx(128 * (1 - (1 - 8 / 128) ** 2))


def test_decode_reads_the_keys_and_values_of_the_whole_context() -> None:
    graph = build_graph(LLAMA_8B, Topology())
    more = total(graph, "kv_bytes", decode(3, 1001)) - total(graph, "kv_bytes", decode(3, 1))
    assert more == pytest.approx(3 * 1000 * 2 * 8 * 128 * 2 * 32)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tensor_parallelism_divides_the_flops_and_adds_network(ranks: int) -> None:
    alone, split = build_graph(LLAMA_8B, Topology()), build_graph(LLAMA_8B, Topology(tensor_parallel=ranks))
    batch = prefill(512)
    assert total(split, "flops", batch) == pytest.approx(total(alone, "flops", batch) / ranks, rel=0.01)
    assert total(alone, "network_bytes", batch) == 0
    sent = 2 * (ranks - 1) / ranks * 4096 * 2 * 512 * 2 * 32
    assert total(split, "network_bytes", batch) == pytest.approx(sent)


def test_key_heads_are_replicated_when_ranks_outnumber_them() -> None:
    eight, sixteen = (build_graph(LLAMA_8B, Topology(tensor_parallel=ranks)) for ranks in (8, 16))
    batch = decode(1, 1000)
    assert total(eight, "kv_bytes", batch) == total(sixteen, "kv_bytes", batch)


def test_expert_parallel_ranks_share_experts_and_exchange_tokens() -> None:
    alone = build_graph(MOE, Topology())
    spread = build_graph(MOE, Topology(data_parallel=4, expert_parallel=True))
    batch = decode(4096, 10)
    experts = [kernel.kind is KernelKind.EXPERT for kernel in alone.kernels]
    streamed = (alone.coefficients("weight_bytes") @ alone.drivers(batch))[experts].sum()
    kinds = [kernel.kind is KernelKind.EXPERT for kernel in spread.kernels]
    shard = (spread.coefficients("weight_bytes") @ spread.drivers(batch))[kinds].sum()
    assert shard == pytest.approx(streamed / 4, rel=1e-6)
    assert total(spread, "network_bytes", batch) > 0


def test_pipeline_stages_hand_over_the_hidden_state() -> None:
    graph = build_graph(LLAMA_8B, Topology(pipeline_parallel=3))
    assert total(graph, "network_bytes", prefill(10)) == 2 * 10 * 4096 * 2


def test_a_pooling_model_has_neither_head_nor_sampler() -> None:
    names = {kernel.name for kernel in build_graph(replace(LLAMA_8B, has_lm_head=False), Topology()).kernels}
    assert "final_norm" in names
    assert not names & {"lm_head", "sampler"}


def test_sliding_layers_stop_reading_at_the_window() -> None:
    windowed = build_graph(replace(LLAMA_8B, sliding_window=1024, sliding_layers=32), Topology())
    at, beyond = (total(windowed, "kv_bytes", decode(4, context)) for context in (2000, 9000))
    assert at == beyond
    full = build_graph(LLAMA_8B, Topology())
    assert total(windowed, "kv_bytes", decode(4, 500)) == total(full, "kv_bytes", decode(4, 500))


@given(st.integers(1, 50), st.integers(1, 5000), st.integers(1, 4096))
def test_a_window_never_reads_more_than_the_context(requests: int, context: int, window: int) -> None:
    phase = decode(requests, context).decode
    pairs, kv = windowed_reads(phase, window)
    assert pairs <= phase.pairs
    assert kv <= phase.kv_tokens
    assert pairs == requests * min(context, window)


def test_a_batch_without_tokens_drives_nothing() -> None:
    assert not any(build_graph(MOE, Topology()).drivers(BatchShape()))


@pytest.mark.parametrize(
    ("model", "topology"),
    [
        (LLAMA_8B, {}),
        (MOE, {"tensor_parallel": 2}),
        (replace(LLAMA_8B, sliding_window=1024, sliding_layers=16), {"pipeline_parallel": 2}),
        (replace(MOE, moe_layers=40, shared_intermediate=768), {"data_parallel": 2, "expert_parallel": True}),
    ],
)
def test_edges_join_every_kernel_from_the_embedding_to_the_sampler(model: ModelSpec, topology: dict[str, Any]) -> None:
    graph = build_graph(model, Topology(**topology))
    names = [kernel.name for kernel in graph.kernels]
    assert len(set(names)) == len(names)
    reached = {"embedding"}
    for _ in names:
        reached |= {target for source, target in graph.edges if source in reached}
    assert reached == set(names)
