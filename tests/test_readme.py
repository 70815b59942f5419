"""The README: every command in it runs as far as it can without doing its work, every link leads somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from llmco2_vllm.config import Settings
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.gnn import GnnPredictor

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    inline = re.findall(r"`((?:make|vllm serve|python -m) [^`]+)`", TEXT)
    return sorted({line for block in blocks for line in block.splitlines() if line} | set(inline))


def check_make(words: list[str]) -> None:
    answer = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def check_module(words: list[str]) -> None:
    module, options = words[2], [word for word in words[3:] if word.startswith("--")]
    answer = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert all(option in answer.stdout for option in options)


def check_serve(words: list[str]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llmco2_vllm.vllm_plugin import flags, register
    from tests.predictor.test_deployment import MODEL, found, phase

    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    if "--help=Carbon" in words:
        assert any(group.title == "Carbon" for group in parser._action_groups)
        return
    arguments = parser.parse_args(["--model", words[2], *words[3:]])
    with TemporaryDirectory() as folder, chdir(folder):
        # A setting names it, and it is checked before the model loads: one of the predictor that ships.
        device = GnnPredictor(MODEL, device_by_name("h100-sxm"), Topology(), Bundle.load())
        found(device, phase(1.1), phase(1.2)).save(Path("calibration.json"))
        assert flags.requested(arguments.carbon, arguments.carbon_config, None, {}) is not None


def check_pip(words: list[str]) -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert words[1:] in (["install", "."], ["uninstall", name])


def check_llmco2(words: list[str]) -> None:
    from click.testing import CliRunner

    from llmco2_vllm.cli.main import main

    options = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    subcommand = words[2:3] if words[1] == "samples" and options > 2 else []
    answer = CliRunner().invoke(main, [words[1], *subcommand, "--help"])
    assert answer.exit_code == 0, answer.output
    assert all(option in answer.output for option in words[2:] if option.startswith("-"))


CHECKS = {
    "llmco2": check_llmco2,
    "make": check_make,
    "python": check_module,
    "vllm": check_serve,
    "pip": check_pip,
}


def test_the_readme_has_commands_of_every_kind() -> None:
    assert {shlex.split(command)[0] for command in commands()} == CHECKS.keys()


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words)


def test_links_to_files_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+?)\)", TEXT)
    assert targets
    assert not [target for target in targets if "://" not in target and not (ROOT / target).exists()]


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in TEXT


def test_the_response_it_shows_keeps_to_the_published_schema() -> None:
    import jsonschema

    block = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    schema = json.loads((ROOT / "llmco2_vllm" / "data" / "annotation.schema.json").read_text())
    jsonschema.validate(json.loads(block[1])["carbon"], schema)


def test_every_setting_stands_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert [row for row in rows if not row.startswith("llmco2_")] == list(Settings.model_fields)


def test_metrics_it_names_are_metrics() -> None:
    from llmco2_vllm.telemetry.metric_table import METRICS

    named = set(re.findall(r"`(llmco2_\w+)`", TEXT)) - {"llmco2_vllm"}
    assert len(named) > 10 and named <= set(METRICS)


def test_its_table_of_errors_is_the_one_that_the_benchmark_wrote() -> None:
    from benchmarks.accuracy import markdown

    folder = ROOT / "benchmarks" / "results" / "accuracy"
    table = markdown(json.loads((folder / "accuracy.json").read_text()))
    assert table == (folder / "accuracy.md").read_text()
    assert table in TEXT
