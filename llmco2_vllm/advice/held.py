"""The hardware that an engine holds while it serves: its embodied carbon per second, and what draws power unused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmco2_vllm.core.embodied import EmbodiedModel, Lifetimes, engine_hardware
from llmco2_vllm.core.hardware import DeviceSpec

Hold = Literal["devices", "server"]
HOLDS: tuple[Hold, ...] = get_args(Hold)

DEVICES_PER_SERVER = 8
"""Devices of the servers whose hosts the catalog knows: p4d and p5."""


@dataclass(frozen=True)
class Held:
    """embodied_grams_per_second: None where no footprint is known. unused_watts: of devices held and not used."""

    embodied_grams_per_second: float | None
    unused_watts: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ownership:
    """How hardware is charged.

    hold: ``devices``, those of the engine with their share of the host, or ``server``, the whole server of eight
        however many of them work, as HotCarbon'24 charges its server; the others then idle beside.
    model: of the embodied catalog. lifetime_years: 3 to 5, of devices. host_lifetime_years: of their hosts, which may
        outlive them; None is as long as the devices.
    """

    hold: Hold = "devices"
    model: EmbodiedModel = "product"
    lifetime_years: float = 4.0
    host_lifetime_years: float | None = None

    @property
    def host_years(self) -> float:
        """Over how many years a host is written off."""
        return self.lifetime_years if self.host_lifetime_years is None else self.host_lifetime_years

    def of(self, device: DeviceSpec, devices: int) -> Held:
        """What an engine on ``devices`` of one kind holds. Raises ValueError for a lifetime that is not possible."""
        count = DEVICES_PER_SERVER if self.hold == "server" and device.kind == "gpu" else devices
        watts = device.idle_power_watts * (count - devices)
        hardware = engine_hardware(device.name, count, self.model, Lifetimes(self.lifetime_years, self.host_years))
        if hardware is None:
            return Held(None, watts, (f"{device.name}: no embodied figure by the model {self.model}",))
        parts = ", ".join(part for part in hardware.omitted if part != "host")
        without = (parts, "the host" if "host" in hardware.omitted else "")
        notes = (*hardware.notes, *(f"embodied without {part}" for part in without if part))
        return Held(hardware.rate_grams_per_second, watts, tuple(f"{device.name}: {note}" for note in notes))
