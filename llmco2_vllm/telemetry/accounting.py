"""How joules and held hardware become grams on this server, at the intensity of the time they belong to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from llmco2_vllm.core.carbon import node_joules, operational_grams
from llmco2_vllm.core.embodied import Hardware
from llmco2_vllm.core.intensity import Intensity, mean_intensity

# Long enough to even out the ticks of two meters, short enough to tell work from idleness.
HOST_MEMORY_SECONDS = 30.0


class Grid(Protocol):
    """Where intensities come from. Looks into memory alone: it is asked on the serving path."""

    def between(self, begin_epoch_seconds: float, end_epoch_seconds: float) -> list[tuple[Intensity | None, float]]:
        """The figures of a span, each with its seconds; None for a stretch no source knows."""

    def state(self) -> dict[str, Any]:
        """Who answers, who does not and why; plain JSON values."""

    async def run(self) -> None:
        """Look for news until cancelled. Never raises."""


@dataclass(frozen=True, slots=True)
class Node:
    """What the rest of the node and the site add to the energy of the devices. None where it is not known.

    pue: power usage effectiveness; without it 1.0 is used, the IT load alone. pue_source: who says so.
    host_ratio: energy of CPUs and memory per joule of device. host_source: settings, or the meter that measured it.
    auxiliary_ratio: fans, network and losses per joule of devices and host.
    """

    pue: float | None = None
    pue_source: str | None = None
    host_ratio: float | None = None
    host_source: str | None = None
    auxiliary_ratio: float | None = None

    @classmethod
    def stated(
        cls, pue: float | None, host_ratio: float | None, auxiliary: float | None, pue_source: str | None = None
    ) -> Node:
        """As the settings say."""
        source = None if pue is None else pue_source or "settings"
        return cls(pue, source, host_ratio, None if host_ratio is None else "settings", auxiliary)

    def site_joules(self, device_joules: float) -> float:
        """Energy of the site for that of its devices: host, auxiliaries and PUE, each once."""
        return self._node_joules(device_joules) * self._pue

    def operational_grams(self, device_joules: float, grams_per_kwh: float) -> float:
        """Grams CO2e of using ``device_joules``; what node and site add is added here and nowhere else."""
        return operational_grams(self._node_joules(device_joules), grams_per_kwh, self._pue)

    @property
    def _pue(self) -> float:
        return 1.0 if self.pue is None else self.pue

    def _node_joules(self, device_joules: float) -> float:
        return node_joules(device_joules, self.host_ratio or 0.0, self.auxiliary_ratio or 0.0)

    def with_host_measured(self, ratio: float | None, source: str) -> Node:
        """The same with the host's energy as measured beside that of the devices, unless the settings state it."""
        if self.host_source == "settings" or ratio is None:
            return self
        return replace(self, host_ratio=ratio, host_source=source)


class Accounting(NamedTuple):
    """Everything that turns joules and held seconds of one span of time into grams CO2e.

    intensity: location-based; None when no source knows one. market: what contracts say of the same electricity.
    hardware: what the engine's hardware emitted when it was made, per second; None when not known.
    utilisation_ratio: planned busy part of the hardware's life, for idle time that busy time carries; None: not set.
    """

    intensity: Intensity | None
    market: Intensity | None = None
    age_seconds: float | None = None
    node: Node = Node()
    hardware: Hardware | None = None
    utilisation_ratio: float | None = None

    def operational_grams(self, device_joules: float) -> float | None:
        """Grams CO2e of using ``device_joules``, location-based; None while no intensity is known."""
        return self._grams(device_joules, self.intensity)

    def market_grams(self, device_joules: float) -> float | None:
        """The same by the market-based intensity; None without one."""
        return self._grams(device_joules, self.market)

    def embodied_grams(self, held_seconds: float) -> float | None:
        """Grams CO2e of holding one engine's hardware for so long; None when it is not known."""
        hardware = self.hardware
        if hardware is None or (hardware.idle == "busy" and not self.utilisation_ratio):
            return None
        return hardware.busy_grams(held_seconds, min(1.0, self.utilisation_ratio or 1.0))

    def _grams(self, device_joules: float, intensity: Intensity | None) -> float | None:
        return None if intensity is None else self.node.operational_grams(device_joules, intensity.grams_per_kwh)


@dataclass
class Accountant:
    """Answers with the accounting of any span; one per front end.

    ``node`` changes as meters learn.
    """

    grid: Grid
    market: Intensity | None = None
    node: Node = field(default_factory=Node)
    hardware: Hardware | None = None
    utilisation_ratio: float | None = None
    clock: Callable[[], float] = time.time

    def over(self, begin_epoch_seconds: float, end_epoch_seconds: float) -> Accounting:
        """The accounting of a span: over the turn of an hour its intensity is the mean by time."""
        intensity = mean_intensity(self.grid.between(begin_epoch_seconds, end_epoch_seconds))
        age = None if intensity is None else intensity.age_seconds(end_epoch_seconds)
        return Accounting(intensity, self.market, age, self.node, self.hardware, self.utilisation_ratio)

    def now(self) -> Accounting:
        """That of this moment."""
        now = self.clock()
        return self.over(now, now)


class HostShare:
    """Energy of the host per joule of the devices, of the recent past in which both meters ran.

    Of the recent past, since a host beside idle devices takes several times their energy, and beside busy ones a part
    of it: what it took while nobody asked for anything is not for those who ask later.
    """

    def __init__(self) -> None:
        self._host = self._devices = 0.0
        self._last: tuple[float, float, float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """None until both were seen to move."""
        return self._host / self._devices if self._devices > 0.0 else None

    def see(self, host_joules: float, device_joules: float, unmetered_seconds: float, now_seconds: float) -> None:
        """Take cumulative figures; a span in which the devices' meter was blind, or began anew, does not count."""
        last, self._last = self._last, (host_joules, device_joules, unmetered_seconds, now_seconds)
        if last is None or unmetered_seconds != last[2] or device_joules <= last[1] or host_joules < last[0]:
            return
        keep = math.exp(-max(0.0, now_seconds - last[3]) / HOST_MEMORY_SECONDS)
        self._host = keep * self._host + host_joules - last[0]
        self._devices = keep * self._devices + device_joules - last[1]
