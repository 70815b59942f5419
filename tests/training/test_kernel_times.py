"""Kernel times as labels: read from profiles, learned from, and left out where they would tell of what is held out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from llmco2_vllm.training.fit import Labels  # noqa: E402
from llmco2_vllm.training.kernel_times import ALL_REDUCE, KERNELS, KernelTimes, read_kernel_times, without  # noqa: E402
from llmco2_vllm.training.network import KernelGraphNetwork  # noqa: E402

SIZES = {
    "n_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_expanded_embd": 14336, "vocab_size": 32000, "use_gated_mlp": True,
}  # fmt: skip


def write_profiles(folder: Path) -> tuple[Path, Path]:
    kernels, network = folder / "kernels.csv", folder / "network.csv"
    with kernels.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["gpu", "model", "num_tensor_parallel_workers", "num_tokens", *SIZES, "op", "median_ms"])
        for gpu in ("a100", "h100", "a40"):
            for ranks in (1, 2):
                for tokens in (1, 64, 4096):
                    for place, name in enumerate([*KERNELS, "add"]):
                        rows.writerow([gpu, "m", ranks, tokens, *SIZES.values(), name, 0.01 * (place + 1)])
    with network.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["cluster", "collective", "num_workers", "size", "devices_per_node", "max_devices_per_node", "median_ms"]
        )
        for size, milliseconds in ((8192, 0.02), (8192 * 4096, 20.0)):
            rows.writerow(["h100_dgx", "all_reduce", 2, size, 2, 8, milliseconds])
    return kernels, network


@pytest.fixture
def times(tmp_path: Path) -> list[KernelTimes]:
    return read_kernel_times(*write_profiles(tmp_path))


def test_a_profile_labels_the_kernels_of_a_graph_at_a_few_points(times: list[KernelTimes]) -> None:
    assert len(times) == 2 * 2 * 3  # the A40 is not in the catalog
    assert {item.device for item in times} == {"a100-80", "h100-sxm"}
    for item in times:
        names = {kernel.name for kernel in item.features.graph.kernels}
        assert set(item.seconds) - {ALL_REDUCE} == set(KERNELS.values()) <= names
        assert item.seconds["qkv_projection"] == pytest.approx(1e-5)


def test_an_all_reduce_is_read_at_the_size_of_the_hidden_state(times: list[KernelTimes]) -> None:
    found = {item.batch.tokens: item.seconds[ALL_REDUCE] for item in times if ALL_REDUCE in item.seconds}
    assert found[1] == pytest.approx(2e-5) and found[4096] == pytest.approx(2e-2)
    assert found[64] == pytest.approx((found[1] * found[4096]) ** 0.5)  # half way in the logs
    assert all(item.features.topology.tensor_parallel == 2 for item in times if ALL_REDUCE in item.seconds)


def test_labels_of_held_out_layers_and_devices_are_not_learned_from(times: list[KernelTimes]) -> None:
    shape = times[0].shape
    assert not any(without(times, {shape}, set()))
    kept = without(times, set(), {"h100-sxm"})
    assert [item.device != "h100-sxm" for item in times] == kept and any(kept)
    assert all(without(times, {shape._replace(hidden=1)}, {"b200"}))


def test_learning_from_labels_brings_the_kernels_nearer_to_them(times: list[KernelTimes]) -> None:
    network = KernelGraphNetwork(("default",))
    labels = Labels(times, network.devices)
    before = labels.errors(network).square().mean()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        labels.errors(network).square().mean().backward()
        optimizer.step()
    assert labels.errors(network).square().mean() < 0.5 * before
