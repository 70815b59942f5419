"""``llmco2 plan``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from llmco2_vllm.assemble import model_config, predictor_of
from llmco2_vllm.cli.options import FiniteRange
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.sampling import Proposal, Sampling, proposals
from llmco2_vllm.training.table import Row, RowError, read_table
from llmco2_vllm.training.traffic import Candidate, Space, Traffic, kv_capacity_tokens

T = TypeVar("T")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LIMIT = click.IntRange(1)


@dataclass(frozen=True)
class Plan:
    """What was asked for, as given on the command line."""

    model: Path
    device: str
    tp: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_capacity_tokens: int | None
    trace: Path | None
    measured: Path | None
    count: int
    seed: int
    coverage_share: float


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="config.json or its folder.")
@click.option("--device", required=True, help="Device of the catalog: h100-sxm, cpu, ...")
@click.option("--tp", default=1, type=_LIMIT, show_default=True, help="Tensor-parallel size.")
@click.option("--max-num-seqs", default=256, type=_LIMIT, show_default=True, help="As given to vllm serve.")
@click.option("--max-num-batched-tokens", default=8192, type=_LIMIT, show_default=True, help="As given to vllm serve.")
@click.option(
    "--max-model-len", default=8192, type=click.IntRange(3), show_default=True, help="As given to vllm serve."
)
@click.option("--kv-capacity-tokens", type=_LIMIT, help="GPU KV cache size of vLLM's log; without it estimated.")
@click.option("--trace", type=_FILE, help="Requests served: CSV with t_s, input_tokens, output_tokens.")
@click.option(
    "--measured",
    type=_FILE,
    help="Steps measured so far: CSV with prefill_sequences, prefill_tokens, decode_sequences, context_tokens and "
    "relative_error, or energy_joules to compare with the prediction.",
)
@click.option("--count", default=20, type=_LIMIT, show_default=True, help="Steps to propose.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
@click.option("--coverage-share", default=0.2, type=FiniteRange(0, 1), show_default=True, help="For rare steps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **options: Any) -> None:
    """Say which steps to measure next, where error x traffic is largest and where nothing was measured."""
    plan = Plan(**options)
    predictor, space = _deployment(plan)
    seconds = _seconds(predictor)
    traffic = Traffic.uniform(space, plan.seed)
    if path := plan.trace:
        traffic = _checked("--trace", lambda: Traffic.from_trace(space, path, seconds))
    measured = _checked("--measured", lambda: read_measured(path, predictor)) if (path := plan.measured) else []
    found = proposals(space, traffic, measured, plan.count, Sampling(plan.seed, plan.coverage_share))
    if as_json:
        document = {
            "space": vars(space),
            "traffic": traffic.source,
            "predictor": predictor.name,
            "measured": len(measured),
            "proposals": [_fields(proposal, predictor) for proposal in found],
        }
        click.echo(json.dumps(document, indent=2))
        return
    screen = Console()
    screen.print(_table(found, predictor))
    note = f"traffic: {traffic.source}; {len(measured)} steps measured; cache of {space.kv_capacity_tokens} tokens"
    screen.print(f"{note}; predicted by {predictor.name}", highlight=False, markup=False)


def read_measured(path: Path, predictor: Predictor) -> list[tuple[Candidate, float]]:
    """Steps of a CSV file with their relative error: given, or predicted / measured joules - 1.

    Raises ValueError that names the line and column, or the missing column.
    """
    table = read_table(path)
    error = "relative_error" if "relative_error" in table.columns else "energy_joules"
    missing = [name for name in (*Candidate._fields, error) if name not in table.columns]
    if missing:
        wanted = f"{', '.join(Candidate._fields)}, and relative_error or energy_joules"
        raise ValueError(f"{path}: column {missing[0]} is missing; expected {wanted}")
    if table.bad_rows:
        raise ValueError(f"{path}: {table.bad_rows[0]}")
    found = []
    for row in table.rows:
        try:
            found.append(_measured_row(row, error, predictor))
        except RowError as failure:
            raise ValueError(f"{path}: line {row.line}, {failure}") from None
    return found


def _measured_row(row: Row, error: str, predictor: Predictor) -> tuple[Candidate, float]:
    counts = {name: row.number_or_zero(name) for name in Candidate._fields}
    for name, value in counts.items():
        if value != int(value):
            raise RowError(name, f"{row.text(name)!r} is not possible; expected a whole number")
    candidate = Candidate(**{name: int(value) for name, value in counts.items()})
    sequences, each, decoding, context = candidate
    if (sequences > 0) != (each > 0) or not sequences + decoding or (decoding and not context):
        raise RowError("prefill_sequences", f"{candidate} is no step: every request needs its tokens, decode a context")
    if error == "energy_joules":
        return candidate, predictor.estimate(candidate.batch).energy_joules / row.number(error) - 1
    return candidate, _signed(row.text(error))


def _signed(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise RowError("relative_error", f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise RowError("relative_error", f"{text!r} is not possible; expected a finite number")
    return value


def _deployment(plan: Plan) -> tuple[Predictor, Space]:
    topology = Topology(tensor_parallel=plan.tp)
    model = _checked("--model", lambda: ModelSpec.from_config(model_config(plan.model)))
    device = _checked("--device", lambda: device_by_name(plan.device))
    capacity = plan.kv_capacity_tokens or kv_capacity_tokens(model, device, topology)
    if not plan.kv_capacity_tokens and capacity < plan.max_model_len:
        raise click.ClickException(
            f"--tp {plan.tp}: {device.name} has room for {capacity} cached tokens beside the weights, one request may "
            f"need {plan.max_model_len}; raise --tp, lower --max-model-len or give --kv-capacity-tokens"
        )
    limits = (plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len, capacity)
    space = _checked("limits of the deployment", lambda: Space(*limits))
    return predictor_of("gnn", model, device, topology), space


def _seconds(predictor: Predictor) -> Callable[[Any], float]:
    return lambda batch: predictor.estimate(batch).duration_seconds


def _checked(option: str, read: Callable[[], T]) -> T:
    """What ``read`` returns; its failure as one line that names the option."""
    try:
        return read()
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{option}: {error}") from None


def _fields(proposal: Proposal, predictor: Predictor) -> dict[str, Any]:
    """One proposal for JSON; what is not known is left out."""
    estimate = predictor.estimate(proposal.candidate.batch)
    fields: dict[str, Any] = {
        **proposal.candidate._asdict(),
        "why": proposal.reason.value,
        "traffic_share_ratio": round(proposal.traffic_share, 6),
        "predicted_energy_joules": float(f"{estimate.energy_joules:.6g}"),
        "predicted_duration_seconds": float(f"{estimate.duration_seconds:.6g}"),
    }
    if proposal.expected_error is not None:
        fields["expected_error_ratio"] = round(proposal.expected_error, 6)
    return fields


def _table(found: list[Proposal], predictor: Predictor) -> Table:
    table = Table(title="Measure next")
    for name in ("#", "prefill", "tokens each", "decode", "context"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for name in ("expected error", "traffic", "predicted J"):
        table.add_column(name, justify="right")
    for number, proposal in enumerate(found, start=1):
        error = "-" if proposal.expected_error is None else f"{proposal.expected_error:.1%}"
        joules = predictor.estimate(proposal.candidate.batch).energy_joules
        counts = [str(value) if value else "-" for value in proposal.candidate]
        share = f"{proposal.traffic_share:.1%}"
        table.add_row(str(number), *counts, proposal.reason.value, error, share, f"{joules:.3g}")
    return table
