"""Embodied carbon: what making the hardware emitted, by three models, and the share of it that a use carries.

The models are never mixed in one figure (their factors for the same memory differ threefold):
``product`` takes the maker's footprint of a whole part, ``components`` adds up HotCarbon'24's factors with dies by
ACT, ``llmcarbon`` takes LLMCarbon's table. One pure function per equation. Constants: ``data/embodied.toml``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmco2_vllm.core.embodied_catalog import Constant, constant, constants, for_device, names_in
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.core.units import convert

EmbodiedModel = Literal["product", "components", "llmcarbon"]
MODELS: tuple[EmbodiedModel, ...] = ("product", "components", "llmcarbon")
IdlePolicy = Literal["line", "busy"]
"""Who carries idle time: a line of its own, or the busy time beside it."""

LIFETIME_YEARS = (3.0, 5.0)
"""Lifetimes that HotCarbon'24 and its sources use; outside of them a figure is not comparable with any other."""

# Nodes that ACT does not list, by the node that is taken for them: the same generation of process, or the coarser.
_NODES = {"12nm": "14nm", "12FFN": "14nm", "8N": "8nm", "4N": "5nm", "4NP": "5nm", "4nm": "5nm", "6nm": "7nm"}
_ABATED = (0.95, 0.99)


# --------------------------------------------------------------------------------------------------- amortisation


def lifetime_seconds(lifetime_years: float) -> float:
    """Lifetime in seconds, years of 365 days. Raises ValueError outside of 3 to 5 years.

    Source: HotCarbon'24, lifetimes of 3, 4 and 5 years.
    """
    low, high = LIFETIME_YEARS
    if not low <= lifetime_years <= high:
        raise ValueError(f"lifetime_years={lifetime_years!r} is not possible; allowed: {low:g} to {high:g}")
    return convert(lifetime_years, "year", "s")


def embodied_grams(total_grams: float, held_seconds: float, lifetime_years: float, held_ratio: float = 1.0) -> float:
    """Grams CO2e of holding ``held_ratio`` of a part for ``held_seconds``: M = TE * TS * RS, TS = held / lifetime.

    Args:
        total_grams: footprint of the whole part, cradle to gate.
        held_ratio: fraction of the part held, 0 to 1: GPUs of a server, slices of a GPU, slots of a batch.

    Raises ValueError for a ratio, time or lifetime that is not possible.
    Source: Software Carbon Intensity, ISO/IEC 21031, "Embodied emissions".
    """
    _check("held_ratio", held_ratio, 0, 1)
    _check("held_seconds", held_seconds, 0, math.inf)
    return total_grams * held_ratio * held_seconds / lifetime_seconds(lifetime_years)


@dataclass(frozen=True, slots=True)
class Holding:
    """``count`` equal parts that are written off over ``lifetime_years``; parts of one server may differ in it.

    A part that is shared counts as a fraction: the host of eight GPUs is 1/8 for each of them.
    """

    total_grams: float
    lifetime_years: float
    count: float = 1.0


def grams_per_second(holdings: Iterable[Holding]) -> float:
    """Embodied grams that each second of holding all parts takes: sum of N_r * K_r / LT_r.

    With one lifetime for all parts this is HotCarbon'24's C_emb = (t / LT) * (sum N_r * K_r) for one second.
    """
    return sum(h.count * embodied_grams(h.total_grams, 1.0, h.lifetime_years) for h in holdings)


def split_idle(
    rate_grams_per_second: float, busy_seconds: float, idle_seconds: float, policy: IdlePolicy = "line"
) -> tuple[float, float]:
    """(grams of the busy time, grams of the idle line); their sum is always rate * (busy + idle).

    ``line``: idle time is a line of its own. ``busy``: busy time carries it; with no busy time at all it stays idle.
    Source: the definition of the policy; SCI leaves the choice to the reporter but wants reserved time counted.
    """
    total = rate_grams_per_second * (busy_seconds + idle_seconds)
    if policy == "busy" and busy_seconds > 0:
        return total, 0.0
    idle = rate_grams_per_second * idle_seconds
    return total - idle, idle


def grams_per_busy_second(rate_grams_per_second: float, utilisation_ratio: float, policy: IdlePolicy = "line") -> float:
    """Embodied grams of one busy second of hardware that is busy for ``utilisation_ratio`` of its life.

    The rate itself when idle time is a line of its own, rate / utilisation when busy time carries it.
    Raises ValueError for a ratio outside of (0, 1].
    """
    _check("utilisation_ratio", utilisation_ratio, 0, 1)
    if utilisation_ratio == 0:
        raise ValueError("utilisation_ratio=0 is not possible; allowed: more than 0, up to 1")
    return rate_grams_per_second / utilisation_ratio if policy == "busy" else rate_grams_per_second


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        allowed = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        raise ValueError(f"{name}={value!r} is not possible; allowed: {allowed}")


# ------------------------------------------------------------------------------------------------------ dies (ACT)


def act_node(node: str) -> str:
    """ACT's node for a process name: 7nm, "TSMC N5", 12FFN, 4N. Raises ValueError that lists ACT's nodes.

    Nodes that ACT lacks are mapped: 12 nm -> 14, Samsung 8N -> 8, 4N, 4NP and 4 nm -> 5, 6 nm -> 7.
    """
    name = node.split()[-1] if node.split() else node
    plain = re.fullmatch(r"N(\d+)", name)
    name = f"{plain[1]}nm" if plain else name
    found = _NODES.get(name, name)
    known = names_in("act.energy-per-area")
    if found not in known:
        raise ValueError(f"node {node!r} is not known; allowed: {', '.join((*known, *_NODES))}")
    return found


@dataclass(frozen=True, slots=True)
class Fab:
    """The factory of a die: grid intensity in g CO2e/kWh, share of process gases abated, share of good dies."""

    intensity_grams_per_kwh: float = field(default_factory=lambda: constant("act.fab-intensity-2022").to("g/kWh"))
    abated_ratio: float = 0.97
    yield_ratio: float = field(default_factory=lambda: constant("act.yield").to("ratio"))


def die_grams_per_cm2(node: str, fab: Fab | None = None) -> float:
    """Grams CO2e of a square centimetre of die: CPA = (CI_fab * EPA + GPA + MPA) / yield.

    Gas emissions lie on the line through ACT's values at 95 and 99 % abatement. Raises ValueError for an unknown
    node and for an abatement outside of the two. Source: ACT, ISCA 2022, equation of carbon per area.
    """
    fab = fab or Fab()
    name = act_node(node)
    low, high = _ABATED
    _check("abated_ratio", fab.abated_ratio, low, high)
    at_low, at_high = (constant(f"act.gas-per-area-{percent}.{name}").to("g/cm2") for percent in (95, 99))
    gases = at_low + (at_high - at_low) * (fab.abated_ratio - low) / (high - low)
    energy = constant(f"act.energy-per-area.{name}").to("kWh/cm2")
    materials = constant("act.materials-per-area").to("g/cm2")
    return (fab.intensity_grams_per_kwh * energy + gases + materials) / fab.yield_ratio


def die_grams(area_cm2: float, node: str, fab: Fab | None = None) -> float:
    """Grams CO2e of a die of ``area_cm2``: area * CPA. Source: ACT, ISCA 2022; LLMCarbon, equation of CO2eq_chip."""
    return area_cm2 * die_grams_per_cm2(node, fab)


# ---------------------------------------------------------------------------------------- components (HotCarbon'24)


def ssd_grams(capacity_bytes: float) -> float:
    """Grams CO2e of solid-state storage: capacity * 0.10999 kg/GB. Source: HotCarbon'24, from Dell's R740."""
    return capacity_bytes * constant("component.ssd").to("g/byte")


def board_grams(area_cm2: float) -> float:
    """Grams CO2e of a populated circuit board: area * 0.048 kg/cm2. Source: HotCarbon'24, the R740's mainboard."""
    return area_cm2 * constant("component.pcb").to("g/cm2")


def memory_grams(kind: str, capacity_bytes: float) -> float:
    """Grams CO2e of DRAM: capacity * factor of ``kind`` (hbm2, hbm2e, hbm3, hbm3e, ddr4, lpddr5, gddr6).

    Raises ValueError that lists the kinds. Source: HotCarbon'24, memory factors.
    """
    kinds = {name: group for group in ("hbm", "dram") for name in names_in(f"component.{group}")}
    if kind not in kinds:
        raise ValueError(f"memory {kind!r} is not in the catalog; allowed: {', '.join(kinds)}")
    return capacity_bytes * constant(f"component.{kinds[kind]}.{kind}").to("g/byte")


def power_delivery_grams(rated_watts: float) -> float:
    """Grams CO2e of regulators and connectors: rated power * 22.89 kg / 300 W. Source: HotCarbon'24, RTX A6000."""
    return _by_power("power-delivery", rated_watts)


def cooling_grams(rated_watts: float) -> float:
    """Grams CO2e of the heat sink and fans: rated power * 23.63 kg / 300 W. Source: HotCarbon'24, RTX A6000."""
    return _by_power("cooling", rated_watts)


def _by_power(name: str, rated_watts: float) -> float:
    reference_watts = constant("component.reference-power").to("W/part")
    return constant(f"component.reference.{name}").to("g/part") * rated_watts / reference_watts


def package_grams(count: float) -> float:
    """Grams CO2e of packaging ``count`` integrated circuits: sum of N_r * K_r, K_r 150 g. Source: ACT, ISCA 2022."""
    return count * constant("component.package").to("g/part")


# ------------------------------------------------------------------------------------------- LLMCarbon's table


def chip_grams(name: str) -> float:
    """Grams CO2e of a chip of LLMCarbon's table: area * CPA. Raises ValueError that lists cpu, v100, h100, ...

    Source: LLMCarbon, CO2eq_chip = area * CPA and its table of hardware.
    """
    area = constant(f"llmcarbon.chip-area.{name}").to("cm2/part")
    return area * constant(f"llmcarbon.carbon-per-area.{name}").to("g/cm2")


# ----------------------------------------------------------------------------------------------------- footprints


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cradle-to-gate footprint of one device by one model.

    parts: grams CO2e by part. omitted: parts that the model or the catalog does not know; they are not 0.
    notes: stand-ins that were made, such as the fab node. spread_ratio: relative half-width, None when not stated.
    """

    model: EmbodiedModel
    parts: Mapping[str, float]
    omitted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    spread_ratio: float | None = None

    @property
    def grams(self) -> float:
        """Sum of the parts that are known."""
        return sum(self.parts.values())


def device_footprint(device: str, model: EmbodiedModel) -> Footprint | None:
    """Footprint of a GPU of ``devices.toml`` without its host; None when ``model`` has no figure for it, as for cpu.

    Raises ValueError for a model that is none of :data:`MODELS` and for an unknown device.
    """
    if model not in MODELS:
        raise ValueError(f"embodied model {model!r} is not known; allowed: {', '.join(MODELS)}")
    if device.strip().lower() == "cpu":
        return None
    name = device_by_name(device).name
    if model == "components":
        return _components(name)
    return _product(name) if model == "product" else _chip(name)


def _product(device: str) -> Footprint | None:
    rows = for_device("product", device)
    if not rows:
        return None
    row = rows[0]
    return Footprint("product", {row.name: row.to("g/part")}, notes=_stated(row), spread_ratio=row.spread_ratio)


def _stated(row: Constant) -> tuple[str, ...]:
    return (row.note,) if row.note else ()


def _components(device: str) -> Footprint | None:
    dies = for_device("die", device)
    if not dies:
        return None
    spec = device_by_name(device)
    counts = [row.facts.get("count", 1) for row in dies]
    kind = next(row.facts["memory"] for row in dies if "memory" in row.facts)
    parts = {
        row.name: count * die_grams(row.to("cm2/part"), row.facts["node"])
        for row, count in zip(dies, counts, strict=True)
    }
    parts |= {
        "package": package_grams(sum(counts)),
        kind: memory_grams(kind, spec.memory_bytes),
        "power-delivery": power_delivery_grams(spec.power_limit_watts),
        "cooling": cooling_grams(spec.power_limit_watts),
    }
    nodes = tuple(f"{row.name}: node {row.facts['node']} as ACT's {act_node(row.facts['node'])}" for row in dies)
    return Footprint("components", parts, ("circuit board",), nodes)


def _chip(device: str) -> Footprint | None:
    family = device.split("-")[0]
    if family not in names_in("llmcarbon.chip-area"):
        return None
    return Footprint(
        "llmcarbon", {family: chip_grams(family)}, ("memory", "circuit board", "power delivery", "cooling")
    )


# -------------------------------------------------------------------------------------------------- held hardware


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Years until devices and their host are written off, 3 to 5; hosts may serve longer than accelerators.

    Source: HotCarbon'24, asymmetric lifetimes of CPU servers and GPUs.
    """

    devices_years: float = 4.0
    host_years: float = 4.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices of one engine and their share of the host, written off second by second.

    rate_grams_per_second: of all of it. idle: who carries the time without work. omitted: parts no figure is known of.
    notes: stand-ins that were made.
    """

    model: EmbodiedModel
    rate_grams_per_second: float
    lifetimes: Lifetimes = Lifetimes()
    idle: IdlePolicy = "line"
    omitted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def busy_grams(self, busy_seconds: float, utilisation_ratio: float = 1.0) -> float:
        """Grams of ``busy_seconds`` of the whole hardware; with the policy ``busy`` they carry the idle time beside."""
        return busy_seconds * grams_per_busy_second(self.rate_grams_per_second, utilisation_ratio, self.idle)


def host_share(device: str, model: EmbodiedModel) -> Footprint | None:
    """Footprint of the server beside ONE such device, without its devices; None when the model has no figure for it.

    The nearest server of as many modules stands in where the catalog has none of the device's own; ``notes`` say so.
    Only the product model knows hosts: with another one the sum would be of two models. Raises ValueError for an
    unknown device.
    """
    if model != "product" or device.strip().lower() == "cpu":
        return None
    name = device_by_name(device).name
    for row in constants().values():
        own, other = (name in row.facts.get(key, ()) for key in ("hosts", "stands_in_for"))
        if own or other:
            notes = (f"{row.name} stands in for the host of {name}",) if other else _stated(row)
            return Footprint(model, {row.name: row.to("g/part") / row.facts["slots"]}, notes=notes)
    return None


def engine_hardware(
    device: str, devices: int, model: EmbodiedModel, lifetimes: Lifetimes, idle: IdlePolicy = "line"
) -> Hardware | None:
    """What an engine on ``devices`` devices holds; None when the model has no figure for the device, as for CPUs.

    Raises ValueError for a model, device or lifetime that is not possible.
    """
    card, host = device_footprint(device, model), host_share(device, model)
    for years in (lifetimes.devices_years, lifetimes.host_years):
        lifetime_seconds(years)
    if card is None:
        return None
    holdings = [Holding(card.grams, lifetimes.devices_years, devices)]
    if host is not None:
        holdings.append(Holding(host.grams, lifetimes.host_years, devices))
    omitted = (*card.omitted, *(() if host is not None else ("host",)))
    notes = (*card.notes, *(() if host is None else host.notes))
    return Hardware(model, grams_per_second(holdings), lifetimes, idle, omitted, notes)
