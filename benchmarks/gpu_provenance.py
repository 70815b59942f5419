"""Whose figures a recording holds: which library answered as NVML, for which device, and whether files are as written.

For benchmarks/gpu_record.py and benchmarks/gpu_figures.py. A simulated device may call itself what it likes (the one
of the tests says "NVIDIA H200"), so that nothing here goes by its name alone: what counts is the file that the calls
lead into, and whether this machine has a driver at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmco2_vllm.core.hardware import device_names
from llmco2_vllm.meters.base import MeterError
from llmco2_vllm.meters.nvml import NvmlLibrary, NvmlMeter, open_nvml

FILE = "provenance.json"
SIMULATED_TITLE = "Simulated (shim), not a GPU"
# Set by --shim in the child that reads the shim: its control file.
SIMULATED = "BENCH_CONTROL"
# Names of settings that the known stand-ins read, and that are therefore somewhere in their bytes.
MARKS = {b"SHIM_POWER_TICK": "the shim of our tests", b"FAKE_NVML_TRACE": "a replayed trace"}
# One of them leads to the driver on any machine with a GPU.
DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
# Of the shim's devices; the driver's UUIDs are digests.
SHIM_UUID = re.compile(r"-0000-[04]000-[08]000-0")
# Beside those of the catalog.
OTHER_DEVICES = ("a30", "a40", "a800", "b300", "gb300", "gh200", "h20", "h800", "l40")


class RefusedError(ValueError):
    """What would be said of a device that it was not measured on; the message is one line."""


@dataclass(frozen=True)
class Identity:
    """The device that answers and the library that it answers through.

    power_basis: what its power readings are. power_limit_watts: None when NVML does not say.
    signs: what shows that this is no GPU; empty where nothing does.
    """

    name: str
    uuid: str
    driver_version: str
    power_basis: str
    power_limit_watts: float | None
    library: str
    library_sha256: str
    signs: tuple[str, ...]

    @property
    def simulated(self) -> bool:
        """Whether this is not a GPU."""
        return bool(self.signs)


def read_identity(index: int) -> Identity:
    """The device at ``index`` in PCI order, as NVML says in this process. Raises MeterError."""
    (meter,) = open_nvml([index])
    library = NvmlLibrary()
    try:
        path = loaded_library(library)
        digest = "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        return Identity(
            name=meter.identity.model_name,
            uuid=meter.identity.uuid,
            driver_version=str(library.call("nvmlSystemGetDriverVersion")),
            power_basis=meter.identity.power_basis,
            power_limit_watts=_power_limit(library, meter),
            library=str(path or ""),
            library_sha256=digest,
            signs=tuple(signs_of_simulation(path)),
        )
    finally:
        library.close()
        meter.close()


def _power_limit(library: NvmlLibrary, meter: NvmlMeter) -> float | None:
    try:
        handle = library.call("nvmlDeviceGetHandleByUUID", meter.identity.uuid)
        return float(library.call("nvmlDeviceGetEnforcedPowerLimit", handle)) / 1e3
    except MeterError:
        return None


def loaded_library(library: NvmlLibrary) -> Path | None:
    """The file that calls of NVML lead into in this process; None where that cannot be told. Raises MeterError."""
    function = library.call("_nvmlGetFunctionPointer", "nvmlDeviceGetFieldValues")
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end and path and Path(path[0]).is_file():
            return Path(path[0])
    return None


def signs_of_simulation(library: Path | None) -> list[str]:
    """What shows that no GPU answers: how the library was opened, what it is, and what this machine has."""
    found = ["--shim was given"] if SIMULATED in os.environ else []
    if library is None:
        found.append("the library that answers is no file")
    else:
        content = library.read_bytes()
        found += [f"the library that answers is {what}" for mark, what in MARKS.items() if mark in content]
    if not any(Path(file).exists() for file in DRIVER_FILES):
        found.append(f"this machine has no NVIDIA driver (none of {', '.join(DRIVER_FILES)})")
    return found


def named_devices(folder: Path) -> list[str]:
    """GPUs that a path names, in small letters: ``results/h200`` names one."""
    known = {name.split("-")[0] for name in device_names()} | set(OTHER_DEVICES)
    words = {word for part in folder.expanduser().resolve().parts for word in _words(part)}
    # Two letters and digits may come by chance inside of a longer word.
    return sorted(k for k in known for word in words if word == k or (len(k) > 3 and word.startswith(k)))


def check_folder(folder: Path, simulated: bool, name: str) -> None:
    """Raises RefusedError when the path names a GPU that figures of this device would pass for."""
    read = f"{SIMULATED_TITLE[0].lower()}{SIMULATED_TITLE[1:]}" if simulated else name
    for device in named_devices(folder):
        if simulated or device not in _words(name):
            raise RefusedError(f"{folder} names the {device.upper()}, what answers is {read}; choose another folder")


def _words(text: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", text.lower())


def title_of(provenance: Mapping[str, Any]) -> str:
    """What the title of every figure says of the device."""
    return SIMULATED_TITLE if provenance["simulated"] else str(provenance["device"]["name"])


def described(identity: Identity) -> dict[str, Any]:
    """An identity as the provenance holds it; what is unknown is left out."""
    device = {key: value for key, value in asdict(identity).items() if value is not None and key != "signs"}
    return {"simulated": identity.simulated, "signs": list(identity.signs), "device": device}


def write_provenance(folder: Path, provenance: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write it with the digests of the files that are there, and one over all that it says."""
    digests = {name: _digest((folder / name).read_bytes()) for name in sorted(files) if (folder / name).is_file()}
    document = {**provenance, "files": digests}
    document["digest"] = digest_of(document)
    new = folder / f"{FILE}.new"
    new.write_text(json.dumps(document, indent=1) + "\n")
    new.replace(folder / FILE)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a recording. Raises RefusedError where it, or a file of it, cannot be what was written."""
    try:
        document = json.loads((folder / FILE).read_text())
        said = document.pop("digest")
        device, simulated, signs = document["device"], document["simulated"], document["signs"]
        files, engine = document["files"], document.get("engine", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{folder / FILE}: no recording ({type(error).__name__}: {error})") from None
    if said != digest_of(document):
        raise RefusedError(f"{folder / FILE}: was changed after it was written")
    for name, digest in files.items():
        if not (folder / name).is_file() or _digest((folder / name).read_bytes()) != digest:
            raise RefusedError(f"{folder / name}: is not the file that was recorded")
    if simulated != bool(signs):
        raise RefusedError(f"{folder / FILE}: simulated={simulated} contradicts signs={signs}")
    if not simulated and (why := _no_gpu(device, engine)):
        raise RefusedError(f"{folder / FILE}: simulated=False, but {why}")
    return {**document, "digest": said}


def _no_gpu(device: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    """What a GPU's provenance cannot say; empty where it says no such thing."""
    if SHIM_UUID.search(str(device.get("uuid", ""))):
        return f"the UUID {device['uuid']} is one of the shim's"
    if not device.get("library_sha256"):
        return "it names no library that answered"
    return "the engine ran on a CPU" if engine.get("platform") == "cpu" else ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of(document: Mapping[str, Any]) -> str:
    """Of all that a provenance says. It shows what was changed by hand, not what was forged with care."""
    return _digest(json.dumps({k: v for k, v in document.items() if k != "digest"}, sort_keys=True).encode())
