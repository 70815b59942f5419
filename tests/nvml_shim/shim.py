"""Build the shim, write its traces, and steer it while others read it.

    folder = build(tmp_path)
    with Control(tmp_path / "control") as control:
        environ = environment(folder, Settings(tick=0.02), control=control)
        subprocess.run([...], env={**os.environ, **environ})   # reads 75 W
        control.power(300.0)                                   # from now on
        control.fail(LOST)

Times are seconds since the control's epoch (real clock) or what ``Control.virtual_seconds`` was set to.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

SOURCE = Path(__file__).with_name("shim.c")
LIBRARY = "libnvidia-ml.so.1"
H200 = "NVIDIA H200|GPU-8f6c1a52-0000-4000-8000-000000000000"
H100 = "NVIDIA H100 80GB HBM3|GPU-1b2c3d4e-0000-4000-8000-000000000001"

POWER, RESET, FAIL, MEND, FREEZE = range(5)
NOT_SUPPORTED, TIMEOUT, LOST, RESET_REQUIRED, UNKNOWN = 3, 10, 15, 16, 999
ENERGY_FIELD, AVERAGE_FIELD, INSTANT_FIELD = 83, 185, 186

_ROW = struct.Struct("<ddiiii")
_HEAD = struct.Struct("<dQ")
CAPACITY = 100_000


def compiler() -> str | None:
    """A C compiler, None where there is none."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the shim into ``folder``, which is then one for LD_LIBRARY_PATH. Raises CalledProcessError."""
    program = compiler()
    assert program is not None, "no C compiler"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
    library = folder / LIBRARY
    subprocess.run(
        [program, *flags, f"-Wl,-soname,{LIBRARY}", "-o", library, SOURCE, "-lpthread", "-lm"], check=True, timeout=120
    )
    return folder


class Row(NamedTuple):
    """From ``time_seconds`` on a device draws this power (NaN: as before), or something happens to it."""

    time_seconds: float
    device: int = 0
    power_watts: float = float("nan")
    event: int = POWER
    field: int = 0
    code: int = 0


def write_trace(path: Path, rows: Iterable[Row]) -> Path:
    """A trace as CSV: time_seconds, device, power_watts, event, field, code; in order of time."""
    lines = ["# time_seconds,device,power_watts,event,field,code"]
    lines += [f"{r.time_seconds:.6f},{r.device},{r.power_watts:.3f},{r.event},{r.field},{r.code}" for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def serving_trace() -> list[Row]:
    """2 s idle, 10 s of decode steps (9 ms, 430 W) with one in seven a prefill (28 ms, 620 W), idle, then faults.

    The counter is reset at 20 s, off from 22 to 23 s, and the device is lost at 24 s.
    """
    generator, now = np.random.default_rng(0), 2.0
    rows = [Row(0.0, power_watts=75.0)]
    while now < 12.0:
        prefill = generator.random() < 0.15
        seconds = (0.028 if prefill else 0.009) * generator.lognormal(0, 0.15)
        rows.append(Row(now, power_watts=(620 if prefill else 430) * generator.normal(1, 0.03)))
        now += seconds
    rows += [Row(now, power_watts=118.0), Row(20.0, event=RESET)]
    rows += [Row(22.0, event=FAIL, field=field, code=NOT_SUPPORTED) for field in (83, 185, 186)]
    rows += [Row(23.0, event=MEND), Row(24.0, event=FAIL, code=LOST)]
    return rows


def energy_of(rows: Iterable[Row], begin_seconds: float, end_seconds: float, device: int = 0) -> float:
    """The joules that a trace really holds in a span."""
    powers = [row for row in rows if row.device == device and row.event == POWER]
    ends = [row.time_seconds for row in powers[1:]] + [float("inf")]
    return sum(
        row.power_watts * max(0.0, min(end, end_seconds) - max(row.time_seconds, begin_seconds))
        for row, end in zip(powers, ends, strict=True)
    )


@dataclass(frozen=True)
class Settings:
    """How the shim behaves; seconds throughout.

    tick, phase, lag: of the counter. duty: share of each tick that a part-time sensor sees.
    power_tick, power_window: of the power fields. gain: of the sensor. base: joules at time 0. delay: of each call;
    init_delay, init_code: of initialisation. mig: GPUs are divided in two instances. scope: the only one that answers.
    virtual: time is what the control says. speed: of the real clock.
    """

    devices: tuple[str, ...] = (H200,)
    tick: float = 0.1
    phase: float = 0.0
    lag: float = 0.0
    duty: float = 1.0
    power_tick: float = 0.1
    power_window: float = 0.025
    gain: float = 1.0
    base: float = 123456.789
    delay: float = 0.0
    init_delay: float = 0.0
    init_code: int = 0
    mig: bool = False
    scope: int = 0
    virtual: bool = False
    speed: float = 1.0


class Control:
    """The control file: virtual time, and rows appended while the shim runs. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """A new, empty file."""
        with path.open("wb") as file:
            file.truncate(_HEAD.size + CAPACITY * _ROW.size)
        self._open(path, time.monotonic())

    @classmethod
    def attach(cls, path: Path, epoch: float) -> Control:
        """The file that another process made, which no longer writes to it."""
        control = cls.__new__(cls)
        control._open(path, epoch)
        return control

    def _open(self, path: Path, epoch: float) -> None:
        self.path, self.epoch, self.speed, self._virtual = path, epoch, 1.0, False
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._rows = int(struct.unpack_from("<Q", self._memory, 8)[0])

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.close()

    @property
    def now(self) -> float:
        """The shim's time."""
        return self.virtual_seconds if self._virtual else (time.monotonic() - self.epoch) * self.speed

    @property
    def virtual_seconds(self) -> float:
        """Virtual time; setting it makes time virtual."""
        return float(struct.unpack_from("<d", self._memory, 0)[0])

    @virtual_seconds.setter
    def virtual_seconds(self, value: float) -> None:
        self._virtual = True
        struct.pack_into("<d", self._memory, 0, value)

    def append(self, row: Row) -> None:
        """Add a row; the shim sees it at its next call."""
        assert self._rows < CAPACITY, "the control file is full"
        _ROW.pack_into(
            self._memory, _HEAD.size + self._rows * _ROW.size, *row[:1], row.power_watts, row.device, *row[3:]
        )
        self._rows += 1
        struct.pack_into("<Q", self._memory, 8, self._rows)

    def power(self, watts: float, device: int = 0) -> None:
        """From now on the device draws this."""
        self.append(Row(self.now, device, watts))

    def fail(self, code: int, field: int = 0, device: int = 0) -> None:
        """From now on a field (0: every call) answers with this code."""
        self.append(Row(self.now, device, event=FAIL, field=field, code=code))

    def mend(self, device: int = 0) -> None:
        """All that failed or froze is well again; a counter that was reset stays so."""
        self.append(Row(self.now, device, event=MEND))

    def reset(self, device: int = 0) -> None:
        """The counter starts from 0."""
        self.append(Row(self.now, device, event=RESET))

    def freeze(self, device: int = 0) -> None:
        """The counter stands still."""
        self.append(Row(self.now, device, event=FREEZE))


def environment(
    folder: Path,
    settings: Settings | None = None,
    trace: Path | None = None,
    control: Control | None = None,
    call_log: Path | None = None,
) -> dict[str, str]:
    """Variables that let a child process read the shim in ``folder``. Without a trace a device draws 75 W."""
    settings = settings or Settings()
    values: dict[str, object] = {
        "DEVICES": ";".join(settings.devices),
        "VIRTUAL": int(settings.virtual),
        "MIG": int(settings.mig),
        "EPOCH": repr(control.epoch if control else time.monotonic()),
        "TRACE": trace,
        "CONTROL": control.path if control else None,
        "LOG": call_log,
    }
    for name in ("tick", "phase", "lag", "duty", "power_tick", "power_window", "gain", "base", "delay"):
        values[name.upper()] = repr(getattr(settings, name))
    for name in ("init_delay", "init_code", "scope", "speed"):
        values[name.upper()] = repr(getattr(settings, name))
    if control:
        control.speed = settings.speed
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    return {"LD_LIBRARY_PATH": path} | {f"SHIM_{key}": str(v) for key, v in values.items() if v is not None}
