"""Tables become observations: targets, mean steps, architectures, and bad rows that are told."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.training.configs import ModelSizes, huggingface_config, model_spec, shipped_sizes
from llmco2_vllm.training.dataset import BadRowsError, Observation, read, read_kernels, read_network
from llmco2_vllm.training.observation import POSITION_RATIO, Request, generation_mix, serving_mix
from llmco2_vllm.training.sources import PROMPT_TOKENS
from tests.training.tables import CONFIGS, DENSE, EXPERTS, LLMCO2, SPLITWISE, V2, V3, write


def one(path: Path, base: dict[str, Any], **change: Any) -> Observation:
    dataset = read(write(path / "table.csv", base, change), CONFIGS)
    assert len(dataset) == 1
    return dataset.observations[0]


def test_a_v3_row_gives_step_time_and_power_of_one_device(tmp_path: Path) -> None:
    found = one(tmp_path, V3, n_gpu=2, tp=2, power_w=800)
    assert (found.source, found.era, found.line, found.workload) == ("mlenergy-v3", "2025", 2, "gpqa")
    assert found.step_seconds == pytest.approx(31.5 / 3150)
    assert found.decode_step_seconds == pytest.approx(9.5e-3)
    assert found.power_watts == pytest.approx(400)
    assert found.step_energy_joules == pytest.approx(800 * 31.5 / 3150)
    assert found.prefill_seconds is None
    assert found.raw_decode is None
    assert found.device.name == "h100-sxm"
    assert not found.stalled


def test_a_step_more_than_three_decode_steps_long_is_stalled(tmp_path: Path) -> None:
    assert one(tmp_path, V3, itl_med_ms=3.3).stalled
    assert not one(tmp_path, V3, itl_med_ms=3.4).stalled


def test_expert_parallel_rows_split_attention_over_the_same_devices(tmp_path: Path) -> None:
    found = one(tmp_path, V3, model="acme/Experts-3B", n_gpu=4, ep=4)
    assert found.topology == Topology(tensor_parallel=4, expert_parallel=True)
    assert found.decode_batch.decode.sequences == pytest.approx(31.5)


def test_data_parallel_engines_share_the_requests_and_the_experts(tmp_path: Path) -> None:
    found = one(tmp_path, V3, model="acme/Experts-3B", n_gpu=4, ep=4, dp=4)
    assert found.topology == Topology(tensor_parallel=1, data_parallel=4, expert_parallel=True)
    assert found.devices == 4
    assert found.decode_batch.decode.sequences == pytest.approx(31.5 / 4)
    assert found.power_watts == pytest.approx(100)


def test_pipeline_stages_share_requests_and_the_energy_of_a_step(tmp_path: Path) -> None:
    alone, staged = one(tmp_path, V2, tp=2), one(tmp_path, V2, tp=2, pp=2)
    assert staged.decode_batch.decode.sequences == pytest.approx(alone.decode_batch.decode.sequences / 2)
    assert staged.step_seconds == alone.step_seconds
    assert staged.step_energy_joules == pytest.approx((alone.step_energy_joules or 0) / 2)


def test_a_v2_row_has_the_power_that_its_joules_and_throughput_imply(tmp_path: Path) -> None:
    found = one(tmp_path, V2)
    assert (found.source, found.era, found.device.name) == ("mlenergy-v2", "2024", "a100-40")
    assert found.power_watts == pytest.approx(90 / 300 * 1000)
    assert found.step_seconds == pytest.approx(0.06)
    assert found.decode_step_seconds == pytest.approx(0.05)


def test_a_splitwise_row_gives_latencies_by_phase_and_a_share_of_the_power_limit(tmp_path: Path) -> None:
    found = one(tmp_path, SPLITWISE)
    assert (found.source, found.era, found.device.name) == ("splitwise", "2023", "a100-80")
    assert found.prefill_seconds == pytest.approx(0.4)
    assert found.decode_step_seconds == pytest.approx(0.045)
    assert (found.power_watts, found.peak_power_watts) == (pytest.approx(240), pytest.approx(360))
    assert found.step_seconds is None
    assert found.step_energy_joules is None
    assert found.prefill_batch.prefill.tokens == 4 * 512
    assert found.decode_batch.decode.sequences == 4


def test_power_that_was_not_measured_is_none(tmp_path: Path) -> None:
    assert one(tmp_path, SPLITWISE, avg_power_frac=0, peak_power_frac=0).power_watts is None
    assert one(tmp_path, SPLITWISE, avg_power_frac=0.18, prompt_size=8192).power_watts is None
    assert one(tmp_path, SPLITWISE, avg_power_frac=0.5, prompt_size=8192).power_watts == pytest.approx(200)


def test_rows_known_to_be_no_measurement_are_left_out_and_told(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", SPLITWISE, {"batch_size": 64, "tensor_parallel": 2}, {})
    dataset = read(table)
    assert [(row.line, row.column) for row in dataset.left_out] == [(2, "token_ms")]
    assert [observation.line for observation in dataset.observations] == [3]
    assert dataset.skipped == ()


def test_released_llmco2_rows_have_raw_labels_and_no_joules(tmp_path: Path) -> None:
    found = one(tmp_path, LLMCO2)
    assert (found.source, found.fold) == ("llmco2-a100", "train")
    assert (found.raw_prefill, found.raw_decode) == (0.04, 1.1)
    assert found.step_energy_joules is None
    assert found.power_watts is None


def test_shares_of_a_mix_add_up_and_every_request_is_prefilled_once() -> None:
    for requests, output in ((8.0, 600.0), (500.0, 250.0), (64.0, 64.0)):
        mix = serving_mix(requests, Request(200.0, output))
        assert sum(share for share, _ in mix) == pytest.approx(1)
        prefilled = sum(share * batch.prefill.sequences for share, batch in mix)
        assert prefilled == pytest.approx(requests / output)
        assert all(batch.decode.tokens == requests for _, batch in mix)
        assert all(batch.decode.kv_tokens == requests * (200 + POSITION_RATIO * output) for _, batch in mix)


def test_a_prompt_is_never_prefilled_in_parts() -> None:
    (pure, decode), (mixed, both) = serving_mix(8.0, Request(200.0, 600.0))
    assert pure == pytest.approx(1 - 8 / 600)
    assert mixed == pytest.approx(8 / 600)
    assert not decode.prefill.tokens
    assert both.prefill.tokens == pytest.approx(200)
    ((share, crowded),) = serving_mix(900.0, Request(200.0, 300.0))
    assert (share, crowded.prefill.tokens) == (1.0, pytest.approx(600))


def test_a_generation_decodes_all_but_the_first_token() -> None:
    (first, prefill), (rest, decode) = generation_mix(2, Request(100, 50))
    assert (first, rest) == (pytest.approx(1 / 50), pytest.approx(49 / 50))
    assert prefill.prefill.pairs == 2 * 100 * 101 / 2
    assert decode.decode.kv_tokens == 2 * 125
    assert generation_mix(2, Request(100, 1)) == ((1.0, prefill),)


def test_vision_workloads_are_flagged_and_count_encoder_tokens(tmp_path: Path) -> None:
    found = one(tmp_path, V3, task="image-chat")
    assert found.multimodal
    assert 0 < found.prefill_batch.encoder_tokens < found.prefill_batch.prefill.tokens
    assert not one(tmp_path, V3).multimodal
    assert PROMPT_TOKENS["lm-arena-chat"] == 200


def test_checkpoints_and_precisions_of_one_architecture_share_its_key(tmp_path: Path) -> None:
    names = [{"model": name} for name in ("acme/Experts-3B", "acme/Experts-3B-Coder", "acme/Dense-1B")]
    changes = [*names, {"model": "acme/Dense-1B-Chat"}, {"model": "Qwen/Experts-3B-FP8", "precision": "fp8"}]
    found = [o.architecture for o in read(write(tmp_path / "t.csv", V3, *changes), CONFIGS).observations]
    assert found[0] == found[1] == found[4]
    assert found[2] == found[3] != found[0]


def test_fp8_scales_are_per_block_or_per_channel_by_publisher(tmp_path: Path) -> None:
    block = one(tmp_path, V3, model="Qwen/Experts-3B-FP8", precision="fp8")
    channel = one(tmp_path, V3, model="meta-llama/Dense-1B-FP8", precision="fp8")
    assert block.block_quantised
    assert not channel.block_quantised
    assert block.model.weight_bytes == channel.model.weight_bytes == 1.0
    assert channel.model.attention_precision.weight_bytes == 2.0
    assert not one(tmp_path, V3).block_quantised


@pytest.mark.parametrize(
    ("change", "column", "told"),
    [
        ({"model": "acme/Unheard-Of"}, "model", "unknown model"),
        ({"gpu": "Z9000"}, "gpu", "unknown GPU 'Z9000'"),
        ({"power_w": -1}, "power_w", "expected a positive number"),
        ({"power_w": 5000}, "power_w", "5000 W per GPU is not possible"),
        ({"tok_s": "fast"}, "tok_s", "is not a number"),
        ({"tok_s": "inf"}, "tok_s", "is not possible"),
        ({"avg_out_len": ""}, "avg_out_len", "is missing"),
        ({"n_gpu": 3}, "n_gpu", "not possible with the parallel sizes"),
        ({"tp": 1.5}, "tp", "expected a whole number"),
        ({"n_gpu": 2, "ep": 2}, "ep", "has no experts"),
        ({"avg_batch": 90}, "avg_batch", "at most 32 requests"),
        ({"precision": "fp3"}, "precision", "allowed: bfloat16"),
        ({"task": "poetry"}, "task", "allowed: gpqa"),
    ],
)
def test_a_bad_row_is_told_by_line_column_and_reason(
    tmp_path: Path, change: dict[str, Any], column: str, told: str
) -> None:
    table = write(tmp_path / "table.csv", V3, {}, change)
    with pytest.raises(BadRowsError, match=f"line 3, column {column}: .*{told}"):
        read(table, CONFIGS)
    dataset = read(table, CONFIGS, skip_bad=True)
    assert len(dataset) == 1
    assert [(row.line, row.column) for row in dataset.skipped] == [(3, column)]


def test_a_row_with_too_few_fields_is_told(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", V3, {})
    table.write_text(table.read_text() + "gpqa,acme/Dense-1B\n")
    with pytest.raises(BadRowsError, match="line 3, has 2 fields, the header 15"):
        read(table, CONFIGS)


def test_the_first_twenty_bad_rows_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", V3, *[{"gpu": "?"}] * 25)
    with pytest.raises(BadRowsError) as caught:
        read(table, CONFIGS)
    assert "25 bad rows" in str(caught.value)
    assert str(caught.value).count("line ") == 20
    assert "and 5 more" in str(caught.value)
    assert len(caught.value.bad_rows) == 25


def test_an_unknown_header_is_refused_with_the_known_tables(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", {"a": 1, "b": 2}, {})
    with pytest.raises(ValueError, match=r"fits no known table.*mlenergy-v3.*llmco2-a100"):
        read(table)
    del (columns := dict(V3))["power_w"]
    with pytest.raises(ValueError, match="column power_w: is missing"):
        read(write(tmp_path / "short.csv", columns, {}))


def test_a_gzipped_table_reads_the_same(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", V3, {}, {"task": "lm-arena-chat"})
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes()))
    assert read(packed, CONFIGS) == read(table, CONFIGS)


def test_sizes_beside_the_table_are_found(tmp_path: Path) -> None:
    (tmp_path / "model_configs.json").write_text(json.dumps(CONFIGS))
    table = write(tmp_path / "table.csv", V3, {})
    assert read(table) == read(table, tmp_path / "model_configs.json") == read(table, CONFIGS)


def test_a_faulty_entry_is_a_bad_row_of_its_model(tmp_path: Path) -> None:
    for entry in ({**DENSE, "layers": "many"}, {"layers": 3}, {**EXPERTS, "moe_layers": 3}):
        with pytest.raises(BadRowsError, match="line 2, column model"):
            read(write(tmp_path / "table.csv", V3, {}), {"acme/Dense-1B": entry})


def test_an_entry_may_be_a_hugging_face_config() -> None:
    config = huggingface_config(DENSE)
    assert model_spec("a", config, "bfloat16") == model_spec("a", DENSE, "bfloat16")


@pytest.mark.parametrize("name", sorted(shipped_sizes()))
def test_shipped_sizes_add_up_to_the_published_parameters(name: str) -> None:
    entry = shipped_sizes()[name]
    vision = 0.31e9 if "vision" in entry else 0.0
    parameters = ModelSizes().spec(name, "bfloat16").parameters + vision
    assert parameters == pytest.approx(1e9 * entry["published_params_b"], rel=0.01)


def test_kernel_profiles_keep_repeated_points_and_are_in_seconds(tmp_path: Path) -> None:
    columns = "gpu,model,num_tensor_parallel_workers,num_tokens,n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size"
    row = "h100,acme/one,2,64,8,8,1024,4096,32000,False,emb,0.05\n"
    path = tmp_path / "kernels.csv.gz"
    path.write_bytes(gzip.compress(f"{columns},use_gated_mlp,op,median_ms\n{row}{row}".encode()))
    found = read_kernels(path)
    assert found.shape == (2,)
    assert found["duration_seconds"] == pytest.approx(5e-5)
    assert found["kernel"].tolist() == ["emb", "emb"]
    assert not found["gated_mlp"].any()


def test_network_profiles_are_in_bytes_and_seconds(tmp_path: Path) -> None:
    path = tmp_path / "network.csv"
    columns = "cluster,file,num_workers,size,collective,devices_per_node,max_devices_per_node,op,median_ms"
    path.write_text(f"{columns}\nh100_dgx,a,8,4096,all_reduce,8,8,all_reduce,0.02\n")
    found = read_network(path)
    assert (found["ranks"][0], found["size_bytes"][0], found["collective"][0]) == (8, 4096, "all_reduce")
    assert found["duration_seconds"][0] == pytest.approx(2e-5)
    path.write_text(f"{columns}\nh100_dgx,a,8,4096,all_reduce,8,8,all_reduce,0\n")
    with pytest.raises(ValueError, match="line 2, column median_ms: expected positive"):
        read_network(path)
    path.write_text("cluster\nx\n")
    with pytest.raises(ValueError, match="column collective is missing"):
        read_network(path)


@pytest.mark.skipif("LLMCO2_DATA" not in os.environ, reason="LLMCO2_DATA names no folder with the public tables")
@pytest.mark.parametrize("name", ["mlenergy_v3.csv", "mlenergy_v2.csv", "splitwise_latency.csv", "llmco2_a100.csv"])
def test_every_row_of_the_public_tables_is_read(name: str) -> None:
    path = Path(os.environ["LLMCO2_DATA"]) / name
    dataset = read(path)
    with path.open(encoding="utf-8") as file:
        assert len(dataset) + len(dataset.left_out) == sum(1 for _ in csv.DictReader(file))
    assert not dataset.skipped
