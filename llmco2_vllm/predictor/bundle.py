"""Bundle: everything a trained predictor needs to serve, in one file, and where it came from.

A zip archive with the arrays as ``.npy`` entries (numpy's npz, loaded without pickle) and ``bundle.json``. Written to a
temporary file and renamed, so a reader sees a whole bundle or none.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.features import DYNAMIC_FEATURES, FEATURES_VERSION, STATIC_FEATURES, NodeKind, NodePrecision
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.predictor.forward import DEFAULT_DEVICE
from llmco2_vllm.predictor.offsets import Offsets, Rows

FloatArray = NDArray[np.float64]
SCHEMA = 1
REGIMES = ("decode", "mixed", "unknown")
_JSON = "bundle.json"
_OFFSET = "offset_"
_TABLE = (len(NodeKind), len(NodePrecision))


@dataclass(frozen=True)
class Bundle:
    """Arrays of the network by name, the devices of its device table, intervals by regime, and provenance.

    version: published with every figure. intervals: ``decode`` and ``mixed`` steps of deployments like those seen,
    ``unknown`` for any other. seen: kinds of models trained on. offsets: residuals of the deployments trained on.
    provenance: data, command, scores, and under ``campaigns`` host seconds that belong to a source alone.
    """

    version: str
    devices: tuple[str, ...]
    arrays: Mapping[str, FloatArray]
    intervals: Mapping[str, Interval]
    seen: tuple[str, ...] = ()
    offsets: Offsets | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.version or "," in self.version:
            raise ValueError(f"bundle: version={self.version!r} is not possible; expected text without a comma")
        if not self.devices or self.devices[0] != DEFAULT_DEVICE:
            raise ValueError(f"bundle: devices={self.devices!r} is not possible; the first must be {DEFAULT_DEVICE!r}")
        for name, shape in _shapes(self.arrays, len(self.devices)).items():
            _check_array(self.arrays, name, shape)
        for regime in REGIMES:
            if regime not in self.intervals:
                raise ValueError(f"bundle: intervals: key {regime!r} is missing")
            low, high = self.intervals[regime]
            if not 0 < low <= 1 <= high < float("inf"):
                raise ValueError(
                    f"bundle: intervals.{regime}={[low, high]} is not possible; allowed: 0 < lower <= 1 <= upper"
                )

    def save(self, path: Path) -> None:
        """Write the bundle. Raises OSError; a bundle that was there before is then unchanged."""
        meta = {
            "schema": SCHEMA,
            "features_version": FEATURES_VERSION,
            "version": self.version,
            "devices": list(self.devices),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "seen": list(self.seen),
            "offsets": None if self.offsets is None else _offset_keys(self.offsets),
            "provenance": dict(self.provenance),
        }
        with NamedTemporaryFile(dir=path.parent, suffix=".new", delete=False) as file:
            temporary = Path(file.name)
            try:
                _write(file, meta, {**self.arrays, **_offset_arrays(self.offsets)})
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        temporary.chmod(0o644)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path | None = None) -> Bundle:
        """Read a bundle; without a path, the one shipped. Raises OSError, and ValueError that says what is wrong."""
        data = shipped().read_bytes() if path is None else path.read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                meta = json.loads(archive.read(_JSON))
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                arrays = {name[:-4]: np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names}
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"bundle: not readable ({error})") from None
        return _checked(cls, meta, arrays)


def shipped() -> Any:
    """The pretrained bundle inside the package."""
    return files("llmco2_vllm").joinpath("data", "bundles", "gnn.npz")


def _write(file: Any, meta: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> None:
    # Fixed dates: the same training gives the same bytes.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(_JSON), json.dumps(meta, indent=2) + "\n")
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.save(buffer, arrays[name], allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())


def _checked(cls: type[Bundle], meta: Any, arrays: Mapping[str, FloatArray]) -> Bundle:
    for key, wanted in (("schema", SCHEMA), ("features_version", FEATURES_VERSION)):
        if not isinstance(meta, Mapping) or meta.get(key) != wanted:
            found = meta.get(key) if isinstance(meta, Mapping) else None
            raise ValueError(f"bundle: {key}={found!r} is not possible; this version reads {wanted!r}")
    try:
        intervals = {name: Interval(float(low), float(high)) for name, (low, high) in meta["intervals"].items()}
        version, devices, seen = str(meta["version"]), tuple(meta["devices"]), tuple(meta["seen"])
        offsets = _read_offsets(meta["offsets"], arrays)
        network = {name: value for name, value in arrays.items() if not name.startswith(_OFFSET)}
        return cls(version, devices, network, intervals, seen, offsets, meta["provenance"])
    except KeyError as error:
        raise ValueError(f"bundle: key {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"bundle: {error}") from None


def _offset_keys(offsets: Offsets) -> dict[str, list[str]]:
    rows = offsets.rows
    return {name: getattr(rows, name).tolist() for name in ("architecture", "deployment", "workload")}


def _offset_arrays(offsets: Offsets | None) -> dict[str, FloatArray]:
    if offsets is None:
        return {}
    return {f"{_OFFSET}log_batch": offsets.rows.log_batch, f"{_OFFSET}weights": offsets.weights}


def _read_offsets(keys: Mapping[str, list[str]] | None, arrays: Mapping[str, FloatArray]) -> Offsets | None:
    if keys is None:
        return None
    log_batch, weights = arrays[f"{_OFFSET}log_batch"], arrays[f"{_OFFSET}weights"]
    rows = Rows(keys["architecture"], keys["deployment"], keys["workload"], log_batch)
    lengths = {len(rows.architecture), len(rows.deployment), len(rows.workload), len(rows)}
    if len(lengths) > 1 or weights.shape != (len(rows), 2) or not np.isfinite(weights).all():
        raise ValueError("bundle: offsets: keys, batches and weights do not belong together")
    return Offsets(rows, weights)


def _shapes(arrays: Mapping[str, FloatArray], devices: int) -> dict[str, tuple[int, ...]]:
    inputs = len(STATIC_FEATURES) + len(DYNAMIC_FEATURES)
    hidden = arrays["input"].shape[-1] if "input" in arrays else 0
    return {
        "input": (inputs, hidden),
        "input_bias": (hidden,),
        "first": (3 * hidden, hidden),
        "first_bias": (hidden,),
        "second": (3 * hidden, hidden),
        "second_bias": (hidden,),
        "decode_readout": (hidden, 3),
        "prefill_readout": (hidden, 3),
        "log_compute": _TABLE,
        "log_memory": _TABLE,
        "log_latency": _TABLE,
        "draw": _TABLE,
        "log_expert_latency": (len(NodePrecision),),
        "log_link": (),
        "log_imbalance": (),
        "growth": (),
        "overlap": (),
        "log_per_prefill": (),
        "log_prefill_stall": (),
        "log_host": (devices,),
        "log_per_request": (devices,),
        "power": (devices, 5),
    }


def _check_array(arrays: Mapping[str, FloatArray], name: str, shape: tuple[int, ...]) -> None:
    if name not in arrays:
        raise ValueError(f"bundle: array {name!r} is missing")
    value = arrays[name]
    if value.shape != shape or value.dtype != np.float64 or not np.isfinite(value).all():
        raise ValueError(
            f"bundle: array {name!r} has shape {value.shape}, {value.dtype}; expected {shape}, finite float64"
        )
