"""CPU packages and memory through RAPL in Linux' powercap files (METERING section 7).

``intel-rapl:N`` is a package (AMD's too), ``intel-rapl:N:M`` a part of it; the ``name`` file says which. Memory
(``dram``) is counted beside its package, ``core`` and ``uncore`` inside it. ``psys`` contains the packages.
Kernel documentation: power/powercap/powercap.rst.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmco2_vllm.core.units import micro
from llmco2_vllm.meters.base import DeviceIdentity, MeterUnavailableError, Reading, SkippedReadingError, Vitals

POWERCAP = Path("/sys/class/powercap")
# The energy status registers are updated about every millisecond (Intel SDM volume 3, RAPL).
TICK_SECONDS = 0.001
GRANT = "let it be read: chmod a+r {root}/intel-rapl:*/energy_uj (anew after each boot), or run as root"


@dataclass
class _Domain:
    """A counter in microjoules that starts again from 0 after ``range``."""

    name: str
    path: Path
    range_microjoules: int
    last_microjoules: int
    microjoules: int = 0

    def update(self) -> None:
        now = _integer(self.path / "energy_uj")
        step = now - self.last_microjoules
        self.microjoules += step if step >= 0 else step + self.range_microjoules
        self.last_microjoules = now


class RaplMeter:
    """The packages of this host and their memory, as one device. Counts from when it was opened."""

    name = "rapl"

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises MeterUnavailableError with the reason, and how to grant the permission if it is that."""
        self._root, self._clock = root, clock
        self._domains = _domains(root)
        names = "+".join(sorted(domain.name for domain in self._domains))
        self._identity = DeviceIdentity(f"rapl:{names}", names, "host", tick_seconds=TICK_SECONDS)

    @property
    def identity(self) -> DeviceIdentity:
        """The domains stand for a UUID."""
        return self._identity

    @property
    def domains(self) -> dict[str, float]:
        """Joules of each domain since start, as of the last reading."""
        return {domain.name: micro(domain.microjoules) for domain in self._domains}

    def read(self) -> Reading:
        """Energy of all domains since start. Raises SkippedReadingError when a file cannot be read just now."""
        try:
            for domain in self._domains:
                domain.update()
        except (OSError, ValueError) as error:
            raise SkippedReadingError(f"RAPL: {error}") from None
        return Reading(self._clock(), micro(sum(domain.microjoules for domain in self._domains)))

    def vitals(self) -> Vitals:
        """RAPL knows none."""
        return Vitals()

    def reopen(self) -> None:
        """Nothing to open: each reading opens the files."""

    def close(self) -> None:
        """Nothing to close."""


def _integer(path: Path) -> int:
    return int(path.read_text("ascii"))


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise MeterUnavailableError(f"RAPL: {error}") from None


def _domains(root: Path) -> list[_Domain]:
    """Packages and memory, or the whole platform where there are no packages. Raises MeterUnavailableError."""
    found = {path.name: _name(path) for path in sorted(root.glob("intel-rapl:*"))}
    packages = {zone: name for zone, name in found.items() if name.startswith("package")}
    memory = {
        zone: f"{packages[parent]}-dram"
        for zone, name in found.items()
        if name == "dram" and (parent := zone.rpartition(":")[0]) in packages
    }
    wanted = packages | memory or {zone: name for zone, name in found.items() if name == "psys"}
    if not wanted:
        raise MeterUnavailableError(f"RAPL: no package under {root}; virtual machines and containers often have none")
    try:
        return [
            _Domain(
                name, root / zone, _integer(root / zone / "max_energy_range_uj"), _integer(root / zone / "energy_uj")
            )
            for zone, name in wanted.items()
        ]
    except PermissionError as error:
        raise MeterUnavailableError(f"RAPL: {error.filename} needs permission; {GRANT.format(root=root)}") from None
    except (OSError, ValueError) as error:
        raise MeterUnavailableError(f"RAPL: {error}") from None
