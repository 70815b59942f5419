"""``llmco2 predict``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from llmco2_vllm.assemble import model_config, open_accountant, predictor_of
from llmco2_vllm.cli.options import FiniteRange
from llmco2_vllm.config import build_settings
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.telemetry.accounting import Accounting


@dataclass(frozen=True)
class Question:
    """What was asked for, as given on the command line."""

    model: Path
    device: str
    tp: int
    batch: int
    prompt: int
    output: int
    predictor: str
    intensity: float | None
    pue: float


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="config.json or its folder.")
@click.option("--device", required=True, help="Device of the catalog: h100-sxm, cpu, ...")
@click.option("--tp", default=1, type=click.IntRange(1), show_default=True, help="Tensor-parallel size.")
@click.option("--batch", default=1, type=click.IntRange(1), show_default=True, help="Requests that run together.")
@click.option("--prompt", required=True, type=click.IntRange(1), help="Prompt tokens of each request.")
@click.option("--output", required=True, type=click.IntRange(1), help="Output tokens of each request.")
@click.option("--predictor", default="gnn", show_default=True, help="gnn, roofline, or a bundle file.")
@click.option("--intensity", type=FiniteRange(0), help="g CO2e per kWh; the world average without it.")
@click.option("--pue", default=1.0, type=FiniteRange(1), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **options: Any) -> None:
    """Predict energy and carbon of a batch of requests: prefill, decode, interval."""
    try:
        found = predict(Question(**options))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table("", "seconds", "joules", "90 % interval, J", "g CO2e")
    for name in ("prefill", "decode", "total", "per_request"):
        row = found[name]
        low, high = row["interval_joules"]
        interval = f"{low:.4g} to {high:.4g}"
        table.add_row(name, f"{row['seconds']:.4g}", f"{row['joules']:.4g}", interval, f"{row['carbon_grams']:.4g}")
    console = Console()
    console.print(table)
    known = "" if found["in_distribution"] else "; outside of what the predictor was trained on"
    console.print(f"predicted by {found['predictor']}, not measured{known}", highlight=False)


def predict(q: Question) -> dict[str, Any]:
    """Joules, seconds, grams and interval of ``batch`` equal requests served together. Raises ValueError, OSError."""
    spec = ModelSpec.from_config(model_config(q.model))
    priced = predictor_of(q.predictor, spec, device_by_name(q.device), Topology(tensor_parallel=q.tp))
    accounting = open_accountant(build_settings(("options", {"intensity": q.intensity, "pue": q.pue}))).now()
    parts = {
        "prefill": _run(priced, _prefill_steps(q.batch, q.prompt)),
        "decode": _run(priced, _decode_steps(q.batch, q.prompt, q.output)),
    }
    total = [sum(values) for values in zip(*(part[:4] for part in parts.values()), strict=True)]
    found = {name: _figures(part[:4], accounting) for name, part in parts.items()}
    found["total"] = _figures(total, accounting)
    found["per_request"] = _figures([value / q.batch for value in total], accounting)
    known = all(part[4] for part in parts.values())
    return {**found, "basis": "predicted", "predictor": priced.name, "in_distribution": known}


def _prefill_steps(batch: int, prompt: int) -> list[tuple[float, BatchShape]]:
    pairs = batch * prompt * (prompt + 1) // 2
    return [(1.0, BatchShape(prefill=PhaseShape(batch, batch * prompt, pairs, batch * prompt, batch)))]


def _decode_steps(batch: int, prompt: int, output: int) -> list[tuple[float, BatchShape]]:
    """Steps after the first token, which the prefill samples; sixteen that stand for their neighbours."""
    steps = output - 1
    parts = min(16, steps)
    found = []
    for part in range(parts):
        first, end = steps * part // parts, steps * (part + 1) // parts
        context = prompt + (first + end + 1) // 2
        shape = PhaseShape(batch, batch, batch * context, batch * context, batch)
        found.append((float(end - first), BatchShape(decode=shape)))
    return found


def _run(predictor: Predictor, steps: list[tuple[float, BatchShape]]) -> tuple[float, float, float, float, bool]:
    """Seconds, joules, lower and upper joules, and whether all of it is in distribution."""
    seconds = joules = low = high = 0.0
    known = True
    for count, batch in steps:
        estimate = predictor.estimate(batch)
        seconds += count * estimate.duration_seconds
        joules += count * estimate.energy_joules
        low += count * estimate.energy_joules * estimate.lower_ratio
        high += count * estimate.energy_joules * estimate.upper_ratio
        known &= estimate.in_distribution
    return seconds, joules, low, high, known


def _figures(part: Any, accounting: Accounting) -> dict[str, Any]:
    seconds, joules, low, high = part
    grams = accounting.operational_grams(joules)
    return {"seconds": seconds, "joules": joules, "interval_joules": [low, high], "carbon_grams": grams}
