"""Figures of a lifecycle: duration, energy, operational and embodied carbon of each phase.

The equations are those of ``core/llmcarbon.py``, ``core/embodied.py`` and ``core/carbon.py``; nothing is computed here
that is not one of them. What is not known is None and left out, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmco2_vllm.core import llmcarbon
from llmco2_vllm.core.carbon import operational_grams
from llmco2_vllm.core.embodied import Holding, grams_per_second, split_idle
from llmco2_vllm.core.embodied_catalog import constant
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.core.llmcarbon import Fleet, Parallelism
from llmco2_vllm.core.units import convert
from llmco2_vllm.lifecycle.document import Embodied, Hardware, Lifecycle, LifecycleError, Site
from llmco2_vllm.lifecycle.parts import part_grams, storage_grams

SCHEMA = "llmco2-lifecycle/1"


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase. energy_joules: with PUE. embodied_idle_grams: idle time of the parts, a line of its own.

    devices, flops: None for storage. embodied_grams: None when no parts are given or the model has no figure.
    """

    name: str
    duration_seconds: float
    energy_joules: float
    operational_grams: float
    devices: float | None = None
    flops: float | None = None
    embodied_grams: float | None = None
    embodied_idle_grams: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """All phases of a lifecycle, and the stand-ins that were made on the way."""

    lifecycle: Lifecycle
    phases: tuple[Phase, ...]
    parallelism: Parallelism | None
    notes: tuple[str, ...]

    @property
    def operational_grams(self) -> float:
        """Sum over the phases."""
        return sum(phase.operational_grams for phase in self.phases)

    @property
    def embodied_grams(self) -> float | None:
        """Sum over the phases without the idle lines; None as long as one phase is not known."""
        known = [phase.embodied_grams for phase in self.phases if phase.embodied_grams is not None]
        return sum(known) if len(known) == len(self.phases) else None

    @property
    def embodied_idle_grams(self) -> float | None:
        """Sum of the idle lines; None when there is none."""
        lines = [phase.embodied_idle_grams for phase in self.phases if phase.embodied_idle_grams is not None]
        return sum(lines) if lines else None

    def deviations(self) -> dict[str, float]:
        """Relative difference to the published figures, by ``operational`` and ``embodied``; only what is known."""
        published = self.lifecycle.published
        if published is None:
            return {}
        pairs = {
            "operational": (self.operational_grams, published.operational_tonnes),
            "embodied": (self.embodied_grams, published.embodied_tonnes),
        }
        return {
            name: convert(grams, "g", "t") / tonnes - 1
            for name, (grams, tonnes) in pairs.items()
            if grams is not None and tonnes is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON; unknown values are left out."""
        model = self.lifecycle.model
        layout = {} if self.parallelism is None else {"parallelism": _known(self.parallelism)}
        totals = {
            "operational_grams": self.operational_grams,
            "embodied_grams": self.embodied_grams,
            "embodied_idle_grams": self.embodied_idle_grams,
        }
        return {
            "schema": SCHEMA,
            "name": self.lifecycle.name,
            "basis": "modelled",
            "parameters": {"base": model.base(), "total": model.total()},
            **layout,
            "phases": [_known(phase) for phase in self.phases],
            "total": {name: value for name, value in totals.items() if value is not None},
            "deviation_ratio": self.deviations(),
            "notes": list(self.notes),
        }


def _known(row: Phase | Parallelism) -> dict[str, Any]:
    return {name: value for name in row.__slots__ if (value := getattr(row, name)) is not None}


def figures(lifecycle: Lifecycle) -> Figures:
    """Every phase of ``lifecycle``. Raises LifecycleError where a value contradicts another."""
    notes: list[str] = []
    phases = tuple(_phases(lifecycle, notes))
    missing = [phase.name for phase in phases if phase.embodied_grams is None]
    if missing:
        notes.append(f"embodied carbon not known: {', '.join(missing)}")
    return Figures(lifecycle, phases, _parallelism(lifecycle), tuple(dict.fromkeys(notes)))


@dataclass(frozen=True, slots=True)
class _Work:
    """FLOPs of one phase, where they are done, and the time the parts are held when it is given."""

    name: str
    flops: float
    hardware: Hardware
    site: Site
    held_days: float | None = None


def _phases(life: Lifecycle, notes: list[str]) -> Iterator[Phase]:
    parameters = life.model.base()
    own = life.hardware, life.site
    trained = llmcarbon.training_flops(parameters, life.training.tokens) if life.training else 0.0
    if life.training:
        yield _compute(life, _Work("training", trained, *own, life.training.held_days), notes)
    if tried := life.experimentation:
        flops = tried.flops or trained * (tried.training_ratio or 0.0)
        yield _compute(life, _Work("experimentation", flops, *own), notes)
    if served := life.inference:
        hardware = served.hardware or life.hardware
        if hardware.efficiency_ratio is None:
            raise LifecycleError("inference.hardware: expected efficiency_ratio; throughput: megatron is of training")
        flops = llmcarbon.inference_flops(parameters, served.tokens)
        yield _compute(life, _Work("inference", flops, hardware, served.site or life.site), notes)
    if life.storage:
        yield _stored(life)


def _compute(life: Lifecycle, work: _Work, notes: list[str]) -> Phase:
    fleet = _fleet(life, work, notes)
    seconds = llmcarbon.compute_seconds(work.flops, fleet)
    joules = llmcarbon.fleet_joules(fleet, seconds)
    held = seconds if work.held_days is None else convert(work.held_days, "day", "s")
    busy, idle = _embodied(work.hardware.embodied, held, _where(life, work), notes)
    return Phase(
        name=work.name,
        duration_seconds=seconds,
        energy_joules=joules * work.site.pue,
        operational_grams=operational_grams(joules, work.site.intensity_grams_per_kwh, work.site.pue),
        devices=fleet.devices,
        flops=work.flops,
        embodied_grams=busy,
        embodied_idle_grams=idle,
    )


def _where(life: Lifecycle, work: _Work) -> str:
    return "hardware" if work.hardware is life.hardware else f"{work.name}.hardware"


def _fleet(life: Lifecycle, work: _Work, notes: list[str]) -> Fleet:
    hardware = work.hardware
    if hardware.throughput is not None:
        return _fitted_fleet(life, hardware, notes)
    peak = hardware.peak_teraflops
    speed = device_by_name(hardware.device).peak_flops("bf16") if hardware.device else 0.0
    if peak is not None:
        speed = convert(peak, "TFLOP/s", "FLOP/s")
    return Fleet(hardware.devices or 0, hardware.power_watts, speed, hardware.efficiency_ratio or 0.0)


def _fitted_fleet(life: Lifecycle, hardware: Hardware, notes: list[str]) -> Fleet:
    """The fleet of ``throughput: megatron``: efficiency, and devices where they are not given, by the polynomials."""
    parameters = life.model.base()
    memory = device_by_name(hardware.device or "").memory_bytes
    try:
        ratio = llmcarbon.efficiency_ratio(parameters, memory)
        devices = hardware.devices or llmcarbon.optimal_parallelism(parameters, memory).devices
    except ValueError as error:
        raise LifecycleError(f"hardware.throughput: {error}") from None
    notes.append(f"efficiency {ratio:.1%} by Megatron-LM's throughput on A100 80 GB; LLMCarbon's fit")
    return Fleet(devices, hardware.power_watts, constant("megatron.peak").to("FLOP/s"), ratio)


def _parallelism(life: Lifecycle) -> Parallelism | None:
    """The fitted layout; None where devices or efficiency are given."""
    hardware = life.hardware
    if hardware.throughput is None or hardware.devices is not None or not (life.training or life.experimentation):
        return None
    return llmcarbon.optimal_parallelism(life.model.base(), device_by_name(hardware.device or "").memory_bytes)


def _embodied(
    held: Embodied | None, busy_seconds: float, where: str, notes: list[str]
) -> tuple[float | None, float | None]:
    """Grams of the busy time and of the idle line; None without parts, and for an idle line that is empty."""
    if held is None:
        return None, None
    holdings = []
    for number, part in enumerate(held.parts):
        grams, said = part_grams(held.model, part, f"{where}.embodied.parts.{number}")
        notes.extend(said)
        holdings.append(Holding(grams, part.lifetime_years or held.lifetime_years, part.count))
    notes.append(f"embodied carbon by model {held.model}")
    idle_seconds = busy_seconds / held.utilisation_ratio - busy_seconds
    busy, idle = split_idle(grams_per_second(holdings), busy_seconds, idle_seconds, held.idle)
    return busy, idle if idle > 0 else None


def _stored(life: Lifecycle) -> Phase:
    stored, held = life.storage, life.hardware.embodied
    assert stored is not None  # the caller asked
    seconds = convert(stored.days, "day", "s")
    joules = llmcarbon.storage_joules(convert(stored.gigabytes, "GB", "byte"), seconds, stored.medium, stored.replicas)
    embodied = None
    if held is not None:
        drives = storage_grams(held.model, stored.medium, stored.gigabytes * stored.replicas)
        embodied = None if drives is None else grams_per_second([Holding(drives, held.lifetime_years)]) * seconds
    return Phase(
        name="storage",
        duration_seconds=seconds,
        energy_joules=joules * life.site.pue,
        operational_grams=operational_grams(joules, life.site.intensity_grams_per_kwh, life.site.pue),
        embodied_grams=embodied,
    )
