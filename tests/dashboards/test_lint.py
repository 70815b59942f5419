"""The dashboard keeps to the rules of Grafana's linter, but for exceptions that have reasons, and to our own."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.dashboards import colours
from llmco2_vllm.dashboards.dashboard import dashboard
from llmco2_vllm.dashboards.promql import families
from llmco2_vllm.telemetry.metric_table import METRICS
from tests.dashboards import linting
from tests.dashboards.grafana import panels, targets

DASHBOARD = dashboard()
OUR_UNITS = {"joule", "watt", "massg", "percentunit", "s", "short", "cps", "none"}
# (rule, where, what): why.
EXCEPTIONS = {
    ("template_job", "job", "has another allValue than .+"): "as vLLM's dashboards, whose variables it shares",
    ("template_instance", "instance", "has another allValue than .+"): "as vLLM's dashboards",
    ("panel_units", "Grid intensity", "has the unit 'suffix:g/kWh'"): "Grafana has no unit of mass per energy",
    ("uneditable", "dashboard", "is editable"): "as vLLM's dashboards: people adapt them",
}
# Metrics that no panel shows: why.
NOT_SHOWN: dict[str, str] = {}


@pytest.mark.parametrize("rule", linting.RULES, ids=lambda rule: rule.__name__)
def test_the_linters_rules_hold_but_for_exceptions_with_reasons(rule: linting.Rule) -> None:
    expected = {(where, what) for name, where, what in EXCEPTIONS if name == rule.__name__}
    assert set(rule(DASHBOARD)) == expected


def broken(rule: str) -> dict[str, Any]:
    """The dashboard with one thing wrong that the rule is there to find."""
    found = copy.deepcopy(DASHBOARD)
    stat = next(
        panel for panel in found["panels"] if panel["type"] == "stat" and "rate(" in panel["targets"][0]["expr"]
    )
    target, variables = stat["targets"][0], {v["name"]: v for v in found["templating"]["list"]}
    changes = {
        "template_datasource": lambda: variables["datasource"].update(name="source"),
        "template_job": lambda: variables["job"].update(multi=False),
        "template_instance": lambda: variables["instance"].update(type="custom"),
        "template_label_promql": lambda: variables["engine"].update(query="label_values(a{b}, engine)"),
        "template_on_time_change_reload": lambda: variables["engine"].update(refresh=1),
        "panel_datasource": lambda: target.update(datasource={"uid": "mine"}),
        "panel_title_description": lambda: stat.update(description=""),
        "panel_units": lambda: stat["fieldConfig"]["defaults"].update(unit="joules"),
        "panel_no_targets": lambda: stat.update(targets=[]),
        "target_promql": lambda: target.update(expr="sum(rate("),
        "target_rate_interval": lambda: target.update(expr=target["expr"].replace("$__rate_interval", "5m")),
        "target_job": lambda: target.update(expr=target["expr"].replace('job=~"$job", ', "")),
        "target_instance": lambda: target.update(expr=target["expr"].replace("$instance", "here")),
        "target_counter_agg": lambda: target.update(expr=re.sub(r"rate\((.*?)\[.*?\]\)", r"\1", target["expr"])),
        "uneditable": lambda: found.update(editable=True),
    }
    changes[rule]()
    return found


@pytest.mark.parametrize("rule", linting.RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_what_it_is_for(rule: linting.Rule) -> None:
    known = set(rule(DASHBOARD)) if rule.__name__ != "uneditable" else set()
    assert set(rule(broken(rule.__name__))) - known


def test_every_metric_of_the_table_is_shown_or_has_a_reason_not_to_be() -> None:
    shown = set(families(query for _, query in targets(DASHBOARD)))
    assert set(METRICS) - shown == set(NOT_SHOWN)


def test_a_panel_cannot_ask_for_a_metric_that_is_not_there() -> None:
    for name in ("llmco2_power_watt", "llmco2_steps_total_bucket", "llmco2_request_energy_joules_total"):
        with pytest.raises(ValueError, match=f"{name}: no such metric"):
            families([f"sum({name})"])


@pytest.mark.parametrize("panel", list(panels(DASHBOARD)), ids=lambda panel: panel["title"])
def test_a_panel_says_its_metrics_its_unit_and_what_it_shows_when_nothing_is_measured(panel: dict[str, Any]) -> None:
    names = families(target["expr"] for target in panel["targets"])
    word = "Metric: " if len(names) == 1 else "Metrics: "
    assert panel["description"].endswith("\n\n" + word + ", ".join(f"`{name}`" for name in names))
    assert panel["fieldConfig"]["defaults"]["noValue"] == "Not measured"
    unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"].get("yAxis", {}).get("unit")
    assert unit in OUR_UNITS | {"suffix:g/kWh"} or panel["type"] == "state-timeline"
    assert not [target for target in panel["targets"] if "vector(0)" in target["expr"]], "unknown is never 0"


@pytest.mark.parametrize("panel", list(panels(DASHBOARD)), ids=lambda panel: panel["title"])
def test_no_two_series_of_a_panel_have_one_colour(panel: dict[str, Any]) -> None:
    if panel["type"] not in ("timeseries", "bargauge"):
        return
    named = [name for target in panel["targets"] for name in colours.names(target["legendFormat"])]
    rules = {
        rule["matcher"]["options"]: rule["properties"][0]["value"]["fixedColor"]
        for rule in panel["fieldConfig"]["overrides"]
    }
    assert len(set(rules.values())) == len(rules), rules
    left = [name for name in named if name not in rules and not name.startswith(colours.FAILURES)]
    assert not left or named == left == ["{{instance}} · engine {{engine}}"], "or Grafana's palette chooses"


STATES = [panel for panel in panels(DASHBOARD) if panel["type"] == "state-timeline"]


@pytest.mark.parametrize("panel", STATES, ids=lambda panel: panel["title"])
def test_a_state_that_is_not_known_has_a_word_and_no_colour_that_judges(panel: dict[str, Any]) -> None:
    values, special = panel["fieldConfig"]["defaults"]["mappings"]
    assert set(values["options"]) == {"0", "1"}
    assert special["type"] == "special" and special["options"]["match"] == "nan"
    unknown = special["options"]["result"]
    assert (unknown["text"], unknown["color"]) == ("unknown", "text")
    assert unknown["index"] not in {word["index"] for word in values["options"].values()}


def test_every_fault_of_a_meter_has_a_colour_of_its_own() -> None:
    faults = {f"fault: {doubt}" for doubt in Doubt if doubt is not Doubt.NONE}
    assert {name for name in colours.COLOURS if name.startswith("fault: ")} == faults


def test_titles_and_numbers_of_panels_are_unlike_and_panels_lie_beside_each_other() -> None:
    found = list(panels(DASHBOARD))
    assert len({panel["title"] for panel in found}) == len(found)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_it_stands_beside_the_dashboards_of_the_host() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("vllm-energy", "vLLM / Energy and Carbon")
    assert (DASHBOARD["schemaVersion"], DASHBOARD["id"], DASHBOARD["tags"]) == (39, None, ["vllm"])
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "model_name", "instance", "engine", "filters"]
    (link,) = DASHBOARD["links"]
    assert (link["tags"], link["includeVars"], link["keepTime"]) == (["vllm"], True, True)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Requests", "Where energy goes", "Grid", "Trust"]
