"""Parts that a lifecycle file may name under each model of embodied carbon, and what one of them emitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from llmco2_vllm.core import embodied
from llmco2_vllm.core.embodied import EmbodiedModel
from llmco2_vllm.core.embodied_catalog import constant, names_in
from llmco2_vllm.core.hardware import device_names
from llmco2_vllm.core.units import convert
from llmco2_vllm.lifecycle.document import LifecycleError, Part

_AMOUNTS = ("gigabytes", "square_centimetres", "watts", "node")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the grams CO2e of one part follow from its amounts. amounts: keys the part needs, in this order."""

    grams: Callable[..., float]
    amounts: tuple[str, ...] = ()


def part_grams(model: EmbodiedModel, part: Part, where: str) -> tuple[float, tuple[str, ...]]:
    """Grams CO2e of one ``part`` by ``model``, and notes on stand-ins and omissions.

    Raises LifecycleError that names the key under ``where`` and what is allowed.
    """
    known = _RECIPES[model]()
    if part.part not in known:
        raise LifecycleError(
            f"{where}.part={part.part!r} is not possible with embodied model {model}; allowed: {', '.join(known)}"
        )
    recipe = known[part.part]
    given = {key: getattr(part, key) for key in _AMOUNTS if getattr(part, key) is not None}
    if set(given) != set(recipe.amounts):
        wanted = " and ".join(recipe.amounts) or "no amount"
        raise LifecycleError(f"{where}: part {part.part!r} takes {wanted}, not {', '.join(given) or 'none'}")
    try:
        return recipe.grams(*(given[key] for key in recipe.amounts)), _notes(model, part)
    except ValueError as error:
        raise LifecycleError(f"{where}: {error}") from None


def storage_grams(model: EmbodiedModel, medium: str, gigabytes: float) -> float | None:
    """Grams CO2e of drives that hold ``gigabytes``; None where ``model`` has no figure for ``medium``."""
    recipe = _RECIPES[model]().get(medium)
    return None if recipe is None else recipe.grams(gigabytes)


def _notes(model: EmbodiedModel, part: Part) -> tuple[str, ...]:
    if part.node is not None:
        return (f"node {part.node} taken as ACT's {embodied.act_node(part.node)}",)
    if model == "components" and part.part in device_names():
        found = embodied.device_footprint(part.part, model)
        return () if found is None else (*found.notes, f"{part.part}: without {', '.join(found.omitted)}")
    return ()


def _per(name: str, unit: str) -> Callable[[float], float]:
    """Grams of an amount in ``unit`` by the constant ``name``."""
    return lambda amount: amount * constant(name).to(f"g/{unit}")


def _bytes(grams: Callable[[float], float]) -> Callable[[float], float]:
    return lambda gigabytes: grams(convert(gigabytes, "GB", "byte"))


def _whole(name: str) -> Recipe:
    return Recipe(lambda: constant(name).to("g/part"))


@cache
def _product() -> Mapping[str, Recipe]:
    return {name: _whole(f"product.{name}") for name in names_in("product")}


@cache
def _components() -> Mapping[str, Recipe]:
    memory = [name for group in ("hbm", "dram") for name in names_in(f"component.{group}")]
    return {
        **{name: _device(name) for name in device_names() if embodied.device_footprint(name, "components")},
        **{kind: _memory(kind) for kind in memory},
        "ssd": Recipe(_bytes(embodied.ssd_grams), ("gigabytes",)),
        **{name: _board(name) for name in names_in("component.board-area")},
        "board": Recipe(embodied.board_grams, ("square_centimetres",)),
        "die": Recipe(embodied.die_grams, ("square_centimetres", "node")),
        "package": Recipe(lambda: embodied.package_grams(1)),
        "power-delivery": Recipe(embodied.power_delivery_grams, ("watts",)),
        "cooling": Recipe(embodied.cooling_grams, ("watts",)),
    }


def _device(name: str) -> Recipe:
    def grams() -> float:
        found = embodied.device_footprint(name, "components")
        assert found is not None  # only devices that have one are listed
        return found.grams

    return Recipe(grams)


def _memory(kind: str) -> Recipe:
    return Recipe(_bytes(lambda size: embodied.memory_grams(kind, size)), ("gigabytes",))


def _board(name: str) -> Recipe:
    return Recipe(lambda: embodied.board_grams(constant(f"component.board-area.{name}").to("cm2/part")))


def _chip(name: str) -> Recipe:
    return Recipe(lambda: embodied.chip_grams(name))


@cache
def _llmcarbon() -> Mapping[str, Recipe]:
    return {
        **{name: _chip(name) for name in names_in("llmcarbon.chip-area")},
        **{name: Recipe(_per(f"llmcarbon.memory.{name}", "GB"), ("gigabytes",)) for name in ("dram", "ssd")},
        "other": _whole("llmcarbon.server.other"),
    }


_RECIPES: Mapping[EmbodiedModel, Callable[[], Mapping[str, Recipe]]] = {
    "product": _product,
    "components": _components,
    "llmcarbon": _llmcarbon,
}
