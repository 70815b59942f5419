"""Which GPUs: from tokens as CUDA_VISIBLE_DEVICES holds them to NVML's devices, by UUID (METERING section 2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llmco2_vllm.meters.base import MeterUnavailableError

_BARE_UUID = re.compile(r"^[0-9a-fA-F]{8}-")
_OLD_MIG = re.compile(r"^MIG-(GPU-[0-9a-fA-F-]+)/\d+/\d+$")


class InstalledDevice(NamedTuple):
    """A GPU as NVML lists it, in PCI order. ``number`` is the index; ``instances``: UUIDs of its MIG instances."""

    number: int
    uuid: str
    model_name: str
    instances: tuple[str, ...] = ()


def choose_devices(
    tokens: Sequence[str | int] | None, installed: Sequence[InstalledDevice], pci_order: bool
) -> list[InstalledDevice]:
    """The devices that ``tokens`` name, each once, in their order; None names all.

    A token is an index, a ``GPU-`` UUID or its beginning, a UUID as torch gives it, or a ``MIG-`` UUID, which
    stands for the GPU it is part of. An index counts in PCI order; CUDA counts so too when ``pci_order``
    (CUDA_DEVICE_ORDER=PCI_BUS_ID) or all GPUs are alike.
    Raises MeterUnavailableError with one line that names the token and what exists.
    """
    if not installed:
        raise MeterUnavailableError("no GPU is visible")
    if tokens is None:
        return list(installed)
    if not tokens:
        raise MeterUnavailableError("no GPU is named for this engine")
    chosen: dict[str, InstalledDevice] = {}
    for token in tokens:
        device = _named(str(token).strip(), installed, pci_order)
        chosen.setdefault(device.uuid, device)
    return list(chosen.values())


def _named(token: str, installed: Sequence[InstalledDevice], pci_order: bool) -> InstalledDevice:
    if token.isdecimal():
        return _indexed(token, installed, pci_order)
    old = _OLD_MIG.match(token)
    wanted = old.group(1) if old else f"GPU-{token}" if _BARE_UUID.match(token) else token
    found = [
        device
        for device in installed
        if wanted.startswith(("GPU-", "MIG-")) and any(u.startswith(wanted) for u in (device.uuid, *device.instances))
    ]
    if len(wanted) > len("GPU-") and len(found) == 1:
        return found[0]
    problem = "names several GPUs" if len(found) > 1 else "names no GPU"
    raise MeterUnavailableError(f"device {token!r} {problem}; there are: {_listing(installed)}")


def _indexed(token: str, installed: Sequence[InstalledDevice], pci_order: bool) -> InstalledDevice:
    if int(token) >= len(installed):
        raise MeterUnavailableError(f"device {token!r} names no GPU; there are: {_listing(installed)}")
    if not pci_order and len({device.model_name for device in installed}) > 1:
        raise MeterUnavailableError(
            f"device {token!r} may be any of different GPUs; name it by UUID or set CUDA_DEVICE_ORDER=PCI_BUS_ID;"
            f" there are: {_listing(installed)}"
        )
    return installed[int(token)]


def _listing(installed: Sequence[InstalledDevice]) -> str:
    return ", ".join(f"{d.number} {' '.join((d.uuid, *d.instances))} ({d.model_name})" for d in installed)
