"""docs/metrics.md: the metric table, the recording rules and the alerts, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from llmco2_vllm.dashboards.dashboard import TITLE, dashboard
from llmco2_vllm.dashboards.panels import Json
from llmco2_vllm.dashboards.promql import families
from llmco2_vllm.dashboards.rules import ALERTS, RECORDS, RUNBOOKS
from llmco2_vllm.telemetry.metric_table import METRICS

# The list lies beside the runbooks.
BESIDE: Final = RUNBOOKS.rpartition("/")[2]
_HEAD = """\
# Metrics

Generated from the metric table by `llmco2 dashboards`; do not edit.

`/metrics` of a server with `--carbon` has these families beside vLLM's own. Energy is in joules, carbon in grams of
CO2e, time in seconds. What is not known has no series: without a meter no measured family has a value. Ratios are left
to the query, as in `rate(llmco2_energy_joules_total[5m]) / (rate(llmco2_tokens_total[5m]) > 0)`. Requests, idle,
sleeping and unattributed energy add up to `llmco2_metered_energy_joules_total`; anyone can check it.
"""
_LABELS = {
    "model_name": "first served name of the model",
    "engine": "number of the engine, which is its rank in data parallelism; `front_end` for failures there",
    "phase": "`prefill`: values known before, as of the prompt; `decode`: tokens just sampled, and drafts",
    "energy": "what energy has no grams: `requests`, `idle`, or `predicted` (of all steps)",
    "phase_mix": "what the work of a window was: `prefill`, `decode` or `mixed`",
    "state": "`awake` or `sleeping` of an engine without steps; `busy` or `idle` of embodied carbon",
    "trusted": "`yes` or `no`",
    "kind": "why a window is not trusted",
    "where": "part of the hook or the front end",
    "basis": "`location`: average of the grid; `market`: by contracts",
    "zone": "zone of the grid",
    "source": "provider of the intensity",
    "method": "`average` or `marginal`",
    "predictor": "bundle in use",
    "meter": "what reads energy",
    "version": "of llmco2-vllm",
    "vllm_version": "of vLLM",
}


def metrics_page(runbooks: str = BESIDE) -> str:
    """The page. runbooks: path or URL of theirs. Raises KeyError for a label without a meaning."""
    shown = _panels_by_family(dashboard()["panels"])
    metrics = [
        (
            f"`{name}`",
            metric.kind.__name__.lower(),
            _code(metric.labels),
            metric.help,
            "; ".join(shown.get(name, ["-"])),
        )
        for name, metric in sorted(METRICS.items())
    ]
    labels = sorted({label for metric in METRICS.values() for label in metric.labels})
    return "\n".join(
        (
            _HEAD,
            f"Panels are those of the dashboard `{TITLE}`.\n",
            _table(("metric", "type", "labels", "meaning", "panels"), metrics),
            "## Labels\n",
            _table(("label", "meaning"), [(f"`{label}`", _LABELS[label]) for label in labels]),
            "## Recording rules\n",
            _table(
                ("rule", "meaning", "expression"),
                [(f"`{record.name}`", record.help, f"`{record.expression}`") for record in RECORDS],
            ),
            "## Alerts\n",
            _table(
                ("alert", "severity", "after", "expression", "what to do"),
                [
                    (
                        alert.name,
                        alert.severity,
                        alert.lasting,
                        f"`{alert.expression}`",
                        f"[runbook]({alert.runbook(runbooks)})",
                    )
                    for alert in ALERTS
                ],
            ),
        )
    )


def _panels_by_family(panels: Iterable[Json]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for panel in panels:
        for name in families(target["expr"] for target in panel.get("targets", ())):
            found.setdefault(name, []).append(panel["title"])
    return found


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    # A bar would end the cell, also within code.
    cells = ((cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
