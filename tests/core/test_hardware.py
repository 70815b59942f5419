import json
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.core import hardware
from llmco2_vllm.core.hardware import (
    Topology,
    _catalog,
    cpu_power,
    detect_host,
    device_by_name,
    device_names,
    find_device,
    host_cache_path,
    parse_cpuinfo,
)

CASCADE_LAKE = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz
stepping\t: 7
cpu MHz\t\t: 2499.998
physical id\t: 0
core id\t\t: 0
flags\t\t: sse2 avx2 avx512f avx512_vnni

processor\t: 1
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz
stepping\t: 7
cpu MHz\t\t: 2499.998
physical id\t: 0
core id\t\t: 0
flags\t\t: sse2 avx2 avx512f avx512_vnni
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return host_cache_path()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the measurement; records the thread count of each."""
    seen: list[int] = []

    def measure(threads: int) -> float:
        seen.append(threads)
        return 1.25e10

    monkeypatch.setattr(hardware, "measure_copy_bandwidth", measure)
    return seen


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-sxm"),
        ("Tesla V100-PCIE-32GB", "v100-pcie"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_driver_names_are_recognised(reported: str, name: str) -> None:
    device = find_device(reported)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize(
    "reported",
    ["NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", ""],
)
def test_a_gpu_that_is_not_listed_is_not_taken_for_another(reported: str) -> None:
    assert find_device(reported) is None


def test_an_unknown_device_is_an_error_that_lists_the_allowed_names() -> None:
    with pytest.raises(ValueError, match="h100-sxm") as error:
        device_by_name("abacus")
    assert all(name in str(error.value) for name in ("abacus", "cpu", *device_names()))


@pytest.mark.parametrize("name", device_names())
def test_every_catalog_row_is_found_by_its_name_and_has_a_source_and_dense_peaks(name: str) -> None:
    device = device_by_name(name)
    row = next(row for row in hardware._catalog()["gpu"] if row["name"] == name)
    assert device.name == name
    assert device.source
    row = next(row for row in _catalog()["gpu"] if row["name"] == name)
    assert 2015 <= row["year"] <= 2026 and row["idle_source"] and isinstance(row["verified"], bool)
    assert row["dense"] is True
    assert 0 < device.idle_power_watts < device.power_limit_watts
    assert device.memory_bandwidth_bytes_per_second > 1e11
    assert device.peak_flops("fp32") <= device.peak_flops("fp16")


def test_a_dtype_without_units_is_computed_as_the_next_wider_one() -> None:
    v100, a100, h100 = (device_by_name(name) for name in ("v100-sxm", "a100-80", "h100-sxm"))
    assert v100.peak_flops("bf16") == v100.peak_flops("fp16") == 125e12
    assert a100.peak_flops("fp8") == a100.peak_flops("bf16") == 312e12
    assert h100.peak_flops("fp8") == pytest.approx(2 * h100.peak_flops("bf16"), rel=1e-3)


def test_cpuinfo_tells_microarchitecture_power_and_physical_cores() -> None:
    facts = parse_cpuinfo(CASCADE_LAKE, [0, 1])
    assert cpu_power(facts)[:3] == ("cascade-lake", 0.6389, 3.642)
    assert facts["physical_cores"] == 1
    assert facts["frequency_hertz"] == pytest.approx(2.5e9, rel=1e-6)


def test_a_cpu_that_is_not_listed_gets_the_provider_average() -> None:
    facts = parse_cpuinfo("processor : 0\nmodel name : Unheard Of\n", [0])
    assert cpu_power(facts)[:3] == (None, 0.74, 3.5)
    assert facts["frequency_hertz"] is None


def host(**changes: Any) -> hardware.HostSpec:
    known: dict[str, Any] = {
        "model_name": "test",
        "microarchitecture": None,
        "cores": 4,
        "physical_cores": 4,
        "frequency_hertz": 2e9,
        "flags": frozenset({"avx2", "avx512f"}),
        "memory_bytes": 16e9,
        "memory_bandwidth_bytes_per_second": 2e10,
        "min_watts_per_core": 0.74,
        "max_watts_per_core": 3.5,
        "source": "test",
    }
    return hardware.HostSpec(**{**known, **changes})


def test_bf16_without_its_own_instructions_runs_at_a_sixteenth_of_the_fp32_rate() -> None:
    plain = host().device()
    assert 16 * plain.peak_flops("bf16") == plain.peak_flops("fp32") == 4 * 2e9 * 64
    fast = host(flags=frozenset({"avx512f", "avx512_bf16"})).device()
    assert fast.peak_flops("bf16") == 2 * fast.peak_flops("fp32")
    tiles = host(flags=frozenset({"avx512f", "amx_bf16", "amx_int8"})).device()
    assert tiles.peak_flops("bf16") == 16 * tiles.peak_flops("fp32")


def test_a_working_host_draws_the_published_watts_per_core_and_its_memory() -> None:
    device = host().device()
    assert device.power_limit_watts == pytest.approx(4 * 3.5 + 16 * 0.392)
    assert device.idle_power_watts == pytest.approx(4 * 0.74 + 16 * 0.392)


def test_bandwidth_is_measured_once_then_read_from_the_cache(cache: Path, copies: list[int]) -> None:
    first, second = detect_host(), detect_host()
    assert first == second
    assert len(copies) == 1
    assert list(json.loads(cache.read_text()).values()) == [1.25e10]


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]", '{"x": {}}'])
def test_a_corrupt_cache_only_means_measuring_again(cache: Path, copies: list[int], content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert detect_host().memory_bandwidth_bytes_per_second == 1.25e10
    assert len(copies) == 1


def test_a_cached_value_that_is_no_bandwidth_is_replaced(cache: Path, copies: list[int]) -> None:
    detect_host()
    key = next(iter(json.loads(cache.read_text())))
    for wrong in (-1.0, "fast", None):
        cache.write_text(json.dumps({key: wrong, "other host": 5.0}))
        assert detect_host().memory_bandwidth_bytes_per_second == 1.25e10
    assert json.loads(cache.read_text()) == {key: 1.25e10, "other host": 5.0}
    assert len(copies) == 4


def test_a_cache_that_cannot_be_written_only_means_measuring_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert detect_host().cores >= 1
    assert detect_host().cores >= 1
    assert len(copies) == 2


def test_the_copy_measures_a_bandwidth_a_machine_can_have() -> None:
    assert 1e8 < hardware.measure_copy_bandwidth(2) < 1e13


def test_this_host_is_a_device(cache: Path, copies: list[int]) -> None:
    device = device_by_name("cpu")
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert device.cores >= 1
    assert device.peak_flops("bf16") > 0


def test_a_topology_counts_the_devices_of_its_engine() -> None:
    topology = Topology(tensor_parallel=4, pipeline_parallel=2, data_parallel=3, expert_parallel=True)
    assert topology.engine_devices == 8
    assert topology.expert_ranks == 12
    with pytest.raises(ValueError, match="tensor_parallel"):
        Topology(tensor_parallel=0)
