"""NVIDIA GPUs through NVML: the energy counter first, then power to integrate (METERING sections 1, 2 and 6).

Field numbers and units are those of nvml.h: 83 total energy in mJ, 186 and 185 instant and average power in mW;
scope 0 is the GPU, 1 the module. No process lists are read: they take milliseconds and hold the driver's lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import byref, c_int
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmco2_vllm.core.units import milli
from llmco2_vllm.meters.base import (
    DeviceIdentity,
    DeviceLostError,
    MeterError,
    MeterUnavailableError,
    NotSupportedError,
    Reading,
    SkippedReadingError,
    UninitializedError,
    Vitals,
)
from llmco2_vllm.meters.tokens import InstalledDevice, choose_devices

ENERGY_FIELD = 83
POWER_FIELDS = {186: "instant power", 185: "average power"}
SCOPES = {0: "gpu", 1: "module"}
OFFSET_PERIOD_SECONDS = 1.0
DRIFT_SECONDS = 0.005

SUCCESS = 0
# Members of nvmlValue_t by nvmlValueType_t.
_UNION = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal")
_KINDS: dict[int, type[MeterError]] = {
    1: UninitializedError,
    2: NotSupportedError,  # older drivers say INVALID_ARGUMENT of a field or scope they do not know
    3: NotSupportedError,
    4: MeterUnavailableError,
    6: MeterUnavailableError,
    9: MeterUnavailableError,
    12: MeterUnavailableError,
    13: MeterUnavailableError,
    15: DeviceLostError,
    16: DeviceLostError,
    18: MeterUnavailableError,
    28: DeviceLostError,
}


def error_of(code: int, message: str) -> MeterError:
    """The typed error for an NVML return code; a time-out and what is unknown skip a sample."""
    return _KINDS.get(code, SkippedReadingError)(f"NVML: {message} ({code})")


class NvmlLibrary:
    """NVML in this process. Initialised on first use, again after a fork, once per process."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._owner_pid: int | None = None
        self.generation = 0  # handles are valid within a generation

    def call(self, function: str, *arguments: Any) -> Any:
        """Call ``function`` of nvidia-ml-py. Raises MeterError."""
        self._initialise()
        return self._guarded(function, *arguments)

    def _guarded(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            raise error_of(int(error.value), str(error)) from None

    @property
    def initialised(self) -> bool:
        """Whether NVML is initialised in this very process."""
        return self._owner_pid == os.getpid()

    def _initialise(self) -> None:
        if self.initialised:
            return
        if self._nvml is None:
            try:
                self._nvml = import_module("pynvml")
            except ImportError as error:
                raise MeterUnavailableError(f"nvidia-ml-py is not installed ({error})") from None
            if not hasattr(self._nvml, "_nvmlGetFunctionPointer"):
                self._nvml = None
                raise MeterUnavailableError(
                    "the unofficial package pynvml is installed in place of nvidia-ml-py; run:"
                    " pip uninstall pynvml && pip install --force-reinstall nvidia-ml-py"
                )
        self._guarded("nvmlInit")
        self._owner_pid = os.getpid()
        self.generation += 1

    def fields(self, handle: Any, wanted: Sequence[tuple[int, int]]) -> Callable[[], Any]:
        """A call of nvmlDeviceGetFieldValues for (field, scope) pairs that makes nothing anew; it raises MeterError.

        What it returns is written over by the next call.
        """
        self._initialise()
        nvml = self._nvml
        values = (nvml.c_nvmlFieldValue_t * len(wanted))()
        for value, (field, scope) in zip(values, wanted, strict=True):
            value.fieldId, value.scopeId = field, scope
        function = self._guarded("_nvmlGetFunctionPointer", "nvmlDeviceGetFieldValues")
        count, pointer = c_int(len(wanted)), byref(values)

        def call() -> Any:
            code = function(handle, count, pointer)
            if code != SUCCESS:
                raise error_of(code, str(nvml.NVMLError(code)))
            return values

        return call

    def restart(self) -> None:
        """Leave the driver and come back. Raises MeterError when it does not."""
        self.close()
        self._initialise()

    def close(self) -> None:
        """Leave the driver. Never raises."""
        if self.initialised:
            with suppress(MeterError):  # it may be gone already
                self._guarded("nvmlShutdown")
        self._owner_pid = None

    def installed(self) -> list[InstalledDevice]:
        """All GPUs that this process sees. Raises MeterError."""
        devices = []
        for index in range(self.call("nvmlDeviceGetCount")):
            handle = self.call("nvmlDeviceGetHandleByIndex", index)
            uuid, model = (str(self.call(f"nvmlDeviceGet{what}", handle)) for what in ("UUID", "Name"))
            devices.append(InstalledDevice(index, uuid, model, tuple(self._instances(handle))))
        return devices

    def mig_enabled(self, handle: Any) -> bool:
        """Whether the GPU is divided into instances."""
        try:
            return bool(self.call("nvmlDeviceGetMigMode", handle)[0])
        except MeterError:
            return False

    def _instances(self, handle: Any) -> list[str]:
        found: list[str] = []
        if not self.mig_enabled(handle):
            return found
        for index in range(self.call("nvmlDeviceGetMaxMigDeviceCount", handle)):
            try:
                instance = self.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
                found.append(str(self.call("nvmlDeviceGetUUID", instance)))
            except MeterError:
                continue  # this place holds no instance
        return found


@dataclass(frozen=True)
class Clocks:
    """The clocks of a reader, in seconds: monotonic, and the wall clock that NVML's time stamps are on."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class StampClock:
    """NVML's time stamps (microseconds of the wall clock) on the monotonic clock, held to the time of the call."""

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._offset = 0.0
        self._checked = float("-inf")
        self.steps = 0  # how often the wall clock was set
        self.outside = 0  # how many stamps lay outside their call

    def monotonic(self, stamp_microseconds: int, before: float, after: float) -> float:
        """The stamp of a call that lasted from ``before`` to ``after``; their nearer one if it lies outside."""
        if before - self._checked >= OFFSET_PERIOD_SECONDS:
            offset = self._clocks.monotonic() - self._clocks.wall()
            self.steps += self._checked > float("-inf") and abs(offset - self._offset) > DRIFT_SECONDS
            self._offset, self._checked = offset, before
        stamp = stamp_microseconds / 1e6 + self._offset
        self.outside += not before - 1e-4 <= stamp <= after + 1e-4
        return min(max(stamp, before), after)


class NvmlMeter:
    """One GPU. A MIG instance is weighed by its GPU, which is then shared."""

    name = "nvml"

    def __init__(self, library: NvmlLibrary, device: InstalledDevice, clocks: Clocks | None = None) -> None:
        self._library, self._device = library, device
        self._clocks = clocks or Clocks()
        self.stamps = StampClock(self._clocks)
        self._acquire()

    @property
    def identity(self) -> DeviceIdentity:
        """UUID, model, scope; what power is."""
        return self._identity

    def _acquire(self) -> None:
        """Handle, scope and power field. Raises MeterError."""
        self._generation = self._library.generation
        self._handle = self._library.call("nvmlDeviceGetHandleByUUID", self._device.uuid)
        energy_scope, power_field, power_scope = self._probe()
        scope = SCOPES[max(energy_scope, power_scope)]
        wanted = [(ENERGY_FIELD, energy_scope)] + ([(power_field, power_scope)] if power_field else [])
        self._fields = self._library.fields(self._handle, wanted)
        basis = POWER_FIELDS[power_field] if power_field else "none"
        shared = self._library.mig_enabled(self._handle)
        self._identity = DeviceIdentity(self._device.uuid, self._device.model_name, scope, shared, basis)

    def _probe(self) -> tuple[int, int, int]:
        """(scope of the energy, field and scope of the power; field 0 when there is none).

        Power that only answers for the module marks one (GH200): its counter contains the CPU as well.
        """
        asked = [(field, scope) for scope in SCOPES for field in (ENERGY_FIELD, *POWER_FIELDS)]
        values = self._library.fields(self._handle, asked)()
        answered = [pair for pair, value in zip(asked, values, strict=True) if value.nvmlReturn == SUCCESS]
        energy = next((scope for field, scope in answered if field == ENERGY_FIELD), 0)
        power = next(((field, scope) for field, scope in answered if field != ENERGY_FIELD), (0, 0))
        return energy, *power

    def read(self) -> Reading:
        """Energy and power by one call, timed by the driver. Raises MeterError."""
        if self._generation != self._library.generation or not self._library.initialised:
            self.reopen()
        before = self._clocks.monotonic()
        values = self._fields()
        after = self._clocks.monotonic()
        moment = self.stamps.monotonic(values[0].timestamp, before, after)
        energy = _number(values[0])
        power = _number(values[1]) if len(values) > 1 else None
        if power is None and self._identity.power_basis != "none":
            self._acquire()  # the field went away: is there another one?
        return Reading(moment, None if energy is None else milli(energy), None if power is None else milli(power))

    def vitals(self) -> Vitals:
        """Temperature in degrees Celsius and SM clock in MHz, None where NVML does not say."""
        return Vitals(
            self._optional("nvmlDeviceGetTemperature", self._handle, 0),
            self._optional("nvmlDeviceGetClockInfo", self._handle, 1),
        )

    def _optional(self, function: str, *arguments: Any) -> float | None:
        try:
            return float(self._library.call(function, *arguments))
        except MeterError:
            return None

    def reopen(self) -> None:
        """A new handle; the library is started again unless that has been done since this handle was taken."""
        if self._generation == self._library.generation:
            self._library.restart()
        self._acquire()

    def close(self) -> None:
        """Leave the driver."""
        self._library.close()


def _number(value: Any) -> float | None:
    """A field's value, None when the device does not offer it. Raises MeterError for what else went wrong."""
    code = int(value.nvmlReturn)
    if code == SUCCESS:
        kind = value.valueType
        return float(getattr(value.value, _UNION[kind])) if kind < len(_UNION) else None
    error = error_of(code, f"field {value.fieldId}")
    if isinstance(error, NotSupportedError):
        return None
    raise error


def open_nvml(devices: Sequence[str | int] | None = None, clocks: Clocks | None = None) -> list[NvmlMeter]:
    """Meters of the GPUs named by ``devices`` (see :func:`choose_devices`), in that order. Raises MeterError.

    To be called in the thread that will read them.
    """
    library = NvmlLibrary()
    try:
        pci_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        return [
            NvmlMeter(library, device, clocks) for device in choose_devices(devices, library.installed(), pci_order)
        ]
    except MeterError:
        library.close()
        raise
