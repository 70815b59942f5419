"""The only file that names every part: from settings and a deployment to a running monitor."""

from __future__ import annotations

import atexit
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmco2_vllm.config import ConfigError, Settings
from llmco2_vllm.core.attribution import Attributor, WindowAccount
from llmco2_vllm.core.embodied import Hardware, Lifetimes, engine_hardware
from llmco2_vllm.core.estimate import Predictor
from llmco2_vllm.core.hardware import DeviceSpec, Topology, detect_host, device_by_name
from llmco2_vllm.core.intensity import Intensity
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.regions import region
from llmco2_vllm.metering import HostEnergy, Metering
from llmco2_vllm.meters.activity import EngineActivity
from llmco2_vllm.meters.discover import Discovery, Search, open_meter
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.predictor.bundle import Bundle
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.deployment import Calibration, Identity, calibrated
from llmco2_vllm.predictor.gnn import GnnPredictor
from llmco2_vllm.predictor.predict import RooflinePredictor
from llmco2_vllm.samples import Origin as SampleOrigin
from llmco2_vllm.samples import SampleFeed, fingerprint
from llmco2_vllm.store.writer import SampleStore
from llmco2_vllm.telemetry.accounting import Accountant, Node


@dataclass(frozen=True)
class Deployment:
    """What a host says about one engine.

    model_config: the model's Hugging Face configuration as a dict.
    device_name: ``cpu``, or the accelerator's name as its driver reports it.
    dtype: activations and unquantised weights; kv_cache_dtype: ``auto`` means as dtype.
    pooling: the model is served for embeddings, without its LM head.
    meter_devices: the engine's own devices, tokens as in CUDA_VISIBLE_DEVICES; None for all there are.
    engine: index of the engine. engine_version: of the host, for samples.
    """

    model_config: Mapping[str, Any]
    device_name: str
    dtype: str
    kv_cache_dtype: str = "auto"
    pooling: bool = False
    topology: Topology = field(default_factory=Topology)
    meter_devices: tuple[str | int, ...] | None = None
    engine: int = 0
    engine_version: str = ""


@dataclass(frozen=True)
class Meter:
    """The assembled parts of one engine. states: of the parts that tell how they are, by name.

    found: the meter in use, or why there is none; what is true of it later says ``found.now()``.
    """

    monitor: StepMonitor
    device: DeviceSpec
    found: Discovery
    states: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def check_settings(settings: Settings) -> None:
    """What can only be checked against the catalog and files: unknown device, malformed bundle.

    Raises ConfigError with one line that names the key and what is allowed.
    """
    try:
        if settings.device is not None and settings.device != "cpu":
            device_by_name(settings.device)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"device={settings.device!r} is not possible; {error.args[0]}") from None
    open_accountant(settings, settings.device)
    try:
        _bundle(settings.predictor)
    except (OSError, ValueError) as error:
        raise ConfigError(f"predictor={settings.predictor!r} is not possible; {error}") from None
    try:
        if settings.calibration is not None:
            _check_calibration(settings, Calibration.load(settings.calibration))
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration={str(settings.calibration)!r} is not possible; {error}") from None


def open_accountant(
    settings: Settings,
    device_name: str | None = None,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Accountant:
    """What turns joules into grams, for engines on ``devices`` devices each; no embodied carbon without a device.

    Raises ConfigError with one line that names the key and what is allowed.
    """
    choice = GridChoice(
        provider=_provider_of(settings), zone=settings.zone, region=settings.region,
        grams_per_kwh=settings.intensity, intensity_file=settings.intensity_file,
        method=settings.intensity_method or "average", factors=settings.intensity_factors,
        key_file=settings.key_file, provider_url=settings.provider_url, cache=settings.cache,
    )  # fmt: skip
    try:
        _check_agreement(settings, choice.provider)
        chain = open_chain(choice, environment)
        site = None if settings.region is None else region(settings.region)
        hardware = _hardware(settings, device_name, devices)
    except (KeyError, ValueError) as error:
        raise ConfigError(str(error.args[0])) from None
    pue, source = settings.pue, None
    if pue is None and site is not None and site.pue is not None:
        pue, source = site.pue, site.pue_source
    node = Node.stated(pue, settings.node_overhead, settings.auxiliary, source)
    market = None
    if settings.market_intensity is not None:
        zone = settings.zone if site is None else site.zone
        market = Intensity(settings.market_intensity, zone, "average", "market", "settings", False)
    return Accountant(chain, market, node, hardware, settings.utilisation)


def _provider_of(settings: Settings) -> str:
    if settings.provider is not None:
        return settings.provider
    if settings.intensity is not None:
        return "constant"
    return "static" if settings.intensity_file is None else "file"


def _check_agreement(settings: Settings, provider: str) -> None:
    """Settings that contradict each other. Raises ValueError that names the key and what is allowed."""
    live = ("electricity-maps", "watttime", "uk-carbon-intensity")
    takers: dict[str, tuple[str, ...]] = {
        "intensity": ("constant",),
        "intensity_file": ("file",),
        "key_file": ("electricity-maps", "watttime"),
        "provider_url": live,
    }
    for key, providers in takers.items():
        if getattr(settings, key) is not None and provider not in providers:
            raise ValueError(
                f"{key} and provider {provider} are both there; allowed: {key} with {' or '.join(providers)}"
            )
    # What a source gives by itself may be said, and nothing else.
    given = {
        "intensity_method": {"static": "average", "electricity-maps": "average", "uk-carbon-intensity": "average",
                             "watttime": "marginal"},
        "intensity_factors": {"static": "lifecycle", "uk-carbon-intensity": "direct"},
    }  # fmt: skip
    for key, by_itself in given.items():
        said = getattr(settings, key)
        if said is not None and said != by_itself.get(provider, said):
            only = by_itself[provider]
            raise ValueError(f"{key}={said!r} is not possible with provider {provider}; allowed: {only}")
    methods = settings.intensity_method, given["intensity_method"].get(provider)
    if settings.market_intensity is not None and "marginal" in methods:
        raise ValueError("market_intensity stands beside an average; allowed: with an intensity_method of average")
    if settings.embodied_idle == "busy" and settings.utilisation is None:
        raise ValueError("utilisation is missing for embodied_idle='busy'; allowed: more than 0, up to 1")


def _hardware(settings: Settings, device_name: str | None, devices: int) -> Hardware | None:
    if settings.embodied == "none" or device_name is None:
        return None
    lifetimes = Lifetimes(settings.lifetime_years, settings.host_lifetime_years)
    return engine_hardware(device_name, devices, settings.embodied, lifetimes, settings.embodied_idle)


def assemble(settings: Settings, deployment: Deployment) -> Meter:
    """Build the parts for one engine. Raises ValueError when the model or device cannot be described."""
    name = settings.device or deployment.device_name
    device = detect_host().device() if name == "cpu" else device_by_name(name)
    model = ModelSpec.from_config({**deployment.model_config, "dtype": deployment.dtype}, deployment.kv_cache_dtype)
    if deployment.pooling:
        model = replace(model, has_lm_head=False)
    predictor = predictor_of(settings.predictor, model, device, deployment.topology)
    if settings.calibration is not None:
        identity = Identity.of(model, device.name, deployment.topology)
        predictor = calibrated(Calibration.load(settings.calibration), predictor, identity)
    own = 1 if deployment.meter_devices is None else deployment.topology.engine_devices
    found = open_meter(
        settings.meter,
        deployment.meter_devices,
        Search(accelerator=deployment.device_name != "cpu", least_devices=own),
        activity := EngineActivity(),
    )
    if found.sampler is None:
        return Meter(StepMonitor(predictor), device, found)
    if found.name == "rapl" and deployment.topology.data_parallel > 1:
        found.sampler.stop(0.0)
        reason = "RAPL counts the whole host, and several engines run on it"
        return Meter(StepMonitor(predictor), device, Discovery(None, "none", reason))
    listener = MeterListener(activity, _feed(settings, deployment, found, (model, device, predictor)))
    # A driver that is still silent has told of no device yet: then those that the engine runs on.
    count = len(found.sampler.state()["devices"]) or deployment.topology.engine_devices
    attributor = Attributor([device.idle_power_watts] * count)
    metering = Metering(attributor, found.sampler.windows, listener)
    states: dict[str, Callable[[], Any]] = {"meter": found.sampler.state}
    if listener.feed is not None:
        states["samples"] = listener.feed.state
    if found.name != "rapl" and settings.node_overhead is None:
        states["host"] = _host_energy(open_meter("rapl"))
    return Meter(StepMonitor(predictor, metering=metering), device, found, states)


def _host_energy(found: Discovery) -> Callable[[], dict[str, Any]]:
    """What a snapshot says of the host: its energy, or why that is not known."""
    if found.sampler is None:
        return lambda: {"source": found.name, "reason": found.reason}
    return HostEnergy(found.sampler.windows, found.name, lambda: found.now()[1]).state


@dataclass(frozen=True)
class MeterListener:
    """Tells the sampler when there is work, and the store of every window."""

    activity: EngineActivity
    feed: SampleFeed | None

    def account(self, account: WindowAccount) -> None:
        """A window was split."""
        if self.feed is not None:
            self.feed.take(account)

    def working(self, busy: bool, asleep: bool, now_seconds: float) -> None:
        """There are requests from now on, or none, or the engine sleeps."""
        if asleep and not busy:
            self.activity.sleep(now_seconds)
        elif busy:
            self.activity.busy(now_seconds)
        else:
            self.activity.idle(now_seconds)


def _feed(
    settings: Settings, deployment: Deployment, found: Discovery, parts: tuple[ModelSpec, DeviceSpec, Predictor]
) -> SampleFeed | None:
    """Where samples go; None unless the setting ``samples`` names a folder."""
    if settings.samples is None or found.sampler is None:
        return None
    model, device, predictor = parts
    origin = SampleOrigin(
        device.name, found.name, predictor.name, deployment.topology, fingerprint(model),
        deployment.engine, deployment.engine_version,
    )  # fmt: skip
    feed = SampleFeed(SampleStore(settings.samples), origin, found.sampler.state)
    atexit.register(feed.close)
    return feed


def predictor_of(name: str, model: ModelSpec, device: DeviceSpec, topology: Topology) -> Predictor:
    """The predictor called ``name`` in the settings. The network knows no CPUs: there it is the Roofline anyhow.

    Raises OSError and ValueError when a bundle cannot be read.
    """
    bundle = _bundle(name)
    if isinstance(bundle, Bundle) and device.kind == "gpu":
        return GnnPredictor(model, device, topology, bundle)
    calibration = bundle if isinstance(bundle, RooflineCalibration) else RooflineCalibration.load()
    return RooflinePredictor(model, device, topology, calibration)


def _check_calibration(settings: Settings, calibration: Calibration) -> None:
    """What shows before an engine is there. Raises ValueError when it is of another device or predictor."""
    device, wanted = calibration.deployment.device, settings.device
    if wanted is not None and device != (wanted if wanted == "cpu" else device_by_name(wanted).name):
        raise ValueError(f"calibration: deployment: device={device!r} was measured, the setting device is {wanted!r}")
    bundle = _bundle(settings.predictor)
    if isinstance(bundle, Bundle) and device == "cpu":
        bundle = RooflineCalibration.load()
    if not calibration.predictor.startswith(f"{bundle.version}-"):
        found = calibration.predictor
        raise ValueError(f"calibration: predictor={found!r} was measured, predictions are by {bundle.version!r} now")


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
