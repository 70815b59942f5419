"""Find the meter of this host. The sampler's thread opens it; who asks waits for its first answer, not longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llmco2_vllm.meters.activity import EngineActivity
from llmco2_vllm.meters.base import Meter, MeterUnavailableError
from llmco2_vllm.meters.nvml import open_nvml
from llmco2_vllm.meters.rapl import POWERCAP, RaplMeter
from llmco2_vllm.meters.sampler import EdgeSampler, Timing
from llmco2_vllm.meters.windows import WindowRules

CHOICES = ("auto", "nvml", "rapl", "none")
ANSWER_SECONDS = 1.5
SWITCHED_OFF = "switched off by the setting meter=none"


class Discovery(NamedTuple):
    """What was found. Without a sampler ``name`` is ``none`` and ``reason`` says why each meter did not open."""

    sampler: EdgeSampler | None
    name: str
    reason: str | None

    def now(self) -> tuple[str, str]:
        """(name, reason) of this moment: a driver may have answered or refused since, and devices come and go.

        The name is ``none`` while no meter is open. The reason is empty while energy is known; a meter that is open
        and knows none, as that of a lost device, keeps its name. For any thread, and cheap.
        """
        if self.sampler is None:
            return "none", self.reason or ""
        fault = self.sampler.fault
        if fault is None:
            return self.name, ""
        return ("none" if self.sampler.name == "none" else self.name), _said(self.name, fault)


@dataclass(frozen=True)
class Search:
    """Where to look.

    accelerator: the engine runs on GPUs; ``auto`` then takes NVML, and RAPL otherwise.
    powercap: root of the RAPL files; answer_seconds: how long to wait for the first answer.
    least_devices: how many GPUs the engine has; fewer are no meter of it, whenever the driver tells of them.
    """

    accelerator: bool = True
    powercap: Path = POWERCAP
    answer_seconds: float = ANSWER_SECONDS
    least_devices: int = 1
    timing: Timing | None = None
    rules: WindowRules | None = None


def open_meter(
    choice: str,
    devices: Sequence[str | int] | None = None,
    search: Search | None = None,
    activity: EngineActivity | None = None,
) -> Discovery:
    """Start a sampler over the chosen meter of ``devices`` (tokens as in CUDA_VISIBLE_DEVICES, None for all).

    Returns within ``answer_seconds``. A driver that has not answered by then is still waited for by the sampler's
    thread: windows come once it does, ``state()`` tells. Raises ValueError for an unknown choice.
    """
    if choice not in CHOICES:
        raise ValueError(f"meter={choice!r} is not possible; allowed: {', '.join(CHOICES)}")
    if choice == "none":
        return Discovery(None, "none", SWITCHED_OFF)
    search = search or Search()
    name = {"auto": "nvml" if search.accelerator else "rapl"}.get(choice, choice)
    sampler = EdgeSampler(_opener(name, devices, search), search.timing, search.rules, activity)
    sampler.start()
    if not sampler.answered.wait(search.answer_seconds):
        return Discovery(sampler, name, f"{name} did not answer within {search.answer_seconds:g} s; still waiting")
    if sampler.given_up:
        return Discovery(None, "none", _said(name, sampler.reason or ""))
    # One that failed in another way is tried again, and heard of by ``now``.
    return Discovery(sampler, name, None if sampler.reason is None else _said(name, sampler.reason))


def _said(name: str, reason: str) -> str:
    """A reason that says whose it is."""
    return reason if reason.lower().startswith(name) else f"{name}: {reason}"


def _opener(name: str, devices: Sequence[str | int] | None, search: Search) -> Callable[[], Sequence[Meter]]:
    if name == "rapl":
        return lambda: [RaplMeter(search.powercap)]
    return lambda: _all_of(open_nvml(devices), search.least_devices)


def _all_of(meters: Sequence[Meter], least: int) -> Sequence[Meter]:
    """The meters of an engine of ``least`` devices. Raises MeterUnavailableError where some of them are missing."""
    if len(meters) < least:
        for meter in meters:
            meter.close()
        raise MeterUnavailableError(f"{len(meters)} of this engine's {least} devices are on this host")
    return meters
