"""The only file that names every part: from settings and a deployment to a running monitor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmco2_vllm.config import ConfigError, Settings
from llmco2_vllm.core.hardware import DeviceSpec, Topology, detect_host, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.predictor.calibration import RooflineCalibration
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
        _calibration(settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"predictor={settings.predictor!r} is not possible; {error}") from None


def assemble(settings: Settings, deployment: Deployment) -> Meter:
    """Build the parts for one engine. Raises ValueError when the model or device cannot be described."""
    name = settings.device or deployment.device_name
    device = detect_host().device() if name == "cpu" else device_by_name(name)
    model = ModelSpec.from_config({**deployment.model_config, "dtype": deployment.dtype}, deployment.kv_cache_dtype)
    if deployment.pooling:
        model = replace(model, has_lm_head=False)
    predictor = RooflinePredictor(model, device, deployment.topology, _calibration(settings))
    reason = METER_OFF if settings.meter == "none" else NO_METER
    return Meter(StepMonitor(predictor), device, "none", reason)


def _calibration(settings: Settings) -> RooflineCalibration:
    path = None if settings.predictor == "roofline" else Path(settings.predictor).expanduser()
    return RooflineCalibration.load(path)
