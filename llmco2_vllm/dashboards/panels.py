"""Panels as Grafana's JSON, in the manner of vLLM's own dashboards: schema 39, a grid of 24 columns.

What is not known is said in words: a tile without data reads "Not measured", never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmco2_vllm.dashboards.colours import overrides
from llmco2_vllm.dashboards.promql import RATE, families, mean, quantile

Json = dict[str, Any]
Query = tuple[str, str]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
NO_VALUE = "Not measured"
NEUTRAL: tuple[tuple[str, float | None], ...] = (("blue", None),)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_TOOLTIP = {"mode": "multi", "sort": "desc"}
# lastNotNull would pass over NaN, back to when there was traffic.
_LAST = {"calcs": ["last"], "fields": "", "values": False}


def _special(match: str, text: str, index: int) -> Json:
    """Words for what is no number, in no colour that judges."""
    return {"type": "special", "options": {"match": match, "result": {"text": text, "color": "text", "index": index}}}


_NO_NUMBERS = [_special("nan", "No traffic", 0), _special("null", NO_VALUE, 1)]


def stat(title: str, text: str, query: str, unit: str, steps: Sequence[tuple[str, float | None]] = NEUTRAL) -> Json:
    """The last value with a sparkline. Only steps of several colours carry a judgement."""
    panel = _panel("stat", title, text, [(query, "__auto")])
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "thresholds"},
        "displayName": "now",
        "mappings": _NO_NUMBERS,
        "thresholds": _thresholds(steps),
        "unit": unit,
    }
    panel["options"] = {
        "colorMode": "none" if len(steps) == 1 else "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": _LAST,
        # Below a name the number lies above its sparkline; without one, on it.
        "textMode": "value_and_name",
    }
    return panel


def without_sparkline(tile: Json) -> Json:
    """The same as a number alone."""
    tile["options"] |= {"graphMode": "none", "textMode": "value"}
    return tile


def lines(title: str, text: str, queries: Sequence[Query], unit: str, **custom: Any) -> Json:
    """Lines over time. custom: of the fields, as stacking; ``min=None`` where values have either sign."""
    least = custom.pop("min", 0)
    panel = _panel("timeseries", title, text, queries)
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "palette-classic"},
        "custom": {"fillOpacity": 0 if len(queries) > 1 else 10, "lineWidth": 1, "showPoints": "never", **custom},
        "unit": unit,
        **({} if least is None else {"min": least}),
    }
    panel["fieldConfig"]["overrides"] = overrides(legend for _, legend in queries)
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
    panel["fieldConfig"]["overrides"] = overrides(legend for _, legend in queries)
    panel["options"] = {
        "displayMode": "basic",
        "namePlacement": "auto",
        "orientation": "horizontal",
        "reduceOptions": _LAST,
        "showUnfilled": False,
        "sizing": "auto",
        "text": {"titleSize": 12, "valueSize": 16},
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
    """Which state it was in; words: value to (text, colour). NaN reads "unknown", in no colour that judges."""
    panel = _panel("state-timeline", title, text, queries)
    mapped = {
        value: {"text": word, "color": colour, "index": place}
        for place, (value, (word, colour)) in enumerate(words.items())
    }
    panel["fieldConfig"]["defaults"] |= {
        "color": {"fixedColor": "text", "mode": "fixed"},
        "mappings": [{"type": "value", "options": mapped}, _special("nan", "unknown", len(mapped))],
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
        "mappings": _NO_NUMBERS,
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
