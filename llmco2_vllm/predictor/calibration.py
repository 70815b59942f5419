"""RooflineCalibration: the few fitted numbers between a Roofline bound and joules, with their provenance.

Fitted by ``benchmarks/fit_roofline.py``; stored as JSON in ``data/bundles/roofline.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1


class Interval(NamedTuple):
    """90 % interval of the energy, as factors on the prediction: lower <= 1 <= upper."""

    lower_ratio: float
    upper_ratio: float


@dataclass(frozen=True)
class Coefficients:
    """How far one kind of device stays from its Roofline. Efficiencies are ratios to the data sheet in (0, 1].

    compute, bandwidth, link: of linear kernels. attention, expert: factors on both for those kernels.
    step, layer, sequence_overhead_seconds: host and launch time per step, per layer, per request in the step.
    collective_overhead_seconds: latency of one collective.
    static, compute, memory_power_ratio: shares of (limit - idle) drawn on top of idle while a step runs; at full
    use of the compute peak; at full use of the memory bandwidth.
    """

    compute_efficiency: float
    bandwidth_efficiency: float
    attention_efficiency: float
    expert_efficiency: float
    link_efficiency: float
    step_overhead_seconds: float
    layer_overhead_seconds: float
    sequence_overhead_seconds: float
    collective_overhead_seconds: float
    static_power_ratio: float
    compute_power_ratio: float
    memory_power_ratio: float


@dataclass(frozen=True)
class KindCalibration:
    """Coefficients of one kind of device, the devices they were fitted on, and intervals by regime.

    calibrated_devices: catalog names; empty when nothing was measured. decode: at least half of the tokens
    decode. prefill: fewer. unknown: out of distribution.
    """

    coefficients: Coefficients
    calibrated_devices: tuple[str, ...]
    decode: Interval
    prefill: Interval
    unknown: Interval


@dataclass(frozen=True)
class RooflineCalibration:
    """Calibration by kind of device (``gpu``, ``cpu``). provenance: data, command and scores of the fit."""

    version: str
    kinds: Mapping[str, KindCalibration]
    provenance: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | None = None) -> RooflineCalibration:
        """Read a calibration file; without a path, the one shipped with the package.

        Raises OSError when it cannot be read and ValueError that names the first wrong key.
        """
        if path is None:
            text = files("llmco2_vllm").joinpath("data", "bundles", "roofline.json").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"calibration: not JSON ({error})") from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Any) -> RooflineCalibration:
        """Check the parsed JSON. Raises ValueError that names the first wrong key."""
        if _get(content, "schema", "calibration") != SCHEMA:
            raise ValueError(f"calibration: schema={content['schema']!r} is not possible; expected {SCHEMA}")
        version = _get(content, "version", "calibration")
        if not isinstance(version, str) or not version or "," in version:
            raise ValueError(f"calibration: version={version!r} is not possible; expected text without a comma")
        kinds = _get(content, "kinds", "calibration")
        parsed = {kind: _kind(_get(kinds, kind, "kinds"), f"kinds.{kind}") for kind in ("gpu", "cpu")}
        return cls(version, parsed, _get(content, "provenance", "calibration"))

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads."""
        kinds = {kind: asdict(value) for kind, value in self.kinds.items()}
        return {"schema": SCHEMA, "version": self.version, "kinds": kinds, "provenance": dict(self.provenance)}


def _get(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(mapping).__name__}")
    if key not in mapping:
        raise ValueError(f"{where}: key {key!r} is missing")
    return mapping[key]


def _kind(content: Any, where: str) -> KindCalibration:
    raw = _get(content, "coefficients", where)
    values = {item.name: _coefficient(raw, item.name, f"{where}.coefficients") for item in fields(Coefficients)}
    use = values["compute_power_ratio"] + values["memory_power_ratio"]
    if values["static_power_ratio"] > 1 or (values["static_power_ratio"] == 1 and use > 0):
        raise ValueError(f"{where}.coefficients: static_power_ratio leaves no power for the work; expected less than 1")
    devices = _get(content, "calibrated_devices", where)
    if not isinstance(devices, list | tuple) or not all(isinstance(name, str) for name in devices):
        raise ValueError(f"{where}: calibrated_devices={devices!r} is not possible; expected a list of names")
    intervals = {name: _interval(content, name, where) for name in ("decode", "prefill", "unknown")}
    return KindCalibration(Coefficients(**values), tuple(devices), **intervals)


def _coefficient(raw: Any, name: str, where: str) -> float:
    value = _number(_get(raw, name, where), f"{where}.{name}")
    efficiency = name.endswith("_efficiency")
    if value < 0 or (efficiency and not 0 < value <= 1):
        allowed = "more than 0 and at most 1" if efficiency else "0 or more"
        raise ValueError(f"{where}: {name}={value!r} is not possible; allowed: {allowed}")
    return value


def _interval(content: Any, name: str, where: str) -> Interval:
    pair = _get(content, name, where)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"{where}: {name}={pair!r} is not possible; expected [lower, upper]")
    lower, upper = (_number(value, f"{where}.{name}") for value in pair)
    if not 0 < lower <= 1 <= upper:
        raise ValueError(f"{where}: {name}={pair!r} is not possible; expected 0 < lower <= 1 <= upper")
    return Interval(lower, upper)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {value!r} is not a finite number")
    return float(value)
