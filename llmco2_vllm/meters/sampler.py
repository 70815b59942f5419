"""EdgeSampler: one daemon thread that reads all devices of an engine and delivers windows.

The thread opens the meters, reads and closes them; nobody else touches the driver. It is a thin loop over
:meth:`EdgeSampler.poll_once`, which tests drive in virtual time. Nothing leaves it but windows and figures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.meters.activity import EngineActivity
from llmco2_vllm.meters.base import (
    DeviceLostError,
    Meter,
    MeterError,
    MeterUnavailableError,
    NotSupportedError,
    Reading,
    SkippedReadingError,
    UninitializedError,
    Vitals,
    told,
)
from llmco2_vllm.meters.edges import COARSE_SECONDS, CallLimit
from llmco2_vllm.meters.window_queue import WindowQueue
from llmco2_vllm.meters.windows import DeviceTrack, WindowRules, energy_between

logger = logging.getLogger("vllm.llmco2")

VITALS_SECONDS = 1.0
VITALS_CALLS = 2
NO_VITALS = Vitals()
BACK_OFF_SECONDS = 1.0
MOST_BACK_OFF_SECONDS = 30.0
SUSPENDED_SECONDS = 0.1
# Readings that may fail one after the other before the device counts as lost.
MOST_SKIPPED = 10
# A device is looked at about once a second at least; if it was not for so long, a driver keeps the thread waiting.
SILENT_SECONDS = 5.0
# How long stop() may have to wait for the thread.
MOST_SLEEP_SECONDS = 0.25
CROSS_CHECK_SECONDS = 5.0
# From here on windows are made longer, so that many devices do not keep the thread busy.
DEVICES_AT_FULL_RATE = 2
MOST_LENGTHENING = 5


def suspended_seconds() -> float:
    """How long this host has been suspended since boot: the boot-time clock goes on, the monotonic one stops."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class Timing:
    """Clocks in seconds."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    suspended: Callable[[], float] = suspended_seconds


@dataclass
class CrossCheck:
    """The counter against the integral of its own power readings, over the first seconds."""

    first: Reading | None = None
    last: Reading | None = None
    joules: float = 0.0
    ratio: float | None = None

    def see(self, reading: Reading) -> None:
        """Add a reading; sets ``ratio`` once ``CROSS_CHECK_SECONDS`` have passed."""
        if self.ratio is not None or reading.energy_joules is None or reading.power_watts is None:
            return
        if self.first is None or self.last is None or self.last.power_watts is None:
            self.first = self.last = reading
            return
        seconds = reading.time_seconds - self.last.time_seconds
        self.joules += (reading.power_watts + self.last.power_watts) / 2 * seconds
        self.last = reading
        counted = reading.energy_joules - (self.first.energy_joules or 0.0)
        if counted < 0:
            self.first, self.last, self.joules = reading, reading, 0.0
        elif reading.time_seconds - self.first.time_seconds >= CROSS_CHECK_SECONDS and self.joules > 0:
            self.ratio = counted / self.joules


@dataclass
class _Device:
    """A meter, its track, and when it is looked at next."""

    meter: Meter
    track: DeviceTrack
    opened_at: float
    limit: CallLimit = field(default_factory=CallLimit)
    check: CrossCheck = field(default_factory=CrossCheck)
    vitals: Vitals = NO_VITALS
    vitals_due: float = float("-inf")
    due: float = float("-inf")
    back_off: float = BACK_OFF_SECONDS
    closed: bool = False  # lost: to be opened anew at ``due``
    calls: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    read_at: float | None = None
    failure: str | None = None  # of the last look

    def called(self, now: float, calls: int = 1) -> None:
        self.calls += calls
        for _ in range(calls):
            self.limit.note(now)

    def silence(self, now: float) -> str | None:
        """Why its energy is not known just now; None while it is."""
        if self.failure is not None:
            return self.failure
        if self.track.source == "none" and self.track.blind_doubt:
            return self.track.blind_doubt.value
        answered_at = self.opened_at if self.read_at is None else self.read_at
        return "its driver does not answer" if now - answered_at > SILENT_SECONDS else None

    def retreat(self, now: float) -> None:
        """Try again later, and later still after that."""
        self.due = now + self.back_off
        self.back_off = min(2 * self.back_off, MOST_BACK_OFF_SECONDS)


class EdgeSampler:
    """Windows of all devices of one engine.

    ``windows``: taken from the left by the scheduler thread (``popleft``).
    ``activity``: told by the scheduler thread when steps run and when not.
    """

    def __init__(
        self,
        open_meters: Callable[[], Sequence[Meter]],
        timing: Timing | None = None,
        rules: WindowRules | None = None,
        activity: EngineActivity | None = None,
    ) -> None:
        self.windows = WindowQueue()
        self.activity = activity or EngineActivity()
        self.reason: str | None = None  # why no meter is open, or none of those that are is read
        self.answered = threading.Event()  # the first attempt to open is over
        self.given_up = False  # there is no such meter here; any other failure is tried again
        self._open_meters = open_meters
        self._timing = timing or Timing()
        self._rules = rules or WindowRules()
        self._devices: list[_Device] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._suspended = self._timing.suspended()
        self._retry_at = float("-inf")
        self._back_off = BACK_OFF_SECONDS
        self._exceptions = 0
        self._restarts = 0
        self._said: set[str] = set()
        self._started_at: float | None = None
        self._thread_seconds = 0.0

    # For any thread.

    def start(self) -> None:
        """Start the thread; it opens the meters. A sampler that runs already goes on."""
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name="llmco2-sampler", daemon=True)
            self._thread.start()

    def stop(self, timeout_seconds: float = 2.0) -> bool:
        """Ask the thread to close its meters and wait for it. False when the driver holds it up."""
        self._stopping.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)
        return thread is None or not thread.is_alive()

    @property
    def name(self) -> str:
        """Kind of meter that is open, ``none`` while none is."""
        return self._devices[0].meter.name if self._devices else "none"

    @property
    def fault(self) -> str | None:
        """Why energy is not known just now; None while every device is read, by its counter or its power."""
        if not self._devices:
            return self.reason or "no answer yet"
        if self.reason is not None:
            return self.reason
        now, devices = self._timing.clock(), defaultdict[str, list[str]](list)
        for device in self._devices:
            if why := device.silence(now):
                devices[why].append(str(device.track.device))
        return "; ".join(f"device {', '.join(those)}: {why}" for why, those in devices.items()) or None

    def energy_between(
        self, begin_seconds: float, end_seconds: float, device: int | None = None
    ) -> tuple[float, float] | None:
        """(joules, standard deviation) of a span, of one device or of all; None where not all of it was metered."""
        chosen = self._devices if device is None else self._devices[device : device + 1]
        parts = [energy_between(list(d.track.ring), begin_seconds, end_seconds) for d in chosen]
        known = [part for part in parts if part is not None]
        if not parts or len(known) < len(parts):
            return None
        return sum(joules for joules, _ in known), sum(sigma**2 for _, sigma in known) ** 0.5

    def state(self) -> dict[str, Any]:
        """Figures for GET /carbon: plain JSON values, None where unknown."""
        elapsed = None if self._started_at is None else self._timing.clock() - self._started_at
        thread = self._thread
        return {
            "meter": self.name,
            "reason": self.reason,
            "fault": self.fault,
            "alive": thread is not None and thread.is_alive(),
            "waiting_windows": len(self.windows),
            "joined_windows": self.windows.overflowed.total(),
            "exceptions": self._exceptions,
            "restarts": self._restarts,
            "thread_ratio": self._thread_seconds / elapsed if elapsed and elapsed > 0 else None,
            "devices": [self._device_state(device, elapsed) for device in self._devices],
        }

    def _device_state(self, device: _Device, elapsed: float | None) -> dict[str, Any]:
        track, identity = device.track, device.track.identity
        line, now = track.pace.line, self._timing.clock()
        basis = {"counter": "counter", "power": identity.power_basis}.get(track.source, "none")
        faults = track.faults + Counter({Doubt.OVERFLOWED: self.windows.overflowed[track.device]})
        return {
            "name": identity.model_name,
            "uuid": identity.uuid,
            "scope": identity.scope,
            "shared": identity.shared,
            "source": track.source,
            "basis": basis,
            "tick_seconds": track.pace.tick_seconds,
            "lag_seconds": track.lag.lag_seconds,
            "jitter_seconds": line.jitter_seconds if line else None,
            "calls": device.calls,
            "reads_per_second": device.calls / elapsed if elapsed and elapsed > 0 else None,
            "age_seconds": None if device.read_at is None else now - device.read_at,
            "power_watts": None if device.silence(now) else track.power_watts,
            "temperature_celsius": device.vitals.temperature_celsius,
            "sm_clock_mhz": device.vitals.sm_clock_mhz,
            "faults": {doubt.value: faults[doubt] for doubt in Doubt if faults[doubt]},
            "skipped": device.skipped,
            "cross_check_ratio": device.check.ratio,
        }

    # For the sampler thread, and for tests in its place.

    def poll_once(self) -> float:
        """Do all that is due now; the time at which to call again. Raises what opening raises, nothing else."""
        now = self._timing.clock()
        if not self._devices:
            self._open(now)
        self._check_suspended()
        for device in self._devices:
            if device.due <= now:
                self._guarded_look(device, now)
        self.reason, self._back_off = None, BACK_OFF_SECONDS
        return min((device.due for device in self._devices), default=now + BACK_OFF_SECONDS)

    def close(self) -> None:
        """Close the meters."""
        for device in self._devices:
            device.meter.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                due = self.poll_once()
                self._thread_seconds = time.thread_time()
                self._wait(due - self._timing.clock())
            except MeterUnavailableError as error:
                self.given_up = True
                self._failed(error)
                break  # predict only
            except Exception as error:
                self._exceptions += 1
                self._restarts += 1
                self._failed(error)
                self._rest(self._back_off)
                self._back_off = min(2 * self._back_off, MOST_BACK_OFF_SECONDS)
        self.close()

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._timing.sleep(min(seconds, MOST_SLEEP_SECONDS))

    def _rest(self, seconds: float) -> None:
        """Wait out a back-off, but not a stop."""
        end = self._timing.clock() + seconds
        while not self._stopping.is_set() and (left := end - self._timing.clock()) > 0:
            self._wait(left)

    def _failed(self, error: Exception) -> None:
        self.reason = told(error)
        # A host without a meter is no failure: who asked is told the reason.
        if not isinstance(error, MeterUnavailableError):
            self._say(f"meter {type(error).__name__}", "llmco2: the meter failed (%s); serving goes on", error)
        self.answered.set()

    def _open(self, now: float) -> None:
        meters = self._open_meters()
        if not meters:
            raise MeterUnavailableError("no device to meter")
        many = min(-(-len(meters) // DEVICES_AT_FULL_RATE), MOST_LENGTHENING)
        rules = WindowRules(self._rules.window_seconds * many, self._rules.part_time_variation)
        self._started_at, self.reason = now, None
        opened_at = self._timing.clock()
        self._devices = [
            _Device(meter, DeviceTrack(index, meter.identity, self.windows, self.activity, rules), opened_at)
            for index, meter in enumerate(meters)
        ]
        self.answered.set()

    def _check_suspended(self) -> None:
        suspended = self._timing.suspended()
        if suspended - self._suspended > SUSPENDED_SECONDS:
            for device in self._devices:
                device.track.suspended()
        self._suspended = suspended

    def _guarded_look(self, device: _Device, now: float) -> None:
        try:
            self._look(device, now)
        except Exception as error:
            self._fault(device, now, error)

    def _look(self, device: _Device, now: float) -> None:
        if device.closed:
            device.called(now)
            device.meter.reopen()
            device.closed = False
            device.track.reopened(device.meter.identity)
        device.called(now)
        reading = device.meter.read()
        device.read_at, device.back_off, device.skipped_in_a_row = reading.time_seconds, BACK_OFF_SECONDS, 0
        device.check.see(reading)
        kinds = len(device.track.faults)
        device.track.identify(device.meter.identity)  # a reading may have found the device changed
        device.track.observe(reading)
        if len(device.track.faults) > kinds:
            for doubt in device.track.faults:
                self._say(f"{device.track.device} {doubt}", "llmco2: device %d: %s", device.track.device, doubt.value)
        if now >= device.vitals_due:
            device.vitals_due = now + VITALS_SECONDS
            device.called(now, VITALS_CALLS)
            device.vitals = device.meter.vitals()
        device.due = max(device.track.due, device.limit.free_at)
        device.failure = None

    def _fault(self, device: _Device, now: float, error: Exception) -> None:
        """METERING section 6: what each kind of failure means for this device. The others go on."""
        if isinstance(error, SkippedReadingError):
            device.skipped += 1
            device.skipped_in_a_row += 1
            if device.skipped_in_a_row <= MOST_SKIPPED:
                device.due = max(now + COARSE_SECONDS, device.limit.free_at)
                return
        if isinstance(error, UninitializedError) and not device.closed:
            device.closed, device.due = True, now  # at once, and with back-off from then on
            return
        if isinstance(error, MeterError):
            unsupported = isinstance(error, NotSupportedError)
            doubt = Doubt.NOT_SUPPORTED if unsupported else Doubt.LOST
            device.failure = f"{doubt.value}: {told(error)}"
            device.track.blind(now, doubt)
            device.closed = not unsupported
        else:
            device.failure = told(error)
            self._exceptions += 1
        device.vitals = NO_VITALS
        device.retreat(now)
        kind = "lost" if isinstance(error, DeviceLostError) else type(error).__name__
        self._say(f"{device.track.device} {kind}", "llmco2: device %d: %s; serving goes on", device.track.device, error)

    def _say(self, what: str, message: str, *arguments: object) -> None:
        """Log once per kind of event."""
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *arguments)
