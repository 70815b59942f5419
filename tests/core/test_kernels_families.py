"""Laws of the kernels of latent attention, state space, chunked attention and experts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.kernels import Kernel, KernelGraph, KernelKind, build_graph, windowed_reads
from llmco2_vllm.core.model import ModelSpec
from tests.core.published import DEEPSEEK, FP8, GPT_OSS_20B, LLAMA_8B, MAVERICK, NEMOTRON, PUBLISHED, QWEN3_30B, SCOUT

FAMILIES = {
    "dense": LLAMA_8B,
    "mixture": QWEN3_30B,
    "sliding": GPT_OSS_20B,
    "chunked": SCOUT,
    "latent": {**DEEPSEEK, **FP8},
    "hybrid": NEMOTRON,
}
MODELS = {name: ModelSpec.from_config(config) for name, config in FAMILIES.items()}
QUANTITIES = ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "network_bytes")
MEMORY = ("weight_bytes", "activation_bytes", "kv_bytes")
LATENT, HYBRID = MODELS["latent"], MODELS["hybrid"]

families = st.sampled_from(sorted(MODELS))
topologies = st.sampled_from([Topology(), Topology(4), Topology(8, 2), Topology(2, 1, 4, True), Topology(2, 1, 4)])
requests = st.tuples(st.integers(0, 20000), st.integers(1, 3000))


def phase_of(rows: list[tuple[int, int]], samples: int = 0) -> PhaseShape:
    """Totals of requests given as (context before, new tokens)."""
    return PhaseShape(
        len(rows),
        sum(new for _, new in rows),
        sum(new * before + new * (new + 1) // 2 for before, new in rows),
        sum(before + new for before, new in rows),
        samples,
    )


def prefill(*rows: tuple[int, int]) -> BatchShape:
    return BatchShape(phase_of(list(rows), len(rows)), EMPTY_PHASE)


def decode(count: int, context: int) -> BatchShape:
    return BatchShape(EMPTY_PHASE, phase_of([(context - 1, 1)] * count, count))


def work(graph: KernelGraph, batch: BatchShape, *quantities: str) -> dict[str, float]:
    """Sum over the quantities by kernel."""
    drivers = np.array(graph.drivers(batch))
    totals = sum(graph.coefficients(quantity) @ drivers for quantity in quantities)
    return dict(zip((kernel.name for kernel in graph.kernels), np.asarray(totals, dtype=float), strict=True))


def kernel(graph: KernelGraph, name: str) -> Kernel:
    return next(kernel for kernel in graph.kernels if kernel.name == name)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_without_tokens_is_no_work(name: str) -> None:
    graph = build_graph(MODELS[name], Topology(4, 2, 2, True))
    assert not any(graph.drivers(BatchShape()))
    assert not any(work(graph, BatchShape(), *QUANTITIES).values())


@pytest.mark.parametrize("name", MODELS)
def test_prefill_takes_two_flops_per_active_parameter_and_token(name: str) -> None:
    model = MODELS[name]
    graph = build_graph(replace(model, has_lm_head=False), Topology())
    tokens = 512
    idle = (model.experts - model.experts_per_token) * model.mlp_matrices * model.hidden * model.moe_intermediate
    active = model.non_embedding_parameters - model.moe_layers * idle
    flops = work(graph, prefill((0, tokens)), "flops")
    mixing = sum(
        flops[node.name] for node in graph.kernels if node.kind in (KernelKind.ATTENTION, KernelKind.STATE_SPACE)
    )
    assert sum(flops.values()) - mixing == pytest.approx(2 * active * tokens, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_one_decode_token_streams_the_weights_it_uses(name: str) -> None:
    model = replace(MODELS[name], weight_bytes=2.0, attention_weight_bytes=None)
    graph = build_graph(model, Topology())
    idle = (model.experts - model.experts_per_token) * model.mlp_matrices * model.hidden * model.moe_intermediate
    norms = (model.attention_layers + model.state_space_layers + model.mlp_layers + 1) * model.hidden
    used = model.non_embedding_parameters - model.moe_layers * idle - norms + model.embedding_parameters
    assert sum(work(graph, decode(1, 1), "weight_bytes").values()) == pytest.approx(2 * used, rel=0.001)


@given(families, topologies, st.lists(requests, min_size=1, max_size=6), requests)
def test_one_more_prefill_is_never_less_work(
    name: str, topology: Topology, rows: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    graph = build_graph(MODELS[name], topology)
    before, after = (work(graph, prefill(*batch), *QUANTITIES) for batch in (rows, [*rows, more]))
    assert all(after[node] >= before[node] for node in before)


@given(families, topologies, st.integers(1, 300), st.integers(1, 30000), st.integers(1, 5000))
def test_longer_contexts_and_more_requests_are_never_less_work(
    name: str, topology: Topology, count: int, context: int, more: int
) -> None:
    graph = build_graph(MODELS[name], topology)
    before = work(graph, decode(count, context), *QUANTITIES)
    longer, wider = (
        work(graph, batch, *QUANTITIES) for batch in (decode(count, context + more), decode(count + 1, context))
    )
    assert all(longer[node] >= before[node] and wider[node] >= before[node] for node in before)


@given(families, st.lists(requests, min_size=1, max_size=4), st.integers(1, 64))
def test_a_mixed_step_is_never_more_work_than_its_phases_apart(
    name: str, rows: list[tuple[int, int]], count: int
) -> None:
    graph = build_graph(MODELS[name], Topology())
    alone, other = prefill(*rows), decode(count, 700)
    together = BatchShape(alone.prefill, other.decode)
    first, second, mixed = (work(graph, batch, *MEMORY) for batch in (alone, other, together))
    assert all(mixed[node] <= (first[node] + second[node]) * (1 + 1e-12) for node in mixed)


@pytest.mark.parametrize("name", ["dense", "mixture", "sliding", "latent"])
def test_more_layers_are_more_work(name: str) -> None:
    model = MODELS[name]
    deeper = replace(model, layers=model.layers + 1, moe_layers=model.moe_layers + (model.moe_layers > 0))
    shallow, deep = (work(build_graph(spec, Topology()), decode(8, 500), *QUANTITIES) for spec in (model, deeper))
    assert sum(deep.values()) > sum(shallow.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_together_do_the_work_of_one_and_that_of_the_replicated_kernels_again(name: str, ranks: int) -> None:
    replicated = {"embedding", "input_norm", "post_norm", "final_norm", "router", "sampler", "latent_norm",
                  "q_a_projection", "kv_a_projection", "rope_and_kv_write"}  # fmt: skip
    batch = BatchShape(prefill((0, 700)).prefill, decode(30, 900).decode)
    model = replace(MODELS[name], kv_heads=8)  # at least as many as ranks, else key heads are replicated too
    alone, split = (work(build_graph(model, Topology(count)), batch, "flops") for count in (1, ranks))
    for node, flops in alone.items():
        if node in replicated - {"rope_and_kv_write"}:
            assert split[node] == flops
        elif node not in replicated:
            assert split[node] * ranks == pytest.approx(flops)


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_ranks_repeat_everything_but_the_experts(name: str) -> None:
    batch = decode(64, 900)
    alone, spread = (
        work(build_graph(MODELS[name], Topology(2, 1, ranks)), batch, *MEMORY, "flops") for ranks in (1, 4)
    )
    for node, amount in alone.items():
        if not node.startswith("expert_"):
            assert spread[node] == amount


def test_the_latent_cache_is_read_whole_on_every_rank() -> None:
    batch = decode(16, 2000)
    reads = [
        work(build_graph(LATENT, Topology(ranks)), batch, "kv_bytes")["decode_attention_latent"] for ranks in (1, 2, 8)
    ]
    assert reads[0] == reads[1] == reads[2] == 16 * 2000 * (512 + 64) * 2 * 61


def test_latent_attention_has_its_published_flops_in_both_forms() -> None:
    graph = build_graph(LATENT, Topology(8))
    heads, pairs = 16, 100 * 101 / 2
    first = work(graph, prefill((0, 100)), "flops")
    assert first["prefill_attention_latent"] == pytest.approx(2 * heads * (128 + 64 + 128) * pairs * 61)
    assert first["decode_attention_latent"] == first["query_absorption"] == 0
    later = work(graph, decode(3, 1000), "flops")
    assert later["decode_attention_latent"] == pytest.approx(2 * heads * (512 + 64 + 512) * 3000 * 61)
    assert later["query_absorption"] + later["value_absorption"] == pytest.approx(2 * heads * 512 * 256 * 3 * 61)
    assert later["kv_b_projection"] == later["prefill_attention_latent"] == 0


def test_prefill_expands_the_latents_of_its_prefix_again() -> None:
    graph = build_graph(LATENT, Topology())
    fresh, behind = (work(graph, prefill((before, 500)), "flops")["kv_b_projection"] for before in (0, 1500))
    assert behind == 4 * fresh


def test_a_phase_streams_only_the_expansion_weights_that_it_uses() -> None:
    graph = build_graph(LATENT, Topology())
    one, many = (work(graph, batch, "weight_bytes") for batch in (prefill((0, 50)), decode(5, 50)))
    assert one["kv_b_projection"] > 0 == one["query_absorption"] == one["value_absorption"]
    assert many["kv_b_projection"] == 0 < many["query_absorption"] == many["value_absorption"]


def test_a_latent_query_without_a_rank_is_projected_at_once() -> None:
    names = {
        node.name for node in build_graph(ModelSpec.from_config({**DEEPSEEK, "q_lora_rank": None}), Topology()).kernels
    }
    assert "q_projection" in names
    assert not names & {"q_a_projection", "q_b_projection", "qkv_projection"}


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_recurrent_state_is_read_and_written_once_per_sequence_whatever_the_context(ranks: int) -> None:
    graph = build_graph(HYBRID, Topology(ranks))
    state = 128 * 80 * 128 * 4 / ranks * 27
    short, long = (work(graph, decode(5, context), "kv_bytes") for context in (10, 10000))
    assert short["decode_state_space_update"] == long["decode_state_space_update"] == 2 * 5 * state
    assert work(graph, prefill((0, 10), (0, 4000)), "kv_bytes")["prefill_state_space_scan"] == 2 * 2 * state


def test_a_hybrid_repeats_each_kernel_by_the_layers_of_its_kind() -> None:
    graph = build_graph(HYBRID, Topology(2))
    repeats = {name: kernel(graph, name).repeat for name in (
        "input_norm", "qkv_projection", "state_space_in_projection", "post_norm", "gate_up_projection",
        "attention_all_reduce", "state_space_all_reduce", "mlp_all_reduce",
    )}  # fmt: skip
    assert list(repeats.values()) == [31, 4, 27, 25, 25, 4, 27, 25]
    up = kernel(graph, "gate_up_projection")
    assert (up.rows, up.columns) == (4480, 15680 / 2)


def chunk_pairs(before: int, new: int, chunk: int) -> int:
    return sum(position % chunk + 1 for position in range(before, before + new))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 400)), min_size=1, max_size=4), st.integers(1, 300))
def test_chunked_reads_bound_what_the_chunks_hold(rows: list[tuple[int, int]], chunk: int) -> None:
    pairs, kv = windowed_reads(phase_of(rows), chunk, chunked=True)
    assert pairs >= sum(chunk_pairs(before, new, chunk) for before, new in rows) - 1e-6
    assert pairs <= windowed_reads(phase_of(rows), chunk)[0]
    assert kv <= phase_of(rows).kv_tokens


@given(st.integers(1, 60), st.integers(1, 50))
def test_chunked_reads_are_exact_within_a_chunk_and_near_it_over_many(tokens: int, chunks: int) -> None:
    inside, _ = windowed_reads(phase_of([(0, tokens)]), 60, chunked=True)
    assert inside == chunk_pairs(0, tokens, 60)
    many, _ = windowed_reads(phase_of([(0, 60 * chunks)]), 60, chunked=True)
    assert many <= chunk_pairs(0, 60 * chunks, 60) * (1 + 0.25 / chunks)


def test_chunked_layers_stop_reading_at_their_chunk() -> None:
    graph = build_graph(MODELS["chunked"], Topology())
    at, beyond = (work(graph, decode(4, context), "kv_bytes") for context in (9000, 90000))
    assert at["decode_attention_sliding"] == beyond["decode_attention_sliding"]
    assert at["decode_attention_full"] < beyond["decode_attention_full"]


def test_experts_split_by_width_get_all_tokens_of_all_engines() -> None:
    alone, split = (build_graph(MODELS["mixture"], Topology(2, 1, ranks)) for ranks in (1, 4))
    one, four = kernel(alone, "expert_gate_up"), kernel(split, "expert_gate_up")
    assert (one.rows, four.rows, four.columns) == (2048, 2048, one.columns / 4)
    batch = decode(1000, 100)
    assert work(split, batch, "flops")["expert_down"] == work(alone, batch, "flops")["expert_down"]
    assert work(split, batch, "network_bytes")["expert_all_to_all"] == 2 * 3 * 2048 * 2 * 1000 * 48


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_and_columns_are_those_of_the_streamed_matrix(name: str, ranks: int) -> None:
    model = replace(MODELS[name], weight_bytes=1.0, attention_weight_bytes=None, activation_bytes=1.0)
    for node in build_graph(model, Topology(ranks)).kernels:
        if node.kind in (KernelKind.LINEAR, KernelKind.EXPERT):
            assert list(node.weight_bytes.values()) == [node.rows * node.columns]
        else:
            assert node.rows == node.columns == 0


def test_a_kernel_names_the_dtype_of_its_products() -> None:
    dtypes = {node.name: node.dtype for node in build_graph(LATENT, Topology(2)).kernels}
    assert dtypes["q_b_projection"] == dtypes["expert_down"] == dtypes["kv_b_projection"] == "fp8"
    plain = ("router", "lm_head", "decode_attention_latent", "query_absorption", "input_norm", "mlp_all_reduce")
    assert {dtypes[name] for name in plain} == {"bf16"}
    oss = {node.name: node for node in build_graph(MODELS["sliding"], Topology()).kernels}
    assert oss["qkv_projection"].weight_bytes["step"] == 2880 * 5120 * 2
    assert oss["expert_down"].weight_bytes["experts"] == 2880 * 2880 * 0.53125


@pytest.mark.parametrize("topology", [{}, {"tensor_parallel": 4, "pipeline_parallel": 2, "data_parallel": 2}])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_kernel_of_a_published_model_lies_between_embedding_and_sampler(
    name: str, topology: dict[str, Any]
) -> None:
    graph = build_graph(ModelSpec.from_config(PUBLISHED[name][0]), Topology(**topology))
    names = [node.name for node in graph.kernels]
    assert len(set(names)) == len(names)
    onward, back = {"embedding"}, {"sampler"}
    for _ in names:
        onward |= {target for source, target in graph.edges if source in onward}
        back |= {source for source, target in graph.edges if target in back}
    assert onward == back == set(names)


def test_edges_are_data_flow_and_never_join_rivals() -> None:
    edges = set(build_graph(ModelSpec.from_config(MAVERICK), Topology(4)).edges)
    assert {("post_norm", "router"), ("router", "expert_gate_up"), ("post_norm", "shared_gate_up")} <= edges
    assert not edges & {
        ("router", "activation"),
        ("gate_up_projection", "expert_gate_up"),
        ("post_norm", "mlp_all_reduce"),
    }
    latent = set(build_graph(LATENT, Topology()).edges)
    assert {("latent_norm", "q_b_projection"), ("kv_b_projection", "prefill_attention_latent")} <= latent
    hybrid = set(build_graph(HYBRID, Topology()).edges)
    assert ("decode_state_space_update", "state_space_norm") in hybrid
    assert ("qkv_projection", "state_space_convolution") not in hybrid
