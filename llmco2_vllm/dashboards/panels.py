"""Panels as Grafana's JSON, in the manner of vLLM's own dashboards: schema 39, a grid of 24 columns.

What is not known is said in words: a tile without data reads "Not measured", never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmco2_vllm.dashboards.promql import RATE, families, mean, quantile

Json = dict[str, Any]
Query = tuple[str, str]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
NO_VALUE = "Not measured"
NEUTRAL: tuple[tuple[str, float | None], ...] = (("blue", None),)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
# Grafana's named colours follow its light and dark themes. A phase or a part of energy has the same in every panel.
COLOURS = {
    "prefill": "blue",
    "decode": "purple",
    "idle": "yellow",
    "awake": "yellow",
    "sleeping": "light-yellow",
    "requests": "blue",
    "busy": "blue",
    "aborted": "orange",
    "recomputed": "dark-orange",
    "rejected drafts": "light-orange",
    "embodied": "green",
    "measured": "blue",
    "metered": "blue",
    "predicted": "purple",
    "location": "blue",
    "market": "green",
    "p50": "light-blue",
    "p95": "blue",
    "p99": "dark-blue",
    "mean": "purple",
    "trusted": "blue",
    "not trusted": "orange",
}
# What a legend made of a label reads.
_VALUES = {
    "{{phase}}": ("prefill", "decode"),
    "{{phase_mix}}": ("prefill", "mixed", "decode"),
    "{{state}}": ("awake", "sleeping", "busy", "idle"),
    "{{basis}}": ("location", "market"),
}
_TOOLTIP = {"mode": "multi", "sort": "desc"}
_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_NO_TRAFFIC: Json = {"type": "special", "options": {"match": "nan", "result": {"index": 0, "text": "No traffic"}}}


def stat(title: str, text: str, query: str, unit: str, steps: Sequence[tuple[str, float | None]] = NEUTRAL) -> Json:
    """The last value with a sparkline. Only steps of several colours carry a judgement."""
    panel = _panel("stat", title, text, [(query, "__auto")])
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "thresholds"},
        "mappings": [_NO_TRAFFIC],
        "thresholds": _thresholds(steps),
        "unit": unit,
    }
    panel["options"] = {
        "colorMode": "none" if len(steps) == 1 else "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": _LAST,
        "textMode": "value",
    }
    return panel


def lines(title: str, text: str, queries: Sequence[Query], unit: str, **custom: Any) -> Json:
    """Lines over time. custom: of the fields, as stacking; ``min=None`` where values have either sign."""
    least = custom.pop("min", 0)
    panel = _panel("timeseries", title, text, queries)
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "palette-classic"},
        "custom": {"fillOpacity": 10, "lineWidth": 1, "showPoints": "never", **custom},
        "unit": unit,
        **({} if least is None else {"min": least}),
    }
    panel["fieldConfig"]["overrides"] = _coloured(queries)
    panel["options"] = {
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": _TOOLTIP,
    }
    return panel


def areas(title: str, text: str, queries: Sequence[Query], unit: str) -> Json:
    """Parts of a whole over time, one on the other."""
    return lines(title, text, queries, unit, fillOpacity=25, stacking={"group": "A", "mode": "normal"})


def judged(panel: Json, *steps: tuple[str, float | None]) -> Json:
    """The same with lines at the thresholds."""
    defaults = panel["fieldConfig"]["defaults"]
    defaults["thresholds"] = _thresholds(steps)
    defaults["custom"] |= {"thresholdsStyle": {"mode": "dashed"}}
    return panel


def percentiles(title: str, text: str, histogram: str, unit: str) -> Json:
    """Percentiles and the mean of a histogram over time."""
    queries = [(quantile(level, histogram), name) for name, level in QUANTILES.items()]
    return lines(title, text, [*queries, (mean(histogram, RATE), "mean")], unit)


def heatmap(title: str, text: str, query: str, unit: str) -> Json:
    """Buckets of a histogram over time."""
    panel = _panel("heatmap", title, text, [(query, "{{le}}")], format="heatmap")
    panel["options"] = {
        "calculate": False,
        "cellGap": 1,
        "color": {"exponent": 0.5, "fill": "blue", "mode": "scheme", "scale": "exponential", "scheme": "Blues"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "unit": unit},
    }
    return panel


def bars(title: str, text: str, queries: Sequence[Query], unit: str) -> Json:
    """Bars over the range shown."""
    panel = _panel("bargauge", title, text, queries, instant=True, range=False)
    panel["fieldConfig"]["defaults"] |= {"color": {"fixedColor": "blue", "mode": "fixed"}, "min": 0, "unit": unit}
    panel["fieldConfig"]["overrides"] = _coloured(queries)
    panel["options"] = {
        "displayMode": "basic",
        "namePlacement": "auto",
        "orientation": "horizontal",
        "reduceOptions": _LAST,
        "showUnfilled": False,
        "sizing": "auto",
        "valueMode": "text",
    }
    return panel


def table(title: str, text: str, labels: Mapping[str, str], columns: Sequence[tuple[str, str, str]]) -> Json:
    """One row for each value of ``labels``, which maps labels to headings; several columns (heading, query, unit)."""
    panel = _table(title, text, [query for _, query, _ in columns])
    # So Grafana names the columns of several queries.
    values = {f"Value #{chr(ord('A') + place)}": heading for place, (heading, _, _) in enumerate(columns)}
    panel["transformations"] = [{"id": "merge", "options": {}}, *_columns({**labels, **values})]
    panel["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
        for heading, _, unit in columns
    ]
    return panel


def information(title: str, text: str, query: str, labels: Mapping[str, str]) -> Json:
    """The labels of a metric that is 1, by their headings; its value says nothing."""
    panel = _table(title, text, [query])
    panel["transformations"] = _columns(labels)
    return panel


def states(title: str, text: str, queries: Sequence[Query], words: Mapping[str, tuple[str, str]]) -> Json:
    """Which state it was in; words: value to (text, colour)."""
    panel = _panel("state-timeline", title, text, queries)
    mapped = {
        value: {"text": word, "color": colour, "index": place}
        for place, (value, (word, colour)) in enumerate(words.items())
    }
    panel["fieldConfig"]["defaults"] |= {
        "color": {"fixedColor": "text", "mode": "fixed"},
        "mappings": [{"type": "value", "options": mapped}],
    }
    panel["options"] = {
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "never",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return panel


def _panel(kind: str, title: str, text: str, queries: Sequence[Query], **more: Any) -> Json:
    names = families(query for query, _ in queries)
    word = "Metric" if len(names) == 1 else "Metrics"
    targets = [
        {"datasource": DATASOURCE, "expr": query, "legendFormat": legend, "refId": chr(ord("A") + place), **more}
        for place, (query, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": f"{text}\n\n{word}: {', '.join(f'`{name}`' for name in names)}",
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"noValue": NO_VALUE}, "overrides": []},
        "targets": targets,
    }


def _table(title: str, text: str, queries: Sequence[str]) -> Json:
    now = {"instant": True, "range": False, "format": "table"}
    panel = _panel("table", title, text, [(query, "__auto") for query in queries], **now)
    panel["fieldConfig"]["defaults"] |= {
        "custom": {"align": "auto", "cellOptions": {"type": "auto"}},
        "mappings": [_NO_TRAFFIC],
        "unit": "none",
    }
    panel["options"] = {"cellHeight": "sm", "footer": {"show": False}, "showHeader": True}
    return panel


def _columns(shown: Mapping[str, str]) -> list[Json]:
    order = {name: place for place, name in enumerate(shown)}
    return [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(shown)}}},
        {"id": "organize", "options": {"indexByName": order, "renameByName": dict(shown)}},
    ]


def _thresholds(steps: Sequence[tuple[str, float | None]]) -> Json:
    return {"mode": "absolute", "steps": [{"color": colour, "value": value} for colour, value in steps]}


def _coloured(queries: Sequence[Query]) -> list[Json]:
    names: list[str] = []
    for _, legend in queries:
        names += _VALUES.get(legend, (legend,))
    return [_fixed(name) for name in dict.fromkeys(names) if name in COLOURS]


def _fixed(name: str) -> Json:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"fixedColor": COLOURS[name], "mode": "fixed"}}],
    }
