"""``llmco2 calibrate``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmco2_vllm.assemble import model_config, predictor_of
from llmco2_vllm.cli.failures import one_line_failures
from llmco2_vllm.cli.options import FiniteRange
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import Topology, device_by_name, device_names
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.deployment import SCHEMA, SUFFIX, Calibration, Identity, Point
from llmco2_vllm.training.calibrate import Campaign, calibrate, fit, scores
from llmco2_vllm.training.sampling import Proposal, Sampling, proposals
from llmco2_vllm.training.traffic import Space, Traffic, kv_capacity_tokens

if TYPE_CHECKING:
    # httpx is no dependency of the package: it comes with vLLM, or with the extra of the demo.
    from llmco2_vllm.training.driver import LiveServer

T = TypeVar("T")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LIMIT = click.IntRange(1)
ROUNDS = 4
# With a budget of time alone: as many as fit.
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Request:
    """What was asked for, as given on the command line."""

    url: str
    api_key: str
    model: Path | None
    dtype: str | None
    tp: int
    pp: int
    expert_parallel: bool
    trace: Path | None
    rounds: int | None
    per_round: int
    budget_minutes: float | None
    target_error: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    kv_capacity_tokens: int | None
    decode_steps: int
    seed: int
    coverage_share: float
    busy_ok: bool


@dataclass(frozen=True)
class Deployment:
    """The server as it describes itself, completed by the command line."""

    status: Mapping[str, Any]
    model: ModelSpec
    identity: Identity
    campaign: Campaign
    max_model_len: int


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A vllm serve with --carbon.")
@click.option("--api-key", default="", envvar="VLLM_API_KEY", help="Of the server; or VLLM_API_KEY.")
@click.option(
    "--model", type=click.Path(exists=True, path_type=Path), help="config.json or its folder; without it the server's."
)
@click.option("--dtype", help="As given to vllm serve; without it as config.json says.")
@click.option("--tp", default=1, type=_LIMIT, show_default=True, help="Tensor-parallel size.")
@click.option("--pp", default=1, type=_LIMIT, show_default=True, help="Pipeline-parallel size.")
@click.option("--expert-parallel", is_flag=True, help="Experts are spread over the ranks.")
@click.option("--trace", type=_FILE, help="Requests served: CSV with t_s, input_tokens, output_tokens.")
@click.option("--rounds", type=_LIMIT, help=f"{ROUNDS} without a budget.")
@click.option("--per-round", default=6, type=_LIMIT, show_default=True, help="Step mixes to measure before learning.")
@click.option("--budget-minutes", type=FiniteRange(0, min_open=True), help="No step mix begins after so long.")
@click.option("--target-error", default=0.0, type=FiniteRange(0), help="Stop at this mean relative error: 0.05 is 5 %.")
@click.option("--max-num-seqs", default=256, type=_LIMIT, show_default=True, help="As given to vllm serve, or less.")
@click.option("--max-num-batched-tokens", default=8192, type=_LIMIT, show_default=True, help="As given, or less.")
@click.option("--max-model-len", type=click.IntRange(3), help="Less than the server's.")
@click.option("--kv-capacity-tokens", type=_LIMIT, help="Less than the server's.")
@click.option("--decode-steps", default=64, type=click.IntRange(4), show_default=True, help="Of each decode mix.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
@click.option("--coverage-share", default=0.2, type=FiniteRange(0, 1), show_default=True, help="For rare steps.")
@click.option("--busy-ok", is_flag=True, help="Measure although other requests run.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The calibration to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plan-only", is_flag=True, help="Say what would be measured first.")
def command(output: Path | None, as_json: bool, plan_only: bool, **options: Any) -> None:
    """Measure a running server where error x traffic is largest, and write what corrects its predictions.

    The server must be idle otherwise: it is sent requests of random tokens. It reads the file back with
    --carbon-config.calibration FILE.
    """
    request = Request(**options)
    if output is None and not plan_only:
        raise click.UsageError("give -o FILE for the calibration, or --plan-only")
    with one_line_failures():
        from llmco2_vllm.training.driver import DriverError, LiveServer

        try:
            with LiveServer(request.url, request.api_key) as server:
                deployment = _deployment(request, server)
                if output is None or plan_only:
                    _print_plan(deployment.campaign, as_json)
                    return
                points, failure = _measured(request, deployment, server, Console(stderr=as_json))
        except DriverError as error:
            raise click.ClickException(str(error)) from None
    if not points:
        raise click.ClickException(failure or "no step mix could be measured; is the server otherwise idle?")
    found = _calibration(deployment, points)
    _checked("-o", lambda: found.save(output))
    _print(found, output, as_json)
    if failure:
        raise click.ClickException(f"{failure}; the {len(points)} step mixes measured before are in {output}")


def _deployment(request: Request, server: LiveServer) -> Deployment:
    card, status = server.card(), server.status()
    predictor = str(status["predictor"])
    if predictor.endswith(SUFFIX):
        raise click.ClickException(
            f"{request.url}: {predictor} is calibrated already; start the server without --carbon-config.calibration"
        )
    root = request.model or Path(card.get("root") or "")
    if not root.exists() or root == Path():
        raise click.ClickException(f"--model: {card.get('root')!r} is no file here; give the model's config.json")
    config = _checked("--model", lambda: model_config(root))
    if request.dtype:
        config["dtype"] = request.dtype
    model = _checked("--model", lambda: ModelSpec.from_config(config))
    device = _device_name(predictor)
    engines = len(status["engines"])
    topology = Topology(request.tp, request.pp, engines, request.expert_parallel)
    names = {"model_name": server.model, "vllm_version": str(status.get("vllm_version", ""))}
    identity = Identity.of(model, device, topology).model_copy(update=names)
    limit = card.get("max_model_len") or request.max_model_len
    if limit is None:
        raise click.ClickException("--max-model-len: the server does not tell it; give it as given to vllm serve")
    space = _space(request, limit, server, lambda: kv_capacity_tokens(model, device_by_name(device), topology))
    traffic = _traffic(request, space, lambda: predictor_of("gnn", model, device_by_name(device), topology))
    rounds = request.rounds or (MOST_ROUNDS if request.budget_minutes else ROUNDS)
    sampling = Sampling(request.seed, request.coverage_share)
    campaign = Campaign(space, traffic, rounds, request.per_round, request.target_error, sampling)
    return Deployment(status, model, identity, campaign, limit)


def _space(request: Request, limit: int, server: LiveServer, estimated: Callable[[], int]) -> Space:
    """The limits of the deployment: the server's own, and the command line's where they are narrower."""
    told = server.kv_capacity_tokens() or estimated()
    capacity = min(told, request.kv_capacity_tokens or told)
    length = min(limit, request.max_model_len or limit)
    limits = (request.max_num_seqs, request.max_num_batched_tokens, length, capacity)
    return _checked("limits of the deployment", lambda: Space(*limits))


def _traffic(request: Request, space: Space, predictor: Callable[[], Predictor]) -> Traffic:
    """That of the trace, its steps as long as predicted; without one nothing is known."""
    path = request.trace
    if path is None:
        return Traffic.uniform(space, request.seed)
    priced = _checked("--model", predictor)
    return _checked(
        "--trace", lambda: Traffic.from_trace(space, path, lambda batch: priced.estimate(batch).duration_seconds)
    )


def _device_name(predictor: str) -> str:
    """The catalog name a predictor's name ends in, the longest that fits."""
    found = [name for name in ("cpu", *device_names()) if predictor.endswith(f"-{name}")]
    if not found:
        raise click.ClickException(f"predictor {predictor!r} of the server names no device of this version's catalog")
    return max(found, key=len)


def _measured(
    request: Request, deployment: Deployment, server: LiveServer, screen: Console
) -> tuple[tuple[Point, ...], str | None]:
    """The points, and why there are no more of them where the server or Ctrl-C ended it."""
    from llmco2_vllm.training.driver import Driver, DriverError, Driving

    campaign = deployment.campaign
    driver = Driver(
        server,
        Driving(
            vocab=deployment.model.vocab,
            max_model_len=deployment.max_model_len,
            max_num_batched_tokens=request.max_num_batched_tokens,
            decode_steps=request.decode_steps,
            busy_ok=request.busy_ok,
            seed=request.seed,
        ),
    )
    deadline = time.monotonic() + 60 * (request.budget_minutes or float("inf"))
    total = campaign.rounds * campaign.per_round if campaign.rounds < MOST_ROUNDS else None
    points: tuple[Point, ...] = ()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        shown = bar.add_task("warming up", total=total)
        try:
            driver.warm_up()
            for state in calibrate(campaign, driver.measure):
                points = state.points
                bar.update(shown, completed=state.attempts, description=f"round {state.round_number}")
                if time.monotonic() > deadline:
                    break
        except DriverError as error:
            return points, str(error)
        except KeyboardInterrupt:
            return points, "interrupted"
    return points, None


def _calibration(deployment: Deployment, points: tuple[Point, ...]) -> Calibration:
    status = deployment.status
    metered = any(point.observed_joules is not None for point in points)
    reason = status.get("meter_reason") or f"meter {status.get('meter', 'none')} reports no joules by phase"
    prefill, decode = fit(points)
    return Calibration(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        predictor=status["predictor"],
        deployment=deployment.identity,
        energy="measured" if metered else f"not measured: {reason}",
        prefill=prefill,
        decode=decode,
        points=points,
    )


def _print_plan(campaign: Campaign, as_json: bool) -> None:
    found = proposals(campaign.space, campaign.traffic, [], campaign.per_round, campaign.sampling)
    if as_json:
        steps = [{**item.candidate._asdict(), "why": item.reason.value} for item in found]
        click.echo(json.dumps({"space": vars(campaign.space), "traffic": campaign.traffic.source, "proposals": steps}))
        return
    screen = Console()
    screen.print(_plan_table(found))
    screen.print(f"traffic: {campaign.traffic.source}; nothing was measured", highlight=False, markup=False)


def _plan_table(found: list[Proposal]) -> Table:
    table = Table(title="First round")
    for name in ("#", "prefill", "tokens each", "decode", "context"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for number, item in enumerate(found, start=1):
        counts = [str(value) if value else "-" for value in item.candidate]
        table.add_row(str(number), *counts, item.reason.value)
    return table


def _print(found: Calibration, output: Path, as_json: bool) -> None:
    compared = scores(found.points)
    if as_json:
        click.echo(json.dumps({"calibration": found.to_dict(), "scores": compared}, indent=2))
        return
    screen = Console()
    table = Table(
        title=f"{len(found.points)} step mixes, before and after", caption="after: each left out of its own fit"
    )
    for name in ("of", "MAPE before", "MAPE after", "bias before", "bias after"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for name, pair in compared.items():
        cells = [f"{pair[when][key]:.1f} %" for key in ("mape", "bias") for when in ("before", "after")]
        table.add_row(f"step {name}", *cells)
    screen.print(table)
    for name, phase in (("prefill", found.prefill), ("decode", found.decode)):
        screen.print(f"{name}: {_ratios(phase)}", highlight=False)
    note = f"energy: {found.energy}; written to {output}"
    screen.print(note, highlight=False, markup=False, soft_wrap=True)


def _ratios(phase: Any) -> str:
    if phase is None:
        return "not measured, stays as predicted"
    told = []
    for name, ratio in (("time", phase.time_ratio), ("energy", phase.energy_ratio)):
        if ratio is not None:
            spread = f"spread {ratio.log_standard_deviation:.1%}"
            told.append(f"{name} x {ratio.value:.3g} ({spread}, {ratio.n} points)")
    return ", ".join(told)


def _checked(option: str, read: Callable[[], T]) -> T:
    """What ``read`` returns; its failure as one line that names the option."""
    try:
        return read()
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{option}: {error}") from None
