"""Assembling a meter: one that sees a part of the engine, or more than it, is not used, and says why."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from benchmarks.focused_sampling import MODEL
from llmco2_vllm import assemble
from llmco2_vllm.assemble import Deployment, Meter
from llmco2_vllm.config import Settings
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.meters.discover import Discovery, Search
from llmco2_vllm.samples import SampleFeed
from llmco2_vllm.store.reading import samples, store_path
from tests.test_samples import account


class Sampler:
    """As much of a sampler as assembling needs."""

    def __init__(self, devices: int) -> None:
        self.windows: deque[Any] = deque()
        self.devices, self.stopped = devices, False
        self.fault: str | None = None

    name = "open"

    def state(self) -> dict[str, Any]:
        return {"devices": [{"scope": "gpu"}] * self.devices}

    def stop(self, timeout_seconds: float = 2.0) -> bool:
        self.stopped = True
        return True


def assembled(patch: pytest.MonkeyPatch, name: str, devices: int, topology: Topology, **more: Any) -> Meter:
    sampler = Sampler(devices)
    patch.setattr(assemble, "open_meter", lambda *_: Discovery(sampler, name, None))  # type: ignore[arg-type]
    deployment = Deployment(MODEL, "NVIDIA H100 80GB HBM3", "bfloat16", topology=topology, **more)
    meter = assemble.assemble(Settings(node_overhead=0.1), deployment)
    assert sampler.stopped is (meter.found.now()[0] == "none")
    return meter


def test_a_meter_of_all_devices_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = assembled(monkeypatch, "nvml", 4, Topology(4), meter_devices=(0, 1, 2, 3))
    assert meter.found.now() == ("nvml", "") and meter.monitor.metering is not None and "meter" in meter.states


@pytest.mark.parametrize(("devices", "least"), [(tuple(range(8)), 16), (None, 1)])
def test_an_engine_over_two_hosts_is_not_measured_by_the_half_of_it(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...] | None, least: int
) -> None:
    asked: list[Search] = []

    def refuse(choice: str, tokens: Any, search: Search, activity: Any) -> Discovery:
        asked.append(search)
        return Discovery(None, "none", f"{choice} of {tokens}")

    monkeypatch.setattr(assemble, "open_meter", refuse)
    deployment = Deployment(MODEL, "NVIDIA H100 80GB HBM3", "bfloat16", topology=Topology(16), meter_devices=devices)
    meter = assemble.assemble(Settings(meter="nvml"), deployment)
    assert meter.monitor.metering is None and meter.found.now() == ("none", f"nvml of {devices}")
    assert [search.least_devices for search in asked] == [least]


def test_the_hosts_counter_is_not_given_to_one_of_several_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assembled(monkeypatch, "rapl", 1, Topology()).found.now() == ("rapl", "")
    meter = assembled(monkeypatch, "rapl", 1, Topology(data_parallel=2))
    name, reason = meter.found.now()
    assert name == "none" and "several engines" in reason


def test_samples_of_a_driver_that_was_silent_at_the_start_have_its_scope(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampler, feeds = Sampler(0), []

    def kept(*parts: Any) -> SampleFeed:
        feeds.append(SampleFeed(*parts))
        return feeds[-1]

    monkeypatch.setattr(assemble, "open_meter", lambda *_: Discovery(sampler, "nvml", None))  # type: ignore[arg-type]
    monkeypatch.setattr(assemble, "SampleFeed", kept)
    deployment = Deployment(MODEL, "NVIDIA H100 80GB HBM3", "bfloat16")
    assemble.assemble(Settings(node_overhead=0.1, samples=tmp_path), deployment)
    sampler.devices = 1
    feeds[0].take(account(1.0, 10.0))
    feeds[0].close()
    assert [sample.scope for sample in samples(store_path(tmp_path))] == ["gpu"]


def test_a_host_meter_beside_the_devices_is_shown_unless_its_share_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "open_meter", lambda choice, *_: Discovery(Sampler(1), choice, None))
    deployment = Deployment(MODEL, "NVIDIA H100 80GB HBM3", "bfloat16")
    for overhead, there in ((None, True), (0.2, False)):
        meter = assemble.assemble(Settings(meter="nvml", node_overhead=overhead), deployment)
        assert ("host" in meter.states) is there


def test_why_the_host_has_no_meter_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "RAPL: permission denied; let it be read"

    def opened(choice: str, *_: object) -> Discovery:
        return Discovery(None, "none", reason) if choice == "rapl" else Discovery(Sampler(1), choice, None)  # type: ignore[arg-type]

    monkeypatch.setattr(assemble, "open_meter", opened)
    meter = assemble.assemble(Settings(meter="nvml"), Deployment(MODEL, "NVIDIA H100 80GB HBM3", "bfloat16"))
    assert meter.states["host"]() == {"source": "none", "reason": reason}
