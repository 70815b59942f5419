"""The way back of a counter that froze: it is watched, and believed again once it counts as it should."""

from __future__ import annotations

from math import isfinite

from llmco2_vllm.meters.base import Reading

# As long as the cross-check at start-up: tens of ticks, so that a counter stuck for most of them is off by far.
TRIAL_SECONDS = 5.0
# Counter and integrated power agree to a percent under load, but 187 J stood against 327 J in 5 s of idleness
# (METERING section 1): within a factor of two is no fault of the counter.
PLAUSIBLE_RATIO = 2.0


class Trial:
    """Readings of a counter that is not believed.

    For ``seconds`` on end it has to count, standing still for no more than ``longest_still_seconds``, and to come to
    what integrated power comes to; where power is not known, to what the device drew before: ``seen_watts``, lowest
    and highest, None when nothing is known of that either. All within ``PLAUSIBLE_RATIO``. What it makes up for with
    its first step is not looked at.
    """

    def __init__(self, seconds: float, longest_still_seconds: float, seen_watts: tuple[float, float] | None) -> None:
        self._seconds, self._longest_still_seconds, self._seen_watts = seconds, longest_still_seconds, seen_watts
        self._last: Reading | None = None
        self._begin: Reading | None = None
        self._advanced_at = 0.0
        self._integral: float | None = 0.0  # of power since the begin, J; None once a reading lacked it

    def passed(self, reading: Reading) -> bool:
        """Take in a reading; whether the counter is believed from now on."""
        last, self._last = self._last, reading
        if last is None:
            return False
        if last.energy_joules is None or reading.energy_joules is None or reading.energy_joules < last.energy_joules:
            self._begin = None
            return False
        self._integrate(last, reading)
        if reading.energy_joules == last.energy_joules:
            if reading.time_seconds - self._advanced_at > self._longest_still_seconds:
                self._begin = None
            return False
        self._advanced_at = reading.time_seconds
        if self._begin is None:
            self._start(reading)
        elif reading.time_seconds - self._begin.time_seconds >= self._seconds:
            if self._plausible(self._begin, reading):
                return True
            self._start(reading)
        return False

    def _start(self, reading: Reading) -> None:
        self._begin, self._integral = reading, 0.0

    def _integrate(self, last: Reading, reading: Reading) -> None:
        known = [r.power_watts for r in (last, reading) if r.power_watts is not None and isfinite(r.power_watts)]
        if len(known) < 2 or self._integral is None:
            self._integral = None
        else:
            self._integral += sum(known) / 2 * (reading.time_seconds - last.time_seconds)

    def _plausible(self, begin: Reading, end: Reading) -> bool:
        counted = (end.energy_joules or 0.0) - (begin.energy_joules or 0.0)
        if self._integral is not None:
            low = high = self._integral
        elif self._seen_watts is not None:
            low, high = (watts * (end.time_seconds - begin.time_seconds) for watts in self._seen_watts)
        else:
            return True  # it counts, and no more is asked of any counter at first
        return low / PLAUSIBLE_RATIO <= counted <= high * PLAUSIBLE_RATIO
