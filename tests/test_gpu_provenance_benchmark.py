"""Whose figures a recording holds: a simulation never passes for a GPU, nor one GPU for another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_record
from benchmarks.gpu_provenance import (
    FILE,
    SIMULATED,
    SIMULATED_TITLE,
    RefusedError,
    check_folder,
    named_devices,
    read_identity,
    read_provenance,
    title_of,
)
from tests.gpu_recording import CARD, ROOT, recording, refused, run
from tests.nvml_shim import shim
from tests.nvml_shim.fixtures import shim_folder

__all__ = ["shim_folder"]


@pytest.mark.parametrize(
    ("path", "devices"),
    [
        ("results/h200", ["h200"]),
        ("results/H200-run2/again", ["h200"]),
        ("results/gb200", ["gb200"]),
        ("t4", ["t4"]),
        ("results/cpu", []),
        ("results/tmp_t4abcd", []),
    ],
)
def test_a_path_names_a_gpu_by_any_of_its_parts(tmp_path: Path, path: str, devices: list[str]) -> None:
    assert named_devices(tmp_path / path) == devices


def test_the_folder_of_a_gpu_is_for_that_gpu_alone(tmp_path: Path) -> None:
    check_folder(tmp_path / "h200", False, "NVIDIA H200")
    check_folder(tmp_path / "anything", True, "NVIDIA H200")
    with pytest.raises(RefusedError, match="names the H100, what answers is NVIDIA H200"):
        check_folder(tmp_path / "h100", False, "NVIDIA H200")
    with pytest.raises(RefusedError, match="names the H200, what answers is NVIDIA GH200"):
        check_folder(tmp_path / "h200", False, "NVIDIA GH200 480GB")
    with pytest.raises(RefusedError, match="names the H200, what answers is simulated"):
        check_folder(tmp_path / "h200", True, "NVIDIA H200")


def test_the_shim_is_not_recorded_into_a_folder_named_after_a_gpu(tmp_path: Path) -> None:
    line = refused(run("gpu_record", "--write", str(tmp_path / "h200"), "--shim"))
    assert "names the H200, what answers is simulated (shim), not a GPU" in line
    assert not (tmp_path / "h200").exists()


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_shim_that_nobody_told_of_is_known_by_its_library(tmp_path: Path, shim_folder: Path, place: str) -> None:
    folder = shim_folder if place == "here" else shutil.copytree(shim_folder, tmp_path / "lib")
    environment = shim.environment(folder)
    line = refused(run("gpu_record", "--write", str(tmp_path / "h200"), environment=environment))
    assert "names the H200, what answers is simulated" in line
    code = "from benchmarks.gpu_provenance import *; print(described(read_identity(0)))"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert "'simulated': True" in said.stdout and "the shim of our tests" in said.stdout, said.stderr
    assert "--shim was given" not in said.stdout and str(folder / shim.LIBRARY) in said.stdout


def test_without_a_driver_nothing_is_recorded(tmp_path: Path) -> None:
    try:
        read_identity(0)
    except Exception:
        assert "no GPU to record: " in refused(run("gpu_record", "--write", str(tmp_path / "new")))
        assert not (tmp_path / "new").exists()
    else:
        pytest.skip("there is a GPU here")


def test_a_recording_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}")
    assert "holds a recording already" in refused(run("gpu_record", "--write", str(tmp_path)))


def test_on_a_gpu_points_need_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_record, "read_identity", lambda index: CARD)
    monkeypatch.delenv(SIMULATED, raising=False)
    with pytest.raises(RefusedError, match="--points needs --model"):
        gpu_record.record(gpu_record.parse(["--write", str(tmp_path / "new"), "--points", "1,2,3"]))


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "0,1,1", ""])
def test_a_point_that_is_none_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_record.parse(["--write", "x", "--points", text])
    assert f"--points: {text!r} is not possible" in capsys.readouterr().err


def test_the_scripts_start_without_what_a_lent_machine_may_lack() -> None:
    absent = ("rich", "click", "matplotlib", "pyarrow", "httpx", "jinja2", "yaml", "vllm", "torch")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from benchmarks import gpu_record, gpu_points"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_a_folder_without_a_recording_is_refused(tmp_path: Path) -> None:
    assert "no recording" in refused(run("gpu_figures", str(tmp_path)))


def test_the_title_of_a_gpu_is_its_name(tmp_path: Path) -> None:
    recording(tmp_path).write()
    assert title_of(read_provenance(tmp_path)) == "NVIDIA H200"
    recording(tmp_path, replace(CARD, signs=("a sign",))).write()
    assert title_of(read_provenance(tmp_path)) == SIMULATED_TITLE
