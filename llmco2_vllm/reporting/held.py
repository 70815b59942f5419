"""Embodied carbon of the devices that a report is about: a rate for each second in which one is held."""

from __future__ import annotations

from dataclasses import dataclass

from llmco2_vllm.core.embodied import EmbodiedModel, Holding, device_footprint, grams_per_second, host_share
from llmco2_vllm.core.hardware import find_device
from llmco2_vllm.core.units import convert


@dataclass(frozen=True)
class Rate:
    """grams_per_second: of holding one device, None when no figure is known. note: what it is of, or why not."""

    grams_per_second: float | None
    note: str


@dataclass(frozen=True)
class EmbodiedChoice:
    """By which model embodied carbon is counted, None is not at all, and over how many years it is written off."""

    model: EmbodiedModel | None = "product"
    lifetime_years: float = 4.0
    host_lifetime_years: float = 4.0

    def __post_init__(self) -> None:
        for years in (self.lifetime_years, self.host_lifetime_years):
            grams_per_second([Holding(0.0, years)])

    def rate(self, device: str) -> Rate:
        """The rate of a device by its name in the catalog."""
        if self.model is None:
            return Rate(None, "embodied carbon was not asked for")
        spec = find_device(device)
        footprint = None if spec is None else device_footprint(spec.name, self.model)
        if spec is None or footprint is None:
            return Rate(None, f"{device}: no embodied figure by model {self.model}")
        holdings = [Holding(footprint.grams, self.lifetime_years)]
        words = [f"{device}: {convert(footprint.grams, 'g', 'kg'):.4g} kg over {self.lifetime_years:g} years"]
        if footprint.spread_ratio is not None:
            words.append(f"+-{footprint.spread_ratio:.0%}")
        if footprint.omitted:
            words.append(f"without {', '.join(footprint.omitted)}")
        host = host_share(spec.name, self.model)
        if host is None:
            words.append("host not counted")
        else:
            holdings.append(Holding(host.grams, self.host_lifetime_years))
            share = convert(host.grams, "g", "kg")
            words.append(
                f"and {share:.4g} kg of its host ({'; '.join(host.notes)}), {self.host_lifetime_years:g} years"
            )
        return Rate(grams_per_second(holdings), ", ".join(words))
