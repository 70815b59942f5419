"""What a meter says: windows from one counter edge to the next, for one device each."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Doubt(StrEnum):
    """Why the energy of a window is not trusted; ``NONE`` when it is."""

    NONE = ""
    COUNTER_DECREASED = "counter decreased"
    FROZEN = "counter frozen while busy"
    LOST = "device lost"
    NOT_SUPPORTED = "not supported"
    DRIVER_RELOADED = "driver reloaded"
    CLOCK_SUSPENDED = "clock suspended"
    SCOPE_CHANGED = "scope changed"
    SHARED = "device shared with other tenants"
    GAP = "reader was late"
    SLEEPING = "engine sleeping"
    INTEGRATED_POWER = "integrated power, no counter"
    LAG_LEARNT = "lag of the counter was learnt"
    OVERFLOWED = "windows nobody took were joined"


class MeterWindow(NamedTuple):
    """Energy of one device between two instants. Windows of a device tile its time, in order.

    device: index of the device among those of this engine.
    begin_seconds, end_seconds: on the monitor's clock (``time.monotonic``), shifted by the learnt lag.
    energy_joules: metered, None when the meter does not know (METERING section 6).
    sigma_joules: standard deviation of ``energy_joules`` by edge timing and a part-time sensor.
    doubt: why the window may not be trained on; totals still count a doubtful window that has an energy.
    """

    device: int
    begin_seconds: float
    end_seconds: float
    energy_joules: float | None
    sigma_joules: float = 0.0
    doubt: Doubt = Doubt.NONE

    @property
    def duration_seconds(self) -> float:
        """Length of the window."""
        return self.end_seconds - self.begin_seconds
