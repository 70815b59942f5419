"""Devices a step runs on: dense peaks, bandwidths and power of GPUs and of the CPU host, and the parallel layout.

The catalog is ``data/devices.toml``, a source per row. Nothing here imports a GPU library.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from llmco2_vllm.core.units import BYTES_PER_KIBIBYTE, giga, kwh_per_hour_to_watts, mega, tera

# FP32 FLOPs per cycle and core: lanes x 2 (multiply, add) x fused multiply-add ports.
# AVX-512: 16 x 2 x 2; AVX2 with FMA: 8 x 2 x 2; NEON/ASIMD: 4 x 2 x 2; SSE: 4 x 2, separate add and multiply.
# Source: Intel 64 and IA-32 Architectures Optimization Reference Manual (2023), microarchitecture chapters;
# Xeons with a single AVX-512 port reach half of it.
_FP32_FLOPS_PER_CYCLE = {"avx512f": 64.0, "avx2": 32.0, "asimd": 16.0, "sse2": 8.0}
# Reduced precision per cycle and core. AMX: 16 x 16 tile x 64 bytes per 16 cycles, that is 1024 BF16 or
# 2048 INT8 operations (Intel, "Accelerate AI workloads with Intel AMX", 2022); AVX512_BF16 and VNNI: two and four
# times the FP32 lanes.
_BF16_FLOPS_PER_CYCLE = {"amx_bf16": 1024.0, "avx512_bf16": 128.0}
# Without such units every BF16 operand is widened first. Own measurement, 2026, one host: linear layers of 576 x 1536
# in PyTorch 2.13 on two Cascade Lake cores, 32 to 512 rows: 12 to 21 GFLOP/s in BF16, 9 to 63 in FP32, of 320.
_EMULATED_BF16_RATIO = 1 / 16
_INT8_FLOPS_PER_CYCLE = {"amx_int8": 2048.0, "avx512_vnni": 256.0, "avx_vnni": 128.0}
# Used when neither /proc/cpuinfo nor the model name tells a frequency.
_FALLBACK_FREQUENCY_HERTZ = giga(2.5)
# Twice this is touched: more than the last-level cache a virtual machine usually sees, little enough to be quick.
_COPY_BYTES = 64 * 1024 * 1024
_COPY_REPEATS = 3
# The order in which a dtype the device has no units for is computed instead.
_COMPUTED_AS = {"fp8": "bf16", "int8": "bf16", "fp4": "fp8", "bf16": "fp16", "fp16": "fp32"}


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, or the CPU host as a whole.

    peak_flops_per_second: DENSE peak by dtype (bf16, fp16, fp8, int8, tf32, fp32, fp4).
    link_bytes_per_second: one direction of the device's fast link; None when not known.
    idle_power_watts, power_limit_watts: without work, and with all units working.
    cores: CPU cores in use; 0 for a GPU. verified: the figures were compared with the source.
    """

    name: str
    kind: str
    peak_flops_per_second: Mapping[str, float]
    memory_bandwidth_bytes_per_second: float
    memory_bytes: float
    power_limit_watts: float
    idle_power_watts: float
    link_bytes_per_second: float | None = None
    cores: int = 0
    source: str = ""
    verified: bool = False

    def peak_flops(self, dtype: str) -> float:
        """Dense FLOP/s for ``dtype``; a dtype without units runs as the next wider one. KeyError for no dtype."""
        while dtype not in self.peak_flops_per_second:
            dtype = _COMPUTED_AS[dtype]
        return self.peak_flops_per_second[dtype]


@dataclass(frozen=True)
class Topology:
    """How one model is spread over devices. Sizes are counts of ranks."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; allowed: 1 or more")

    @property
    def engine_devices(self) -> int:
        """Devices that one engine (one data-parallel rank) drives."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def expert_ranks(self) -> int:
        """Devices of one pipeline stage over which the experts are spread."""
        return self.tensor_parallel * (self.data_parallel if self.expert_parallel else 1)


@cache
def _catalog() -> Mapping[str, Any]:
    return tomllib.loads(files("llmco2_vllm").joinpath("data", "devices.toml").read_text("utf-8"))


def device_names() -> tuple[str, ...]:
    """Names of the GPUs in the catalog."""
    return tuple(row["name"] for row in _catalog()["gpu"])


def _gpu(row: Mapping[str, Any]) -> DeviceSpec:
    return DeviceSpec(
        name=row["name"],
        kind="gpu",
        peak_flops_per_second={dtype: tera(value) for dtype, value in row["peak_tflops"].items()},
        memory_bandwidth_bytes_per_second=giga(row["bandwidth_gbps"]),
        memory_bytes=giga(row["memory_gb"]),
        power_limit_watts=float(row["power_limit_watts"]),
        idle_power_watts=float(row["idle_watts"]),
        link_bytes_per_second=giga(row["link_gbps"]) if "link_gbps" in row else None,
        source=row["source"],
        verified=row["verified"],
    )


def find_device(name: str) -> DeviceSpec | None:
    """GPU by catalog name or by the name NVML or torch reports; None when the catalog has no such GPU.

    A MIG instance is a part of a board, so it never matches.
    """
    if " MIG " in f" {name} ":
        return None
    wanted = name.strip()
    rows = _catalog()["gpu"]
    for row in rows:
        if row["name"] == wanted.lower():
            return _gpu(row)
    for row in rows:
        if any(re.search(pattern, wanted, re.IGNORECASE) for pattern in row["patterns"]):
            return _gpu(row)
    return None


def device_by_name(name: str) -> DeviceSpec:
    """The device called ``name``: a GPU as in :func:`find_device`, or ``cpu`` for this host.

    Raises ValueError that lists the allowed names.
    """
    if name.strip().lower() == "cpu":
        return detect_host().device()
    device = find_device(name)
    if device is None:
        raise ValueError(f"device {name!r} is not in the catalog; allowed: cpu, {', '.join(device_names())}")
    return device


@dataclass(frozen=True)
class HostSpec:
    """The CPUs this process may use. Power per core is published, not measured: see ``source``.

    cores: schedulable CPUs (hardware threads). physical_cores: distinct cores behind them.
    """

    model_name: str
    microarchitecture: str | None
    cores: int
    physical_cores: int
    frequency_hertz: float
    flags: frozenset[str]
    memory_bytes: float
    memory_bandwidth_bytes_per_second: float
    min_watts_per_core: float
    max_watts_per_core: float
    source: str

    @property
    def dram_watts(self) -> float:
        """Power of all memory of the host, drawn whether it works or not."""
        memory = _catalog()["memory"]
        return kwh_per_hour_to_watts(memory["kwh_per_gb_hour"]) * self.memory_bytes / giga(1)

    @property
    def peak_flops_per_second(self) -> dict[str, float]:
        """Dense FLOP/s by dtype: physical cores x Hz x FLOPs per cycle (the tables above)."""
        cycles = self.physical_cores * self.frequency_hertz
        fp32 = _best(_FP32_FLOPS_PER_CYCLE, self.flags, 2.0)
        bf16 = _best(_BF16_FLOPS_PER_CYCLE, self.flags, fp32 * _EMULATED_BF16_RATIO)
        int8 = _best(_INT8_FLOPS_PER_CYCLE, self.flags, fp32)
        return {"fp32": cycles * fp32, "bf16": cycles * bf16, "fp16": cycles * fp32, "int8": cycles * int8}

    def device(self) -> DeviceSpec:
        """The host as one device. With all cores working it draws cores x max watts, idle cores x min watts,
        and the memory its constant power in both."""
        return DeviceSpec(
            name="cpu",
            kind="cpu",
            peak_flops_per_second=self.peak_flops_per_second,
            memory_bandwidth_bytes_per_second=self.memory_bandwidth_bytes_per_second,
            memory_bytes=self.memory_bytes,
            power_limit_watts=self.cores * self.max_watts_per_core + self.dram_watts,
            idle_power_watts=self.cores * self.min_watts_per_core + self.dram_watts,
            cores=self.cores,
            source=self.source,
        )


def _best(table: Mapping[str, float], flags: frozenset[str], floor: float) -> float:
    return max([floor, *(value for flag, value in table.items() if flag in flags)])


def parse_cpuinfo(text: str, cores: Sequence[int]) -> dict[str, Any]:
    """Facts of ``/proc/cpuinfo`` about the CPUs numbered in ``cores``.

    Returns model_name, vendor, family, model, stepping, flags, frequency_hertz (None when unknown)
    and physical_cores; absent fields are empty or None.
    """
    blocks = [dict(_fields(block)) for block in text.strip().split("\n\n")]
    chosen = [block for block in blocks if int(block.get("processor", -1)) in set(cores)] or blocks
    first = chosen[0]
    name = first.get("model name", first.get("Hardware", ""))
    rates = [float(block["cpu MHz"]) for block in chosen if "cpu MHz" in block]
    nominal = re.search(r"@\s*([\d.]+)\s*GHz", name)
    hertz = max([mega(rate) for rate in rates] + ([giga(float(nominal[1]))] if nominal else []), default=None)
    siblings = {(block.get("physical id", ""), block.get("core id", block.get("processor"))) for block in chosen}
    return {
        "model_name": name,
        "vendor": first.get("vendor_id", ""),
        "family": _number(first.get("cpu family")),
        "model": _number(first.get("model")),
        "stepping": _number(first.get("stepping")),
        "flags": frozenset(first.get("flags", first.get("Features", "")).split()),
        "frequency_hertz": hertz,
        "physical_cores": max(1, min(len(siblings), len(cores))),
    }


def _fields(block: str) -> list[tuple[str, str]]:
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in block.splitlines())]


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def cpu_power(facts: Mapping[str, Any]) -> tuple[str | None, float, float, str]:
    """(microarchitecture, min watts, max watts, source) per vCPU; the provider average when it is not listed."""
    for row in _catalog()["cpu"]:
        known = row["vendor"] == facts["vendor"] and row["family"] == facts["family"]
        if known and facts["model"] in row["models"] and facts["stepping"] in row.get("steppings", [facts["stepping"]]):
            source = f"Cloud Carbon Coefficients, {row['source']}, {row['microarchitecture']}"
            return row["microarchitecture"], row["min_watts"], row["max_watts"], source
    default = _catalog()["cpu_default"]
    return None, default["min_watts"], default["max_watts"], default["source"]


def measure_copy_bandwidth(threads: int) -> float:
    """Memory bandwidth in bytes/s: best of a few numpy copies split over ``threads``, read plus write counted.

    As STREAM's copy (McCalpin, 1995): write-allocate traffic is not counted. Takes about 0.2 s.
    """
    source = np.empty(_COPY_BYTES // 8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part[0].fill(1.0), parts))  # touches the pages before the clock starts
        best = float("inf")
        for _ in range(_COPY_REPEATS + 1):  # the first copy touches the pages of the target
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def host_cache_path() -> Path:
    """Where the measured bandwidth of this host is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmco2" / "host.json"


def _cached_bandwidth(key: str, threads: int) -> float:
    path = host_cache_path()
    known: dict[str, Any] = {}
    # A cache that cannot be read or written only means measuring again, so nothing may escape.
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text("utf-8"))
        known = content if isinstance(content, dict) else {}
    value = known.get(key)
    if isinstance(value, (int, float)) and 0 < value < float("inf"):
        return float(value)
    measured = measure_copy_bandwidth(threads)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({**known, key: measured}, file)
        os.replace(file.name, path)  # noqa: PTH105 - the atomic rename is the point
    return measured


def _total_memory_bytes(text: str) -> float:
    match = re.search(r"^MemTotal:\s*(\d+) kB", text, re.MULTILINE)
    return float(match[1]) * BYTES_PER_KIBIBYTE if match else 0.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def detect_host() -> HostSpec:
    """The CPUs of this process's affinity mask; measures memory bandwidth once per host, then reads the cache."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    facts = parse_cpuinfo(_read("/proc/cpuinfo"), cores)
    microarchitecture, min_watts, max_watts, source = cpu_power(facts)
    key = f"{facts['model_name']}|{microarchitecture}|{len(cores)}"
    return HostSpec(
        model_name=facts["model_name"],
        microarchitecture=microarchitecture,
        cores=len(cores),
        physical_cores=facts["physical_cores"],
        frequency_hertz=facts["frequency_hertz"] or _FALLBACK_FREQUENCY_HERTZ,
        flags=facts["flags"],
        memory_bytes=_total_memory_bytes(_read("/proc/meminfo")),
        memory_bandwidth_bytes_per_second=_cached_bandwidth(key, len(cores)),
        min_watts_per_core=min_watts,
        max_watts_per_core=max_watts,
        source=source,
    )
