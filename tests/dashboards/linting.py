"""The rules of Grafana's dashboard-linter that concern Prometheus, in Python, by their published descriptions.

Each rule yields (where, what): the panel or variable that breaks it, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from promql_parser import Call, MatrixSelector, VectorSelector

from tests.dashboards.grafana import RATE_INTERVAL_SECONDS, nodes, panels, parsed, substituted, targets

Dashboard = Mapping[str, Any]
Finding = tuple[str, str]
Rule = Callable[[Dashboard], Iterator[Finding]]
SOURCES = ("$datasource", "${datasource}")
JUDGED_KINDS = ("stat", "graph", "table", "timeseries", "gauge")
# Of Grafana's units, those that this project may want.
UNITS = {
    *("none", "string", "short", "percent", "percentunit", "sci", "bool", "bool_yes_no", "bool_on_off"),
    *("watt", "kwatt", "watth", "kwatth", "joule", "massmg", "massg", "masskg", "masst"),
    *("s", "ms", "µs", "ns", "m", "h", "d", "dtdurations", "cps", "ops", "reqps", "rps", "hertz"),
}
RATES = ("rate", "irate", "increase")


def variables(dashboard: Dashboard) -> list[Mapping[str, Any]]:
    """The dashboard's variables."""
    found: list[Mapping[str, Any]] = dashboard["templating"]["list"]
    return found


def template_datasource(dashboard: Dashboard) -> Iterator[Finding]:
    """The data source is a variable of the expected name and label."""
    sources = [v for v in variables(dashboard) if v["type"] == "datasource"]
    if not sources:
        yield "dashboard", "has no variable for the data source"
    for source in sources:
        if (source["name"], source["label"]) != ("datasource", "Data source"):
            yield source["name"], "is not named datasource, Data source"
        if source["query"] != "prometheus":
            yield source["name"], "is not Prometheus"


def _templated(dashboard: Dashboard, name: str) -> Iterator[Finding]:
    found = [v for v in variables(dashboard) if v["name"] == name]
    if not found:
        yield name, "is no variable"
    for variable in found:
        if variable["datasource"]["uid"] not in SOURCES:
            yield name, "has another data source"
        if variable["type"] != "query" or not variable["multi"]:
            yield name, "is no query with several values"
        if variable["label"] != name.title():
            yield name, f"has the label {variable['label']}"
        if variable.get("allValue") != ".+":
            yield name, "has another allValue than .+"


def template_job(dashboard: Dashboard) -> Iterator[Finding]:
    """There is a variable for the job."""
    yield from _templated(dashboard, "job")


def template_instance(dashboard: Dashboard) -> Iterator[Finding]:
    """There is a variable for the instance."""
    yield from _templated(dashboard, "instance")


def template_label_promql(dashboard: Dashboard) -> Iterator[Finding]:
    """Queries of variables are label_values of something that parses."""
    for variable in variables(dashboard):
        if variable["type"] != "query":
            continue
        query = variable["query"]
        inner = query.removeprefix("label_values(").removesuffix(")").rpartition(",")[0]
        if not query.startswith("label_values(") or not inner:
            yield variable["name"], f"is no label_values: {query}"
        elif (problem := _parse_error(inner)) is not None:
            yield variable["name"], problem


def template_on_time_change_reload(dashboard: Dashboard) -> Iterator[Finding]:
    """Variables are asked for anew when the range changes."""
    for variable in variables(dashboard):
        if variable["type"] == "query" and variable["refresh"] != 2:
            yield variable["name"], "is not refreshed on change of the range"


def panel_datasource(dashboard: Dashboard) -> Iterator[Finding]:
    """Panels ask the data source of the variable."""
    for panel in panels(dashboard):
        for asked in (panel, *panel["targets"]):
            if asked["datasource"]["uid"] not in SOURCES:
                yield panel["title"], "asks another data source"


def panel_title_description(dashboard: Dashboard) -> Iterator[Finding]:
    """Panels say what they show."""
    for panel in panels(dashboard):
        if not panel.get("title") or not panel.get("description"):
            yield str(panel.get("title") or panel["id"]), "has no title or no description"


def panel_units(dashboard: Dashboard) -> Iterator[Finding]:
    """Panels have a unit that Grafana knows."""
    for panel in panels(dashboard):
        if panel["type"] in JUDGED_KINDS:
            config = panel["fieldConfig"]
            properties = [item for override in config["overrides"] for item in override["properties"]]
            units = {config["defaults"].get("unit", ""), *(p["value"] for p in properties if p["id"] == "unit")}
            for unit in sorted(units - UNITS):
                yield panel["title"], f"has the unit {unit!r}"


def panel_no_targets(dashboard: Dashboard) -> Iterator[Finding]:
    """Panels ask for something."""
    for panel in panels(dashboard):
        if not panel.get("targets"):
            yield panel["title"], "has no targets"


def target_promql(dashboard: Dashboard) -> Iterator[Finding]:
    """Queries are PromQL."""
    for panel, query in targets(dashboard):
        if (problem := _parse_error(query)) is not None:
            yield panel["title"], problem


def target_rate_interval(dashboard: Dashboard) -> Iterator[Finding]:
    """Rates are taken over the interval that Grafana chooses."""
    for panel, query in targets(dashboard):
        for node, above in nodes(query):
            if isinstance(node, MatrixSelector) and node.range.total_seconds() != RATE_INTERVAL_SECONDS:
                name = above[-1].func.name if above and isinstance(above[-1], Call) else ""
                if name in ("rate", "irate"):
                    yield panel["title"], f"takes a rate over another range: {query}"


def _matched(dashboard: Dashboard, label: str) -> Iterator[Finding]:
    for panel, query in targets(dashboard):
        for node, _ in nodes(query):
            if isinstance(node, VectorSelector):
                given = [(str(m.op), m.value) for m in node.matchers.matchers if m.name == label]
                if given != [("MatchOp.Re", substituted(f"${label}"))]:
                    yield panel["title"], f"{node.name} is not restricted to the {label}"


def target_job(dashboard: Dashboard) -> Iterator[Finding]:
    """Every selector has the variable job."""
    yield from _matched(dashboard, "job")


def target_instance(dashboard: Dashboard) -> Iterator[Finding]:
    """Every selector has the variable instance."""
    yield from _matched(dashboard, "instance")


def target_counter_agg(dashboard: Dashboard) -> Iterator[Finding]:
    """Counters stand in a rate, irate or increase."""
    for panel, query in targets(dashboard):
        for node, above in nodes(query):
            if isinstance(node, VectorSelector) and (node.name or "").endswith("_total"):
                call = above[-2] if len(above) > 1 else None
                ranged = above and isinstance(above[-1], MatrixSelector)
                if not (ranged and isinstance(call, Call) and call.func.name in RATES):
                    yield panel["title"], f"{node.name} is a counter without a rate"


def uneditable(dashboard: Dashboard) -> Iterator[Finding]:
    """It cannot be edited."""
    if dashboard["editable"]:
        yield "dashboard", "is editable"


def _parse_error(query: str) -> str | None:
    try:
        parsed(query)
    except ValueError as error:
        return f"{query}: {error}"
    return None


RULES: tuple[Rule, ...] = (
    template_datasource,
    template_job,
    template_instance,
    template_label_promql,
    template_on_time_change_reload,
    panel_datasource,
    panel_title_description,
    panel_units,
    panel_no_targets,
    target_promql,
    target_rate_interval,
    target_job,
    target_instance,
    target_counter_agg,
    uneditable,
)
