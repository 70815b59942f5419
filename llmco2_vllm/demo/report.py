"""The demo's report: one annotated response, a table of requests, the metrics, and what the figures are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.json import JSON
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmco2_vllm.demo.requests import ABORTED, Answer
from llmco2_vllm.demo.weights import ORIGIN

COLUMNS = ("request", "prefill tokens", "cached", "decode tokens", "prefill J", "decode J", "J", "90 % interval J")
MEASURED = "measured J (covered)"
GRAMS = "g CO2e"


def request_table(answers: Sequence[Answer]) -> Table:
    """One row per request: tokens, predicted joules of each phase, their interval and grams."""
    basis = sorted({answer.carbon["basis"] for answer in answers})
    table = Table(title=f"Requests ({', '.join(basis)} energy)", title_justify="left")
    for number, column in enumerate((*COLUMNS, GRAMS)):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number in (0, 7))
    metered = any("energy_joules" in answer.carbon for answer in answers)
    if metered:
        table.add_column(MEASURED, justify="right")
    for answer in answers:
        table.add_row(answer.name, *_cells(answer), *([_measured(answer)] if metered else []))
    return table


def _measured(answer: Answer) -> str:
    """Metered joules, and how much of the request they cover; what no window covers is predicted."""
    if "energy_joules" not in answer.carbon:
        return "-"
    return f"{answer.carbon['energy_joules']['value']:.3g} ({answer.carbon['coverage_ratio']:.0%})"


def _cells(answer: Answer) -> list[str]:
    tokens, estimate = answer.carbon["tokens"], answer.carbon["estimate"]
    joules = [estimate[key] for key in ("prefill_joules", "decode_joules", "energy_joules")]
    return [
        *(str(tokens[key]) for key in ("prefill", "cached", "decode")),
        *(f"{value:.3g}" for value in joules),
        f"{estimate['lower']:.3g} - {estimate['upper']:.3g}",
        f"{answer.carbon['carbon_grams']['operational']:.3g}",
    ]


def what_the_figures_are(answer: Answer) -> list[str]:
    """In words: predicted or measured, by what, and which model."""
    carbon = answer.carbon
    reason = f" ({carbon['meter_reason']})" if "meter_reason" in carbon else ""
    basis = "predicted by {} before each step runs, not measured."
    if "energy_joules" in carbon:
        basis = f"predicted by {{}} before each step runs, but for those under {MEASURED!r}, which grams rest on."
    lines = [
        f"Joules and grams above are {basis.format(carbon['predictor'])}",
        f"meter: {carbon['meter']}{reason}.",
    ]
    if not carbon["in_distribution"]:
        lines.append("in_distribution: false: the predictor was not calibrated on steps or hardware like these.")
    grid = carbon["intensity"]
    zone = f" in {grid['zone']}" if "zone" in grid else ""
    return [*lines, f"Grams from {grid['grams_per_kwh']} g CO2e/kWh{zone}, {grid['source']}.", f"Model: {ORIGIN}."]


def report(answers: Sequence[Answer], metrics: Sequence[str]) -> RenderableType:
    """The whole report; the first answer is the one shown in full."""
    shown = answers[0]
    aborted = next(line for line in metrics if line.startswith(ABORTED))
    return Group(
        Panel(JSON(json.dumps(shown.body)), title=f"One annotated response ({shown.name})", title_align="left"),
        request_table(answers),
        Text(f"\nThe client that hung up got no response; what it cost is in /metrics:\n  {aborted}\n"),
        Text("llmco2_* in /metrics (histogram buckets left out):"),
        *(Text(f"  {line}", overflow="fold") for line in metrics),
        Text(""),
        *(Text(line) for line in what_the_figures_are(shown)),
    )


def document(command_line: str, answers: Sequence[Answer], metrics: Sequence[str]) -> str:
    """The same as one JSON document."""
    everything = {
        "command": command_line,
        "model": ORIGIN,
        "response": answers[0].body,
        "requests": [
            {
                "name": answer.name,
                "text": answer.text,
                "duration_seconds": answer.duration_seconds,
                "carbon": answer.carbon,
            }
            for answer in answers
        ],
        "metrics": list(metrics),
    }
    return json.dumps(everything, indent=2)


def console(to_stderr: bool = False) -> Console:
    """A console wide enough for the table where no terminal says how wide it is."""
    screen = Console(stderr=to_stderr, highlight=False)
    return screen if screen.is_terminal else Console(stderr=to_stderr, highlight=False, width=120)
