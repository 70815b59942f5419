"""The house: layers point down, no cycles, torch and vllm only in their rooms, sizes in bounds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmco2_vllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "core": 0,
    "predictor": 1,
    "meters": 2,
    "store": 2,
    "grid": 2,
    "telemetry": 2,
    "training": 3,
    "config": 4,
    "metering": 4,
    "samples": 4,
    "monitor": 4,
    "assemble": 4,
    "testing": 4,
    "lifecycle": 4,
    "reporting": 4,
    "advice": 4,
    "vllm_plugin": 5,
    "dashboards": 5,
    "demo": 5,
    "cli": 5,
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "manager", "misc"}
CORE_MAY_IMPORT = {"numpy"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names imported anywhere in a module, those of TYPE_CHECKING and of functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_imports(path: Path) -> set[str]:
    """Our own modules that a module imports."""
    known = {name_of(module) for module in MODULES}
    found = set()
    for target in imports(path):
        if target.startswith("llmco2_vllm"):
            found.add(target if target in known else target.rpartition(".")[0])
    return found - {"llmco2_vllm"}


def layer(module: str) -> int:
    return LAYERS[module.split(".")[1]]


def test_every_module_has_a_layer() -> None:
    assert {name_of(m).split(".")[1] for m in MODULES if name_of(m) != "llmco2_vllm"} <= LAYERS.keys()


@pytest.mark.parametrize("path", [m for m in MODULES if name_of(m) != "llmco2_vllm"], ids=name_of)
def test_imports_point_down(path: Path) -> None:
    above = {target for target in module_imports(path) if layer(target) > layer(name_of(path))}
    assert not above


def test_there_are_no_import_cycles() -> None:
    graph = {name_of(m): module_imports(m) - {name_of(m)} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    top = {target.split(".")[0] for target in imports(path)}
    room = name_of(path).split(".")[1] if "." in name_of(path) else ""
    assert room == "training" or not top & {"torch", "torch_geometric", "transformers"}
    assert room == "vllm_plugin" or "vllm" not in top


def test_vllm_names_are_known_to_compat_alone() -> None:
    for path in MODULES:
        if path.name != "compat.py":
            assert not [target for target in imports(path) if target.split(".")[0] == "vllm"], path
            if path.parent.name == "vllm_plugin":
                strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
                assert not [s for s in strings if isinstance(s, str) and s.startswith("vllm.v1")], path


def test_the_core_is_standard_library_and_numpy() -> None:
    import sys

    for path in (PACKAGE / "core").rglob("*.py"):
        foreign = {target.split(".")[0] for target in imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= CORE_MAY_IMPORT | {"llmco2_vllm"}, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            begin = first.end_lineno or node.lineno if documented else node.lineno
            assert (node.end_lineno or 0) - begin <= 40, node.name
            named = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            assert len(named) + len(node.args.kwonlyargs) <= 5, node.name


def test_no_module_is_named_for_nothing() -> None:
    assert not {m.stem for m in MODULES} & FORBIDDEN_NAMES


def test_importing_the_package_has_no_side_effect() -> None:
    import subprocess
    import sys

    code = "import sys; before = set(sys.modules); import llmco2_vllm; print(sorted(set(sys.modules) - before))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "['llmco2_vllm']"
