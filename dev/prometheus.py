"""Fetches Prometheus and promtool from Debian's packages into .cache: ``python dev/prometheus.py``; no root needed.

Two releases where they can be had, since they read metrics differently: that of the host's own sources (2.x on Debian
12) and the newest, from Debian's sid by a package state of its own. They are unpacked, never installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "prometheus"
# The host's release has both programs in one package.
PACKAGES = {"host": ("prometheus",), "sid": ("prometheus", "promtool")}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PROGRAMS = ("prometheus", "promtool")
SECONDS = 180.0


def program(release: str, name: str) -> Path:
    """Where a program of a release lies, once it is fetched."""
    return FOLDER / release / "usr" / "bin" / name


def present(release: str) -> bool:
    """Whether both programs of a release are there."""
    return all(program(release, name).is_file() for name in PROGRAMS)


def fetch(release: str) -> None:
    """Download and unpack one release, unless it is there. Raises RuntimeError with one line that says why not."""
    if present(release):
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise RuntimeError("Prometheus is fetched with apt-get and dpkg, and they are not here")
    folder = FOLDER / release
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = _state(folder) if release == "sid" else []
    if options:
        _run(["apt-get", *options, "update"], folder)
    _run(["apt-get", *options, "download", *PACKAGES[release]], folder)
    for package in folder.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(folder)], folder)
        package.unlink()
    shutil.rmtree(folder / "apt", ignore_errors=True)
    if not present(release):
        raise RuntimeError(f"{release}: the packages {', '.join(PACKAGES[release])} hold no {' and '.join(PROGRAMS)}")


def _state(folder: Path) -> list[str]:
    """Options of apt-get for lists and downloads of its own, from the mirror of the host's sources."""
    sites = _run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE)"], folder).splitlines()
    debian = [line.split()[1] for line in sites if line.startswith("Debian ")]
    if not debian:
        raise RuntimeError("sid: this host's package sources are not Debian's")
    state = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    source = state / "sid.list"
    source.write_text(f"deb [signed-by={KEYRING}] {debian[0]} sid main\n")
    settings = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _run(command: list[str], folder: Path) -> str:
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{' '.join(command[:1])}: {error}") from None
    if answer.returncode != 0:
        last = (answer.stderr.strip() or "failed").splitlines()[-1]
        raise RuntimeError(f"{command[0]}: {last}")
    return answer.stdout


def main() -> None:
    """Fetch what can be had. Raises SystemExit where nothing can."""
    fetched = 0
    for release in PACKAGES:
        try:
            fetch(release)
        except RuntimeError as error:
            print(f"prometheus: {error}", file=sys.stderr)
            continue
        fetched += 1
        version = _run([str(program(release, "promtool")), "--version"], FOLDER) or release
        print(f"{release}: {version.splitlines()[0]}")
    if not fetched:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
