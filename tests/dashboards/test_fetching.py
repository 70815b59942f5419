"""Prometheus is fetched without root, or one line says why it is not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.prometheus import fetcher


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a folder of its own."""
    found = fetcher()
    monkeypatch.setattr(found, "FOLDER", tmp_path / "kept")
    return found


def with_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """apt-get and dpkg are this shell script, and nothing else is there."""
    for name in ("apt-get", "dpkg"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_host_without_apt_is_told_so(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="with apt-get and dpkg, and they are not here"):
        module.fetch("host")


def test_what_apt_says_is_passed_on(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_program(tmp_path, monkeypatch, "echo 'E: Unable to locate package prometheus' >&2; exit 100")
    with pytest.raises(RuntimeError, match="apt-get: E: Unable to locate package prometheus"):
        module.fetch("host")


def test_a_host_that_is_not_debians_has_no_sid(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_program(tmp_path, monkeypatch, "echo 'Ubuntu http://mirror.example/ubuntu'")
    with pytest.raises(RuntimeError, match="sid: this host's package sources are not Debian's"):
        module.fetch("sid")


def test_a_package_without_the_programs_is_said_to_be_one(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_program(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(RuntimeError, match="host: the packages prometheus hold no prometheus and promtool"):
        module.fetch("host")


def test_what_is_there_is_not_fetched_again(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in module.PROGRAMS:
        path = module.program("host", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    module.fetch("host")
