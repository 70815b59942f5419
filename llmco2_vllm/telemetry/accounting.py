"""How joules become grams on this server: intensity, PUE and node overhead, with where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmco2_vllm.core.carbon import node_joules, operational_grams

WORLD_AVERAGE_GRAMS_PER_KWH = 475.0
"""World average of electricity, as CodeCarbon and Alumet use it (IEA, Global Energy & CO2 Status Report 2019,
https://www.iea.org/reports/global-energy-co2-status-report-2019/emissions)."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """Everything that turns predicted or measured joules into grams CO2e.

    grams_per_kwh: average carbon intensity, g CO2e/kWh, location-based.
    zone: grid zone as Electricity Maps names it, None when not stated.
    source: where the intensity comes from.
    estimated: the intensity is a stand-in, not stated for this site.
    pue: power usage effectiveness; None when not set (then 1.0 is used: the IT load alone).
    node_overhead_ratio: energy of the host's CPUs and memory per joule of device; None when not counted.
    node_overhead_source: where that comes from: settings, or the meter that measured it.
    auxiliary_ratio: fans, network and losses per joule of devices and host; None when not counted.
    """

    grams_per_kwh: float
    zone: str | None
    source: str
    estimated: bool
    pue: float | None = None
    node_overhead_ratio: float | None = None
    node_overhead_source: str | None = None
    auxiliary_ratio: float | None = None
    method: Literal["average"] = "average"
    basis: Literal["location"] = "location"

    @classmethod
    def from_values(
        cls,
        zone: str | None,
        intensity: float | None,
        pue: float | None,
        node_overhead: float | None,
        auxiliary: float | None = None,
    ) -> Accounting:
        """Accounting of the settings of the same names; without an intensity the world average, marked estimated."""
        node = (pue, node_overhead, None if node_overhead is None else "settings", auxiliary)
        if intensity is None:
            return cls(WORLD_AVERAGE_GRAMS_PER_KWH, "WORLD", "default:world-average", True, *node)
        return cls(intensity, zone, "settings", False, *node)

    def with_host_measured(self, ratio: float | None, source: str) -> Accounting:
        """The same with the host's energy as measured beside that of the devices, unless the settings state it."""
        if self.node_overhead_source == "settings" or ratio is None:
            return self
        return replace(self, node_overhead_ratio=ratio, node_overhead_source=source)

    def operational_grams(self, device_joules: float) -> float:
        """Grams CO2e of using ``device_joules``; what the node and the site add is added here and nowhere else."""
        joules = node_joules(device_joules, self.node_overhead_ratio or 0.0, self.auxiliary_ratio or 0.0)
        return operational_grams(joules, self.grams_per_kwh, 1.0 if self.pue is None else self.pue)


class HostShare:
    """Energy of the host per joule of the devices, over the time in which both meters ran."""

    def __init__(self) -> None:
        self._host = self._devices = 0.0
        self._last: tuple[float, float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """None until both were seen to move."""
        return self._host / self._devices if self._devices > 0.0 else None

    def see(self, host_joules: float, device_joules: float, unmetered_seconds: float) -> None:
        """Take cumulative figures; a span in which the devices' meter was blind, or began anew, does not count."""
        last, self._last = self._last, (host_joules, device_joules, unmetered_seconds)
        if last is None or unmetered_seconds != last[2] or device_joules <= last[1] or host_joules < last[0]:
            return
        self._host += host_joules - last[0]
        self._devices += device_joules - last[1]
