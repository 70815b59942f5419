"""RAPL: packages and memory are summed over wraps, nothing is counted twice, nothing unreadable is a zero."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.meters.base import MeterUnavailableError, SkippedReadingError
from llmco2_vllm.meters.rapl import RaplMeter
from llmco2_vllm.testing import FakeClock
from tests.meters.virtual import Bench, tiled

RANGE = 262_143_328_850


def zone(root: Path, name: str, label: str, microjoules: int = 0, most: int = RANGE) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in {"name": label, "energy_uj": microjoules, "max_energy_range_uj": most}.items():
        (folder / file).write_text(f"{text}\n")
    return folder


def set_energy(folder: Path, microjoules: int) -> None:
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_memory_are_summed_and_the_platform_is_not(tmp_path: Path) -> None:
    labels = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    folders = [zone(tmp_path, name, label) for name, label in labels.items()]
    meter = RaplMeter(tmp_path, FakeClock())
    for power, folder in enumerate(folders):
        set_energy(folder, 10**power * 1_000_000)
    assert meter.read().energy_joules == 1 + 100 + 1000 + 10_000
    assert meter.domains == {"package-0": 1, "package-0-dram": 100, "package-1": 1000, "package-1-dram": 10_000}
    assert meter.identity.scope == "host"


def test_the_platform_is_used_where_there_are_no_packages(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "psys")
    meter = RaplMeter(tmp_path, FakeClock())
    set_energy(folder, 5_000_000)
    assert meter.read().energy_joules == 5.0


@settings(deadline=None)
@given(st.integers(0, 999_999), st.lists(st.integers(0, 999_998), max_size=20))
def test_a_counter_that_wraps_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, start: int, steps: list[int]
) -> None:
    most, root = 1_000_000, tmp_path_factory.mktemp("powercap")
    folder = zone(root, "intel-rapl:0", "package-0", start, most)
    meter = RaplMeter(root, FakeClock())
    total = start
    for step in steps:
        total += step
        set_energy(folder, total % most)
        meter.read()
    assert meter.domains["package-0"] == pytest.approx((total - start) / 1e6)


def test_without_packages_the_reason_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailableError, match=r"no package under .*virtual machines"):
        RaplMeter(tmp_path / "absent", FakeClock())


def test_what_may_not_be_read_is_told_with_how_to_grant_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0")
    (folder / "energy_uj").chmod(0)
    if os.geteuid() == 0:  # root may read all files: refuse as the kernel would

        def refuse(path: Path, *arguments: object, **options: object) -> str:
            if path.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(path))
            return path.open().read()

        monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterUnavailableError, match=r"needs permission.*chmod a\+r"):
        RaplMeter(tmp_path, FakeClock())


def test_a_file_that_goes_away_skips_the_sample(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = RaplMeter(tmp_path, FakeClock())
    (folder / "energy_uj").unlink()
    with pytest.raises(SkippedReadingError):
        meter.read()


def test_the_sampler_makes_windows_of_it_at_ten_calls_a_second(tmp_path: Path) -> None:
    bench = Bench()
    folder = zone(tmp_path, "intel-rapl:0", "package-0")

    class Host(RaplMeter):
        def read(self):  # type: ignore[no-untyped-def]
            set_energy(folder, int(50e6 * (bench.clock() - 1000.0)))
            return super().read()

    bench.add(Host(tmp_path, bench.clock))
    windows = bench.run(20.0)
    assert tiled(windows) and {w.doubt for w in windows} == {Doubt.NONE}
    assert sum(w.energy_joules or 0.0 for w in windows) == pytest.approx(
        50 * (windows[-1].end_seconds - windows[0].begin_seconds), abs=0.1
    )
    assert bench.state["reads_per_second"] < 13 and bench.state["scope"] == "host"
