"""Memory and network Roofline: the least time a piece of work can take on a device.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009:
attainable FLOP/s = min(peak, intensity x bandwidth), here as time and with a third ceiling for the
link, as LLMCO2 does (Fu et al., arXiv:2410.02950, section on the Roofline model).
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple


class Bound(StrEnum):
    """The ceiling that sets the least time."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Work(NamedTuple):
    """FLOPs, bytes moved to and from memory, bytes sent over the link."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0


class Ceilings(NamedTuple):
    """FLOP/s, bytes/s of memory, bytes/s of the link; infinite where a ceiling does not exist."""

    flops_per_second: float
    memory_bytes_per_second: float
    network_bytes_per_second: float = math.inf


def seconds_by_ceiling(work: Work, ceilings: Ceilings) -> dict[Bound, float]:
    """Seconds the work would take if only one ceiling held, for each ceiling."""
    return {bound: amount / rate for bound, amount, rate in zip(Bound, work, ceilings, strict=True)}


def least_time_seconds(work: Work, ceilings: Ceilings) -> float:
    """Least time in seconds: the slowest ceiling, the other two being hidden behind it."""
    return max(seconds_by_ceiling(work, ceilings).values())


def bound(work: Work, ceilings: Ceilings) -> Bound:
    """Which ceiling sets the least time; compute before memory before network when equal."""
    seconds = seconds_by_ceiling(work, ceilings)
    return max(seconds, key=lambda which: seconds[which])


def arithmetic_intensity(work: Work) -> float:
    """FLOPs per byte of memory traffic; infinite for work that touches no memory."""
    return work.flops / work.memory_bytes if work.memory_bytes else math.inf


def ridge_point(ceilings: Ceilings) -> float:
    """Arithmetic intensity in FLOP/byte from which the compute ceiling holds."""
    return ceilings.flops_per_second / ceilings.memory_bytes_per_second
