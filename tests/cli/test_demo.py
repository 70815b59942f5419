"""The demo without a server: what is short is said, the table says what was answered, nothing is left running."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llmco2_vllm.cli.main import COMMANDS, main
from llmco2_vllm.demo import report, weights
from llmco2_vllm.demo.preflight import HOST, DemoError, check_disk, check_memory, choose_port
from llmco2_vllm.demo.requests import ABORTED, Answer, Requests
from llmco2_vllm.demo.server import VllmServer

METRICS = [f'{ABORTED}{{engine="0",model_name="m"}} 1.25', 'llmco2_steps_total{engine="0",model_name="m"} 7.0']


def recorded(**changes: Any) -> dict[str, Any]:
    """An annotation as a server without a meter sent it."""
    return {
        "schema": "llmco2/1",
        "method": "1.0",
        "basis": "predicted",
        "attribution": "step-kernel/1",
        "estimate": {
            "energy_joules": 3.06322,
            "prefill_joules": 0.982535,
            "decode_joules": 2.08068,
            "lower": 1.01086,
            "upper": 9.18965,
            "when": "before_execution",
        },
        "carbon_grams": {"operational": 5.718e-05, "lower": 1.88694e-05, "upper": 0.00017154},
        "intensity": {
            "grams_per_kwh": 56.0,
            "zone": "FR",
            "method": "average",
            "basis": "location",
            "source": "settings",
            "estimated": False,
        },
        "pue": 1.2,
        "tokens": {"prefill": 37, "cached": 0, "recomputed": 0, "decode": 7},
        "meter": "none",
        "meter_reason": "no meter is built in",
        "predictor": "roofline/1-cpu",
        "in_distribution": False,
        **changes,
    }


def answer(name: str = "chat", carbon: Mapping[str, Any] | None = None) -> Answer:
    annotation = recorded() if carbon is None else carbon
    return Answer(name, "Paris.", 0.5, annotation, {"id": "chatcmpl-1", "carbon": annotation})


def printed(renderable: Any) -> str:
    screen = Console(file=io.StringIO(), width=200)
    screen.print(renderable)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_busy_port_is_named_and_refused() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DemoError, match=f"port {port} .*cannot be used"):
            choose_port(port)


def test_a_port_that_is_not_given_is_one_that_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind((HOST, choose_port(None)))


def test_a_disk_with_too_little_room_is_named_even_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(DemoError, match=f"GB free in {tmp_path}, 1000000000.00 GB needed"):
        check_disk(tmp_path / "not" / "yet", 10**18)


@given(available=st.integers(0, 2**34), needed=st.integers(0, 2**44))
def test_memory_is_enough_exactly_when_as_much_is_available_as_needed(
    tmp_path_factory: pytest.TempPathFactory, available: int, needed: int
) -> None:
    meminfo = tmp_path_factory.getbasetemp() / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {available} kB\n")
    if available * 1024 >= needed:
        check_memory(needed, meminfo)
    else:
        with pytest.raises(DemoError, match=r"memory: .* GiB available"):
            check_memory(needed, meminfo)


def test_the_table_has_a_row_per_request_with_tokens_joules_interval_and_grams() -> None:
    other = recorded(tokens={"prefill": 5, "cached": 32, "recomputed": 0, "decode": 99})
    text = printed(report.request_table([answer("chat"), answer("second", other)]))
    row = next(line for line in text.splitlines() if "chat" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("chat", "37", "0", "7"),
        *("0.983", "2.08", "3.06", "1.01 - 9.19", "5.72e-05"),
    ]
    assert "second" in text and "99" in text and "predicted" in text


def test_the_report_says_that_nothing_was_measured_and_why_and_which_model_it_is() -> None:
    text = " ".join(printed(report.report([answer()], METRICS)).split())
    assert "predicted by roofline/1-cpu before each step runs, not measured" in text
    assert "meter: none (no meter is built in)" in text
    assert "4-bit GGUF" in text
    assert "in_distribution: false" in text


def test_the_report_shows_every_metric_and_what_the_client_that_hung_up_spent() -> None:
    text = printed(report.report([answer()], METRICS))
    assert all(text.count(line) >= 1 for line in METRICS)
    assert text.count(METRICS[0]) == 2


def test_the_json_document_holds_every_request_with_its_annotation() -> None:
    document = json.loads(report.document("vllm serve m --carbon", [answer("a"), answer("b")], METRICS))
    assert [request["name"] for request in document["requests"]] == ["a", "b"]
    assert all(request["carbon"] == recorded() for request in document["requests"])
    assert document["metrics"] == METRICS


@pytest.fixture
def plain_server() -> Any:
    """A small HTTP server that answers chat requests as an engine without the plugin does."""
    script = Path(__file__).with_name("plain_server.py")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://{HOST}:{process.stdout.readline().strip()}"
        process.kill()


@pytest.mark.parametrize("kind", ["chat", "streamed_chat"])
def test_a_response_without_an_annotation_is_an_error_that_says_what_to_check(plain_server: str, kind: str) -> None:
    with Requests(plain_server) as requests, pytest.raises(DemoError, match=r"no carbon object.*--carbon"):
        getattr(requests, kind)(kind, "Hello?")


def alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def child_of(server: VllmServer) -> int:
    """The process the dummy server started; it writes the number into its log."""
    for _ in range(600):
        lines = server.log_path.read_text().splitlines()
        if lines:
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError(server.log_tail())


@pytest.mark.parametrize("obedient", [True, False])
def test_stopping_the_server_stops_what_it_started(tmp_path: Path, obedient: bool) -> None:
    program = tmp_path / "vllm"
    ignore = "" if obedient else "trap '' INT TERM\n"
    program.write_text(f"#!/bin/sh\n{ignore}sleep 1000 &\necho $!\nwait\nwait\n")
    program.chmod(0o755)
    server = VllmServer(tmp_path)
    server.executable, server.stop_seconds = program, 0.2
    with server:
        child = child_of(server)
        assert alive(child)
        log_path = server.log_path
    # SIGKILL is sent before stop() returns; the kernel may take a moment to deliver it.
    for _ in range(200):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child) and not log_path.exists()


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    server = VllmServer(tmp_path)
    server.executable = program
    with server, pytest.raises(DemoError, match="status 3") as raised:
        server.wait_ready(30)
    assert "no such model" in raised.value.detail


def test_a_server_inherits_no_settings_of_ours_and_gets_those_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCO2_ZONE", "DE")
    server = VllmServer(Path("model"), environment={"LLMCO2_PUE": "1.5"})
    assert "LLMCO2_ZONE" not in server.environment
    assert server.environment["LLMCO2_PUE"] == "1.5"


def converter(folder: Path, body: str) -> Path:
    script = folder / "convert.py"
    script.write_text(f"import sys\nfrom pathlib import Path\ntarget = Path(sys.argv[2])\n{body}\n")
    return script


def test_a_converted_model_is_made_once_and_then_found(tmp_path: Path) -> None:
    script = converter(tmp_path, "(target / 'config.json').write_text('{}')")
    folder = weights.model_folder(tmp_path / "cache" / "model", script)
    assert (folder / "config.json").read_text() == "{}"
    assert weights.model_folder(folder, tmp_path / "no-converter.py") == folder


def test_a_conversion_that_fails_leaves_nothing_behind_and_says_why(tmp_path: Path) -> None:
    script = converter(tmp_path, "(target / 'config.json').write_text('{}'); sys.exit('out of paper')")
    with pytest.raises(DemoError, match=r"convert\.py failed") as raised:
        weights.model_folder(tmp_path / "cache" / "model", script)
    assert "out of paper" in raised.value.detail
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".model.lock"]


def test_the_cache_follows_xdg_only_when_it_names_an_absolute_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache_folder() == Path("/somewhere/llmco2/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert weights.cache_folder() == Path.home() / ".cache" / "llmco2" / "models"


def test_a_busy_port_ends_the_command_with_one_line_and_status_one() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        result = CliRunner().invoke(main, ["demo", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: port ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists_and_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output


def test_help_imports_no_client_and_no_torch() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom llmco2_vllm.cli.main import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert not {'openai', 'torch', 'vllm', 'httpx'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
