"""What Grafana makes of a panel's query before it asks Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser

Panel = Mapping[str, Any]
# A duration that no query uses by itself, so that it can be told apart.
RATE_INTERVAL_SECONDS = 17.0
VARIABLES = {
    "$__rate_interval": "17s",
    "$__range": "60s",
    "$job": ".+",
    "$model_name": ".+",
    "$instance": ".+",
    "$engine": ".+",
}


def panels(dashboard: Mapping[str, Any]) -> Iterator[Panel]:
    """All panels but the rows."""
    for panel in dashboard["panels"]:
        yield from panel.get("panels", ())
        if panel["type"] != "row":
            yield panel


def targets(dashboard: Mapping[str, Any]) -> Iterator[tuple[Panel, str]]:
    """Panels and their queries, one by one."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel, target["expr"]


def substituted(query: str, values: Mapping[str, str] = VARIABLES) -> str:
    """With the dashboard's variables replaced, longest names first."""
    for name in sorted(values, key=len, reverse=True):
        query = query.replace(name, values[name])
    return query


def parsed(query: str) -> promql_parser.Expr:
    """The tree of a query with variables. Raises ValueError where it is no PromQL."""
    return promql_parser.parse(substituted(query))


def nodes(query: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every node of a query's tree with its ancestors, the nearest last."""
    found: list[tuple[Any, tuple[Any, ...]]] = []
    above: list[Any] = []

    def enter(node: Any) -> None:
        found.append((node, tuple(above)))
        above.append(node)

    promql_parser.walk(parsed(query), enter, lambda _: above.pop() and None)
    return found
