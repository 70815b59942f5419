"""The metered device of the server under test: the shim's, with its power in the hands of the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.nvml_shim.shim import Control, Row, energy_of

IDLE_WATTS, BUSY_WATTS = 75.0, 300.0


class Device:
    """One GPU that draws ``IDLE_WATTS`` from the shim's epoch on, until told otherwise."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._rows = [Row(0.0, power_watts=IDLE_WATTS)]

    def power(self, watts: float) -> None:
        """What it draws from now on."""
        row = Row(self.control.now, power_watts=watts)
        self.control.append(row)
        self._rows.append(row)

    @contextmanager
    def drawing(self, watts: float = BUSY_WATTS) -> Iterator[None]:
        """It draws this for a while, as a device with work does."""
        self.power(watts)
        try:
            yield
        finally:
            self.power(IDLE_WATTS)

    def joules(self, begin_epoch_seconds: float, end_epoch_seconds: float) -> float:
        """What it really spent between two times of the calendar."""
        offset = time.time() - time.monotonic() + self.control.epoch
        return energy_of(self._rows, begin_epoch_seconds - offset, end_epoch_seconds - offset)
