"""Every panel's queries as Grafana asks them, and their answers as files from which panels can be drawn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.dashboards.grafana import VARIABLES, Panel, panels, substituted
from tests.observability.scraping import Prometheus

ANSWERS = Path(__file__).resolve().parents[2] / "build" / "observability"
STEP_SECONDS = 1.0
# At one scrape a second Grafana would take four seconds; windows of the meter come in lumps, so somewhat more.
RATE_INTERVAL = "10s"


class Span(NamedTuple):
    """The range shown, in seconds since 1970."""

    begin: float
    end: float

    @property
    def variables(self) -> dict[str, str]:
        """What the dashboard's variables are replaced by."""
        shown = {"$__rate_interval": RATE_INTERVAL, "$__range": f"{max(1, round(self.end - self.begin))}s"}
        return {**VARIABLES, **shown}


def answered(prometheus: Prometheus, panel: Panel, span: Span) -> list[dict[str, Any]]:
    """The panel's targets with what Prometheus answers."""
    found = []
    for target in panel["targets"]:
        query = substituted(target["expr"], span.variables)
        instant = bool(target.get("instant"))
        result = (
            prometheus.query(query, span.end)
            if instant
            else prometheus.query_range(query, span.begin, span.end, STEP_SECONDS)
        )
        asked = {key: target[key] for key in ("refId", "legendFormat", "format") if key in target}
        found.append({**asked, "query": query, "resultType": "vector" if instant else "matrix", "result": result})
    return found


def values(result: list[dict[str, Any]]) -> Iterator[float]:
    """The finite values of an answer."""
    for series in result:
        for _, text in [series["value"]] if "value" in series else series["values"]:
            if math.isfinite(float(text)):
                yield float(text)


def keep(folder: Path, panel: Panel, results: list[dict[str, Any]]) -> None:
    """One file for a panel: what it is, and its answers; files of earlier runs go first."""
    _emptied(folder)
    parts = ("title", "type", "description", "fieldConfig", "options", "transformations", "gridPos")
    document = {**{key: panel[key] for key in parts if key in panel}, "results": results}
    slug = re.sub(r"[^a-z0-9]+", "-", panel["title"].lower()).strip("-")
    path = folder / f"{panel['id']:02d}-{slug}.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def _emptied(folder: Path) -> None:
    """The folder is there, and without files of panels; once a run, which keeps one file after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("[0-9][0-9]-*.json"):
        path.unlink()


def all_panels(dashboard: dict[str, Any]) -> list[Panel]:
    """The panels of a dashboard."""
    return list(panels(dashboard))
