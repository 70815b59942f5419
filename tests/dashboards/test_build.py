"""What is generated is what is kept, lies where it is said to, and a stale file is named."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from llmco2_vllm.cli.main import main
from llmco2_vllm.dashboards import build
from llmco2_vllm.dashboards.rules import ALERTS, RECORDS
from llmco2_vllm.telemetry.metric_table import METRICS

EXAMPLES = build.CHECKOUT / "examples" / "observability"


def run(*arguments: str) -> tuple[int, str]:
    answer = CliRunner().invoke(main, ["dashboards", *arguments])
    return answer.exit_code, answer.output


def test_the_files_of_the_checkout_are_what_would_be_written() -> None:
    assert run("--check") == (0, "")


def test_what_is_generated_is_part_of_the_package() -> None:
    kept = files("llmco2_vllm").joinpath("dashboards/generated")
    assert json.loads(kept.joinpath(build.GRAFANA).read_text(encoding="utf-8"))["uid"] == "vllm-energy"
    for name in (build.RECORDING, build.ALERTS):
        assert yaml.safe_load(kept.joinpath(name).read_text(encoding="utf-8"))["groups"]


def test_a_folder_gets_all_of_it_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    status, output = run("-o", str(tmp_path))
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert (status, written) == (0, set(build.documents()))
    assert len(output.splitlines()) == len(written)
    assert run("-o", str(tmp_path)) == (0, "")


@pytest.mark.parametrize("name", build.documents())
def test_a_file_that_is_stale_or_missing_has_a_line_of_its_own(name: str, tmp_path: Path) -> None:
    run("-o", str(tmp_path))
    path = tmp_path / name
    for spoil in (lambda: path.write_text("old"), lambda: path.write_bytes(b"\xff\xfe"), path.unlink):
        spoil()
        assert run("-o", str(tmp_path), "--check") == (1, f"{path}: stale; run llmco2 dashboards\n")
    assert not path.exists(), "--check writes nothing"


def test_alerts_refer_to_the_runbooks_where_operators_read_them(tmp_path: Path) -> None:
    address = "https://wiki.example.org/carbon/runbooks"
    assert run("-o", str(tmp_path), "--runbooks-url", address)[0] == 0
    (group,) = yaml.safe_load((tmp_path / build.ALERTS).read_text())["groups"]
    referred = [rule["annotations"]["runbook_url"] for rule in group["rules"]]
    assert referred == [f"{address}#{alert.name.lower()}" for alert in ALERTS]
    page = (tmp_path / build.PAGE).read_text()
    assert all(f"[runbook]({url})" in page for url in referred) and "runbooks.md#" not in page
    assert run("-o", str(tmp_path), "--runbooks-url", address, "--check") == (0, "")
    stale = {f"{tmp_path / name}: stale; run llmco2 dashboards" for name in (build.ALERTS, build.PAGE)}
    assert set(run("-o", str(tmp_path), "--check")[1].splitlines()) == stale


@pytest.mark.parametrize("address", ["", "docs/runbooks.md", "ftp://a/b", "https://", "https://a/b#c", "https://a b"])
def test_what_is_no_address_of_a_page_is_refused_and_nothing_is_written(address: str, tmp_path: Path) -> None:
    status, output = run("-o", str(tmp_path / "new"), "--runbooks-url", address)
    assert status == 2 and f"Invalid value for '--runbooks-url': {address!r} is not possible; allowed: " in output
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "grafana").write_text("a file")
    status, output = run("-o", str(tmp_path))
    assert (status, len(output.splitlines())) == (1, 1)
    assert str(tmp_path / "grafana") in output


def test_outside_a_checkout_a_folder_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHECKOUT", tmp_path)
    status, output = run()
    assert (status, output) == (1, f"Error: -o: {tmp_path} is no checkout of the project; give a folder to write to\n")


def test_the_page_lists_every_metric_label_rule_and_alert() -> None:
    page = build.documents()[build.PAGE]
    for name, metric in METRICS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert metric.help in line
        assert metric.kind.__name__.lower() in line
        for label in metric.labels:
            assert f"| `{label}` |" in page
    assert all(f"`{record.name}`" in page for record in RECORDS)
    assert all(f"| {alert.name} |" in page for alert in ALERTS)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("| `llmco2_")}
    assert widths == {6}, "five columns"


def test_the_example_mounts_and_loads_what_is_generated() -> None:
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
    mounts = [mount for service in compose["services"].values() for mount in service["volumes"]]
    for mount in mounts:
        source = re.sub(r"\$\{LLMCO2_DASHBOARDS:-(.*?)\}", r"\1", mount).split(":")[0]
        assert (EXAMPLES / source).exists(), source
    prometheus = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    assert prometheus["rule_files"] == ["/etc/prometheus/rules/*.yaml"]
    assert prometheus["scrape_configs"][0]["job_name"] == "vllm"
    provider = yaml.safe_load((EXAMPLES / "grafana/provisioning/dashboards/vllm.yaml").read_text())["providers"][0]
    assert any(mount.split(":")[-2] == provider["options"]["path"] for mount in mounts)
