"""The only file that names every part: from settings and a deployment to a running monitor."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmco2_vllm.config import ConfigError, Settings
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import DeviceSpec, Topology, detect_host, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.gnn import GnnPredictor
from llmco2_vllm.predictor.predict import RooflinePredictor

NO_METER = "this version predicts only; no meter is built in yet"
METER_OFF = "switched off by the setting meter=none"


@dataclass(frozen=True)
class Deployment:
    """What a host says about one engine.

    model_config: the model's Hugging Face configuration as a dict.
    device_name: ``cpu``, or the accelerator's name as its driver reports it.
    dtype: activations and unquantised weights; kv_cache_dtype: ``auto`` means as dtype.
    pooling: the model is served for embeddings, without its LM head.
    """

    model_config: Mapping[str, Any]
    device_name: str
    dtype: str
    kv_cache_dtype: str = "auto"
    pooling: bool = False
    topology: Topology = field(default_factory=Topology)


@dataclass(frozen=True)
class Meter:
    """The assembled parts of one engine."""

    monitor: StepMonitor
    device: DeviceSpec
    meter: str
    meter_reason: str


def check_settings(settings: Settings) -> None:
    """What can only be checked against the catalog and files: unknown device, malformed bundle.

    Raises ConfigError with one line that names the key and what is allowed.
    """
    try:
        if settings.device is not None and settings.device != "cpu":
            device_by_name(settings.device)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"device={settings.device!r} is not possible; {error.args[0]}") from None
    try:
        _bundle(settings.predictor)
    except (OSError, ValueError) as error:
        raise ConfigError(f"predictor={settings.predictor!r} is not possible; {error}") from None


def assemble(settings: Settings, deployment: Deployment) -> Meter:
    """Build the parts for one engine. Raises ValueError when the model or device cannot be described."""
    name = settings.device or deployment.device_name
    device = detect_host().device() if name == "cpu" else device_by_name(name)
    model = ModelSpec.from_config({**deployment.model_config, "dtype": deployment.dtype}, deployment.kv_cache_dtype)
    if deployment.pooling:
        model = replace(model, has_lm_head=False)
    predictor = predictor_of(settings.predictor, model, device, deployment.topology)
    reason = METER_OFF if settings.meter == "none" else NO_METER
    return Meter(StepMonitor(predictor), device, "none", reason)


def predictor_of(name: str, model: ModelSpec, device: DeviceSpec, topology: Topology) -> Predictor:
    """The predictor called ``name`` in the settings. The network knows no CPUs: there it is the Roofline anyhow.

    Raises OSError and ValueError when a bundle cannot be read.
    """
    bundle = _bundle(name)
    if isinstance(bundle, Bundle) and device.kind == "gpu":
        return GnnPredictor(model, device, topology, bundle)
    calibration = bundle if isinstance(bundle, RooflineCalibration) else RooflineCalibration.load()
    return RooflinePredictor(model, device, topology, calibration)


def _bundle(name: str) -> Bundle | RooflineCalibration:
    """What a predictor is made of: the shipped network or Roofline, or a file of either kind."""
    if name == "gnn":
        return Bundle.load()
    if name == "roofline":
        return RooflineCalibration.load()
    path = Path(name).expanduser()
    return Bundle.load(path) if zipfile.is_zipfile(path) else RooflineCalibration.load(path)


def model_config(path: Path) -> dict[str, Any]:
    """A Hugging Face configuration from ``config.json`` or the folder it lies in. Raises OSError, ValueError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected an object, got {type(config).__name__}")
    return config
