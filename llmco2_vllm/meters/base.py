"""What every meter offers, and the errors that tell the sampler what to do next (METERING section 6)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

# Of an exception that nobody foresaw: the reason is shown in every response.
MOST_TOLD_CHARACTERS = 120


class Reading(NamedTuple):
    """One look at a device.

    time_seconds: when the value was taken, on the monotonic clock.
    energy_joules: cumulative since an unknown start, None when the device has no counter.
    power_watts: now, None when unknown.
    """

    time_seconds: float
    energy_joules: float | None
    power_watts: float | None = None


class Vitals(NamedTuple):
    """Slow quantities, read once per second; None when unknown."""

    temperature_celsius: float | None = None
    sm_clock_mhz: float | None = None


class DeviceIdentity(NamedTuple):
    """Which device a meter weighs.

    scope: what the energy covers: ``gpu``, ``module`` (GPU, CPU and memory) or ``host``. Never mixed in training.
    shared: the energy is that of a device that others may use at the same time (MIG).
    power_basis: what ``power_watts`` is: ``instant power``, ``average power`` or ``none``.
    tick_seconds: known publication period of the counter, None when it has to be learnt.
    """

    uuid: str
    model_name: str
    scope: str = "gpu"
    shared: bool = False
    power_basis: str = "none"
    tick_seconds: float | None = None


class Meter(Protocol):
    """One metered device. It is opened, read and closed in one thread; every method raises MeterError."""

    @property
    def name(self) -> str:
        """Kind of meter: ``nvml``, ``rapl``, ``replay``."""

    @property
    def identity(self) -> DeviceIdentity:
        """The device; its scope may be another one after :meth:`reopen`."""

    def read(self) -> Reading:
        """Energy and power now, in one call of the driver."""

    def vitals(self) -> Vitals:
        """Temperature and clock; not for the fast loop."""

    def reopen(self) -> None:
        """Start again with the driver, after a loss or a fork."""

    def close(self) -> None:
        """Let go of the driver. Never raises."""


class MeterError(Exception):
    """A reading that failed; the kind says what to do."""


class MeterUnavailableError(MeterError):
    """Library, symbol, driver, device or permission missing: predict only, the message is the reason."""


class NotSupportedError(MeterError):
    """This device does not offer the quantity: degrade."""


class DeviceLostError(MeterError):
    """Lost, or in need of a reset: close the window without energy, open again with back-off."""


class UninitializedError(MeterError):
    """The library was not initialised in this process, as after a fork: initialise and read again."""


class SkippedReadingError(MeterError):
    """Time-out or unknown error: this sample is skipped, the next may be fine."""


def told(error: Exception) -> str:
    """What went wrong, as a reason: the message of a MeterError; type and message, in one short line, of any other."""
    if isinstance(error, MeterError):
        return str(error) or type(error).__name__
    message = " ".join(str(error).split())[:MOST_TOLD_CHARACTERS]
    return f"fails with {type(error).__name__}: {message}".removesuffix(": ")
