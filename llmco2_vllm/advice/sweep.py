"""The sweep: every device, tensor-parallel size and batch limit, in every zone, with what cannot serve and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from llmco2_vllm.advice.held import Held, Ownership
from llmco2_vllm.advice.products import cdp, cep, edp, tcdp
from llmco2_vllm.advice.slo import Slo
from llmco2_vllm.advice.steady import Steady, steady
from llmco2_vllm.advice.workload import Workload
from llmco2_vllm.advice.zones import ZoneIntensity
from llmco2_vllm.assemble import predictor_of
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.telemetry.accounting import Node
from llmco2_vllm.training.traffic import kv_capacity_tokens

TENSOR_PARALLEL = (1, 2, 4, 8)
BATCH_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 1000.0
"""Output tokens that figures are of; the prefill of their prompts is included."""

Price = Callable[[DeviceSpec, Topology], Predictor]


class Configuration(NamedTuple):
    """One way to serve: ``devices`` are ``tensor_parallel`` of a kind, ``batch_limit`` is vLLM's max_num_seqs."""

    device: str
    tensor_parallel: int
    batch_limit: int


class Infeasible(NamedTuple):
    """A configuration that is ruled out. reason: ``layout``, ``memory`` or ``slo``; detail: in words."""

    configuration: Configuration
    reason: str
    detail: str


@dataclass(frozen=True)
class HourGrams:
    """Operational and total grams CO2e of 1 000 output tokens in an hour of the day, UTC."""

    hour_utc: int
    operational_grams: float
    total_grams: float | None


@dataclass(frozen=True)
class Row:
    """A configuration in a zone, predicted; joules and grams CO2e are of 1 000 output tokens.

    steady: the engine. idle_joules: of devices held and not used. operational_grams: of both, with host and site.
    embodied_grams, total_grams and the products with them: None where no embodied figure is known.
    engines: how many the workload's arrivals need; None when no arrivals are known.
    """

    configuration: Configuration
    zone: str
    grams_per_kwh: float
    predictor: str
    steady: Steady
    energy_joules: float
    lower_joules: float
    upper_joules: float
    idle_joules: float
    operational_grams: float
    embodied_grams: float | None
    total_grams: float | None
    edp_joule_seconds: float
    cdp_gram_seconds: float | None
    cep_gram_joules: float | None
    tcdp_gram_seconds: float | None
    best_hour: HourGrams | None = None
    worst_hour: HourGrams | None = None
    engines: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON; what is not known is left out."""
        found = asdict(self)
        flat = {**self.configuration._asdict(), **found, **found["steady"]}
        for key in ("configuration", "steady", "joules_per_request"):
            del flat[key]
        # Of a request in the engine's own figures, of 1 000 tokens here.
        flat |= {key: found[key] for key in ("lower_joules", "upper_joules")}
        return {
            key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
            for key, value in flat.items()
            if value is not None
        }


@dataclass(frozen=True)
class Question:
    """What is asked.

    token_budget: vLLM's max_num_batched_tokens. predictor: as the setting of that name. notes: of the advice as well.
    """

    model: ModelSpec
    workload: Workload
    devices: Sequence[DeviceSpec]
    zones: Sequence[ZoneIntensity]
    slo: Slo = field(default_factory=Slo)
    ownership: Ownership = field(default_factory=Ownership)
    site: Node = field(default_factory=Node)
    predictor: str = "gnn"
    token_budget: int = 8192
    tensor_parallel: Sequence[int] = TENSOR_PARALLEL
    batch_limits: Sequence[int] = BATCH_LIMITS
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Advice:
    """rows: within memory and objectives. infeasible: the others. notes: stand-ins and omissions."""

    rows: tuple[Row, ...]
    infeasible: tuple[Infeasible, ...]
    notes: tuple[str, ...]


Watch = Callable[[Sequence[tuple[DeviceSpec, int]]], Iterable[tuple[DeviceSpec, int]]]


def advise(question: Question, price: Price | None = None, watch: Watch = iter) -> Advice:
    """All configurations. price: another predictor for a device and layout; watch: sees each device and TP go by.

    Raises OSError and ValueError when a predictor cannot be read or the model does not fit it.
    """
    price = price or partial(predictor_of, question.predictor, question.model)
    rows: list[Row] = []
    infeasible: list[Infeasible] = []
    notes: dict[str, None] = dict.fromkeys(question.notes)
    layouts = [(device, size) for device in question.devices for size in question.tensor_parallel]
    for device, size in watch(layouts):
        held = question.ownership.of(device, size)
        notes |= dict.fromkeys(held.notes)
        limits = []
        for limit in question.batch_limits:
            configuration = Configuration(device.name, size, limit)
            if (ruled_out := _misfit(question, device, configuration)) is not None:
                infeasible.append(ruled_out)
            else:
                limits.append(configuration)
        if not limits:
            continue
        predictor = price(device, Topology(tensor_parallel=size))
        for configuration in limits:
            engine = steady(predictor, question.workload, configuration.batch_limit, question.token_budget)
            if (broken := question.slo.broken_by(engine)) is not None:
                infeasible.append(Infeasible(configuration, "slo", broken))
            else:
                rows += _rows(question, configuration, predictor.name, engine, held)
    return Advice(tuple(rows), tuple(infeasible), tuple(notes))


def _misfit(question: Question, device: DeviceSpec, configuration: Configuration) -> Infeasible | None:
    """Why a configuration cannot run at all; None when it can.

    The cache must hold the mean context of a full batch, and the longest request by itself.
    """
    model, workload, size = question.model, question.workload, configuration.tensor_parallel
    if size > 1 and device.kind == "cpu":
        return Infeasible(configuration, "layout", "a CPU host is one device")
    if model.heads % size:
        return Infeasible(configuration, "layout", f"{model.heads} heads do not divide over {size} devices")
    capacity = kv_capacity_tokens(model, device, Topology(tensor_parallel=size))
    if not capacity:
        return Infeasible(configuration, "memory", f"{size} x {device.name}: no room beside the weights")
    needed = max(configuration.batch_limit * workload.decode_context, workload.longest)
    if needed > capacity:
        detail = f"{size} x {device.name}: room for {capacity} cached tokens, {needed:.0f} needed"
        return Infeasible(configuration, "memory", detail)
    return None


def _rows(
    question: Question, configuration: Configuration, predictor: str, engine: Steady, held: Held
) -> Iterator[Row]:
    requests = TOKENS / question.workload.output_mean
    joules = engine.joules_per_request * requests
    seconds = TOKENS / engine.output_tokens_per_second
    idle = held.unused_watts * seconds
    rate, delay = held.embodied_grams_per_second, engine.latency_seconds
    embodied = None if rate is None else rate * seconds
    arrivals = question.workload.requests_per_second

    def grams(grams_per_kwh: float) -> tuple[float, float | None]:
        operational = question.site.operational_grams(joules + idle, grams_per_kwh)
        return operational, None if embodied is None else operational + embodied

    for zone in question.zones:
        operational, total = grams(zone.grams_per_kwh)
        best, worst = (
            None if hour is None or zone.hours is None else HourGrams(hour, *grams(zone.hours[hour]))
            for hour in (zone.best_hour, zone.worst_hour)
        )
        yield Row(
            configuration, zone.zone, zone.grams_per_kwh, predictor, engine,
            joules, engine.lower_joules * requests, engine.upper_joules * requests, idle,
            operational, embodied, total, edp(joules + idle, delay),
            None if embodied is None else cdp(embodied, delay),
            None if embodied is None else cep(embodied, joules + idle),
            None if total is None else tcdp(total, delay),
            best, worst, None if arrivals is None else arrivals / engine.requests_per_second,
        )  # fmt: skip
