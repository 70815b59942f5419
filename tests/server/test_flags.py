"""Flags in every form an operator types them, and refusals before a model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.config import Settings
from llmco2_vllm.demo.server import ENVIRONMENT
from llmco2_vllm.vllm_plugin import register
from tests.server.conftest import Child

LOADING = ("Initializing a V1 LLM engine", "Starting to load model", "Loading weights")
REFUSED: dict[str, tuple[list[str], dict[str, str], tuple[str, ...]]] = {
    "an impossible value": (["--carbon-config.pue", "0.5"], {}, ("--carbon-config", "pue=0.5", "1 to 5")),
    "no JSON": (["--carbon-config", "zone: FR"], {}, ("--carbon-config", "not JSON", '{"zone": "FR"}')),
    "no object": (["--carbon-config", "[1]"], {}, ("--carbon-config", "expected an object", "zone")),
    "an unknown variable": (["--carbon"], {"LLMCO2_ZOEN": "FR"}, ("LLMCO2_ZOEN", "LLMCO2_ZONE")),
    "an impossible variable": (["--carbon"], {"LLMCO2_PUE": "low"}, ("environment", "pue='low'", "1 to 5")),
    "an unknown device": (["--carbon-config.device", "h1000"], {}, ("device='h1000'", "h100")),
    "an unknown key of additional_config": (
        ["--additional-config", '{"carbon": {"zoen": 1}}'],
        {},
        ('additional_config["carbon"]', "'zoen'", "zone"),
    ),
}


def assert_refused(status: int, stdout: str, stderr: str, words: tuple[str, ...]) -> None:
    """The command failed before it loaded anything, and its last line says why."""
    assert status != 0
    last = stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    assert not [mark for mark in LOADING if mark in stdout + stderr]
    assert "Traceback" not in stdout + stderr


@pytest.fixture(scope="module")
def refusals(child: Child, model_dir: Path) -> dict[str, dict[str, Any]]:
    """Results of the command lines of ``REFUSED``."""
    cases = [
        {"arguments": ["serve", str(model_dir), *arguments], "environment": environment}
        for arguments, environment, _ in REFUSED.values()
    ]
    return dict(zip(REFUSED, child("command_child", json.dumps(cases))["results"], strict=True))


@pytest.mark.server
def test_an_unknown_key_ends_the_command_with_one_line_that_names_it(model_dir: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model_dir),
        "--carbon-config",
        '{"zoen": "FR"}',
    ]
    environment = {**os.environ, **ENVIRONMENT}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    words = ("--carbon-config", "'zoen'", "did you mean 'zone'", ", ".join(Settings.model_fields))
    assert_refused(ended.returncode, ended.stdout, ended.stderr, words)


@pytest.mark.server
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_model_loads(refusals: dict[str, dict[str, Any]], case: str) -> None:
    assert_refused(**refusals[case], words=REFUSED[case][2])


def parsed(*arguments: str) -> Any:
    """The settings that vLLM's own parser and our wrappers take from a command line, None when off."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llmco2_vllm.vllm_plugin.compat import ATTRIBUTE

    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    settings = getattr(EngineArgs.from_cli_args(parser.parse_args(list(arguments))), ATTRIBUTE, None)
    return None if settings is None else settings.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], None),
        (["--carbon"], {}),
        (["--carbon-config", "{}"], {}),
        (["--carbon-config", '{"zone": "DE", "pue": 1.3}'], {"zone": "DE", "pue": 1.3}),
        (["--carbon-config.zone", "DE"], {"zone": "DE"}),
        (["--carbon-config.zone=DE", "--carbon-config.pue", "1.3"], {"zone": "DE", "pue": 1.3}),
        (["--carbon-config", '{"pue": 1.3}', "--carbon-config.zone", "DE"], {"zone": "DE", "pue": 1.3}),
        (["--carbon-config.headers", "true"], {"headers": True}),
        (["--additional-config", '{"carbon": {"zone": "DE"}}'], {"zone": "DE"}),
        (["--additional-config", '{"carbon": {"zone": "DE"}}', "--carbon-config.zone", "FR"], {"zone": "FR"}),
        (["--additional-config", '{"carbon": true}'], {}),
        (["--additional-config", '{"carbon": false}'], None),
    ],
)
def test_a_command_line_means_these_settings(arguments: list[str], settings: dict[str, Any] | None) -> None:
    assert parsed(*arguments) == settings


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("carbon: true\n", {}),
        ("carbon: false\n", None),
        ("carbon: true\ncarbon-config: {zone: DE, pue: 1.3}\n", {"zone": "DE", "pue": 1.3}),
        ("carbon-config:\n  zone: DE\n  headers: true\n", {"zone": "DE", "headers": True}),
        ('carbon-config: \'{"zone": "DE"}\'\n', {"zone": "DE"}),
        ("carbon-config.zone: DE\n", {"zone": "DE"}),
    ],
)
def test_a_yaml_file_means_these_settings(tmp_path: Path, text: str, settings: dict[str, Any] | None) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    assert parsed("--config", str(file)) == settings


def test_the_command_line_wins_over_the_yaml_file_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("carbon-config: {zone: DE, pue: 1.3}\n")
    assert parsed("--config", str(file), "--carbon-config.zone", "FR") == {"zone": "FR", "pue": 1.3}


def test_the_environment_alone_turns_it_on_and_the_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCO2_ZONE", "DE")
    assert parsed() is None
    monkeypatch.setenv("LLMCO2_CARBON", "1")
    assert parsed() == {"zone": "DE"}
    assert parsed("--carbon-config.zone", "FR") == {"zone": "FR"}
