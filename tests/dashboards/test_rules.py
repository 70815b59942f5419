"""Recording and alert rules: promtool reads them, its unit tests hold, and each alert has a runbook."""

from __future__ import annotations

import re
from pathlib import Path

import promql_parser
import pytest
import yaml

from llmco2_vllm.dashboards import build
from llmco2_vllm.dashboards.promql import families
from llmco2_vllm.dashboards.rules import ALERTS, RECORDS, Alert, Record
from tests.prometheus import Promtool, promtool

__all__ = ["promtool"]

UNIT_TESTS = Path(__file__).with_name("rules_test.yaml")
RULES = [build.PACKAGE / "generated" / name for name in (build.RECORDING, build.ALERTS)]


def test_promtool_reads_the_rules(promtool: Promtool) -> None:
    answer = promtool("check", "rules", *RULES)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{len(RECORDS)} rules found" in answer.stdout
    assert f"{len(ALERTS)} rules found" in answer.stdout


def test_joules_derived_by_hand_come_out_of_the_rules(promtool: Promtool) -> None:
    answer = promtool("test", "rules", UNIT_TESTS)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_rule_has_a_unit_test_and_every_alert_one_where_it_fires_and_one_where_not() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    asked = [item["expr"] for test in tests for item in test.get("promql_expr_test", ())]
    for record in RECORDS:
        assert any(record.name in expression for expression in asked), record.name
    fired = [
        (item["alertname"], bool(item["exp_alerts"])) for test in tests for item in test.get("alert_rule_test", ())
    ]
    for alert in ALERTS:
        assert {(alert.name, True), (alert.name, False)} <= set(fired), alert.name


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_is_named_for_its_level_its_metric_and_its_operations(record: Record) -> None:
    level, metric, operations = record.name.split(":")
    assert level in ("model", "engine")
    assert metric.startswith("llmco2_")
    assert not metric.endswith("_total"), "a rate is no counter"
    assert re.fullmatch(r"(ratio_)?rate\d+[mh]", operations)


@pytest.mark.parametrize("rule", [*RECORDS, *ALERTS], ids=lambda rule: rule.name)
def test_a_rule_asks_for_what_there_is(rule: Record | Alert) -> None:
    promql_parser.parse(rule.expression)
    recorded = set(re.findall(r"\w+:\w+:\w+", rule.expression))
    assert recorded <= {record.name for record in RECORDS}
    assert families([rule.expression]) or recorded


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_has_a_severity_a_summary_and_a_runbook(alert: Alert) -> None:
    assert alert.severity in ("info", "warning", "critical")
    assert alert.summary
    path, _, anchor = alert.runbook().partition("#")
    headings = re.findall(r"^## (.+)$", (build.CHECKOUT / path).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
