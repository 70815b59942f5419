"""Settings of the carbon meter: one frozen object from flag, ``additional_config``, environment.

Precedence, highest first: ``--carbon-config``, ``additional_config={"carbon": ...}``,
``LLMCO2_*`` environment variables, defaults. An unknown key or an impossible value raises
:class:`ConfigError` with one line that names the key and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

ENVIRONMENT_PREFIX = "LLMCO2_"
ENABLE_VARIABLE = "LLMCO2_CARBON"
# What is typed here by mistake may be a secret, and messages go to logs.
NOT_SHOWN = {"key_file", "provider_url"}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key and what is allowed."""


class Settings(BaseModel):
    """All settings; every field can be given in each of the ways of the module docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    zone: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*$")] | None = Field(
        None,
        description="Grid zone the server stands in, as Electricity Maps names it: FR, US-CAL-CISO; "
        "with the provider watttime a region of WattTime: CAISO_NORTH",
    )
    region: Annotated[str, Field(pattern=r"^(aws|azure|gcp):[a-z0-9-]+$")] | None = Field(
        None, description="Cloud region instead of zone, aws:eu-west-3, azure:... or gcp:...; gives zone and PUE"
    )
    provider: Literal["constant", "static", "file", "electricity-maps", "watttime", "uk-carbon-intensity"] | None = (
        Field(
            None,
            description="Source of the carbon intensity: constant, static (yearly averages), file, electricity-maps, "
            "watttime, uk-carbon-intensity; without it constant, file or static, as intensity or intensity_file is set",
        )
    )
    intensity: Annotated[float, Field(ge=0, le=3000)] | None = Field(
        None,
        description="Carbon intensity of the electricity in g CO2e/kWh, 0 to 3000; without it that of the zone",
    )
    intensity_file: Path | None = Field(
        None, description="CSV (also .gz) or Parquet with a column datetime_utc and one of g CO2e/kWh"
    )
    intensity_method: Literal["average", "marginal"] | None = Field(
        None, description="What intensity or intensity_file hold, average or marginal; without it average"
    )
    intensity_factors: Literal["lifecycle", "direct"] | None = Field(
        None, description="What the figures count, lifecycle or direct (combustion alone)"
    )
    market_intensity: Annotated[float, Field(ge=0, le=3000)] | None = Field(
        None,
        description="Market-based intensity by your contracts in g CO2e/kWh, 0 to 3000; shown beside, never instead",
    )
    key_file: Path | None = Field(
        None, description="File with the provider's key, instead of ELECTRICITY_MAPS_API_KEY or WATTTIME_PASSWORD"
    )
    provider_url: Annotated[str, Field(pattern=r"^https?://")] | None = Field(
        None, description="Another address of the provider's API, such as a proxy: http:// or https://"
    )
    cache: Path | None = Field(None, description="Folder in which fetched intensities are kept over restarts")
    pue: Annotated[float, Field(ge=1, le=5)] | None = Field(
        None,
        description="Power usage effectiveness of the site, 1 to 5; without it the region's, else 1.0 (IT load alone)",
    )
    embodied: Literal["product", "components", "llmcarbon", "none"] = Field(
        "product",
        description="Model of embodied carbon: product (makers' figures), components (HotCarbon'24), llmcarbon, none",
    )
    lifetime_years: Annotated[float, Field(ge=3, le=5)] = Field(
        4.0, description="Years until the devices are written off, 3 to 5"
    )
    host_lifetime_years: Annotated[float, Field(ge=3, le=5)] = Field(
        4.0, description="Years until the host is written off, 3 to 5"
    )
    embodied_idle: Literal["line", "busy"] = Field(
        "line",
        description="Embodied carbon of idle time: line (of its own), or busy (carried by the time of requests, which "
        "needs utilisation)",
    )
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Planned busy part of the hardware's life, more than 0, up to 1; for embodied_idle busy"
    )
    device: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Device of the catalog to use in place of the detected one: h100-sxm, cpu, ..."
    )
    node_overhead: Annotated[float, Field(ge=0, le=5)] | None = Field(
        None,
        description="CPUs and memory of the node as a fraction of device energy, 0 to 5; without it as RAPL measures",
    )
    auxiliary: Annotated[float, Field(ge=0, le=5)] | None = Field(
        None,
        description="Fans, network and losses as a fraction of the energy of devices and host, 0 to 5",
    )
    predictor: Annotated[str, Field(min_length=1)] = Field(
        "gnn", description="gnn (on CPUs: roofline), roofline, or the path of a predictor bundle"
    )
    calibration: Path | None = Field(
        None, description="File of llmco2 calibrate for this deployment: predictions are corrected by it"
    )
    samples: Path | None = Field(
        None, description="Folder for metered samples; nothing is written while no meter is open"
    )
    meter: Literal["auto", "nvml", "rapl", "none"] = Field(
        "auto", description="auto (NVML for GPUs, RAPL for CPUs), nvml, rapl, or none to predict only"
    )
    headers: bool = Field(False, description="Add x-carbon-* headers to responses that are not streamed")
    live: bool = Field(False, description="Serve GET /carbon/live, a page with the figures of now, behind the API key")
    switch: bool = Field(False, description="Let PUT /carbon/hook turn the hook off and on at run time")

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # true would be taken for 1.
        if isinstance(value, bool) and info.field_name not in ("headers", "live", "switch"):
            raise ValueError("neither true nor false")
        return value

    @field_validator("samples", "cache")
    @classmethod
    def _writable_folder(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        folder = value.expanduser()
        try:
            nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        except OSError as error:
            raise ValueError(f"a folder that can be written ({error})") from None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"a folder that can be written ({nearest} is not one)")
        return folder

    @field_validator("calibration", "intensity_file", "key_file")
    @classmethod
    def _existing_file(cls, value: Path | None) -> Path | None:
        file = None if value is None else value.expanduser()
        if file is not None and not file.is_file():
            raise ValueError("a file that exists")
        return file

    @field_validator("predictor")
    @classmethod
    def _known_predictor(cls, value: str) -> str:
        try:
            found = value in ("gnn", "roofline") or Path(value).expanduser().is_file()
        except OSError:
            found = False
        if not found:
            raise ValueError("'gnn', 'roofline' or the path of a predictor bundle that exists")
        return value


def allowed(name: str) -> str:
    """What a key may hold, in words, for error messages and help."""
    return Settings.model_fields[name].description or ""


def parse_settings(values: object, source: str) -> dict[str, Any]:
    """Check ``values`` (a mapping, JSON text, True or None) from ``source`` and return its keys.

    Raises ConfigError with one line.
    """
    if values is None or values is True:
        return {}
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except json.JSONDecodeError as error:
            raise ConfigError(f'{source}: not JSON ({error}); expected an object such as {{"zone": "FR"}}') from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected an object with keys {', '.join(Settings.model_fields)}, got {values!r}")
    for key in values:
        if key not in Settings.model_fields:
            near = difflib.get_close_matches(str(key), Settings.model_fields, 1, 0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{source}: unknown key {key!r}{hint}; allowed: {', '.join(Settings.model_fields)}")
    return dict(values)


def build_settings(*layers: tuple[str, Mapping[str, Any]]) -> Settings:
    """Merge (source, values) layers, lowest precedence first, into checked Settings. Raises ConfigError."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in layers:
        for key, value in values.items():
            merged[key], origin[key] = value, source
    try:
        return Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        shown = "..." if key in NOT_SHOWN else repr(merged.get(key))
        raise ConfigError(
            f"{origin.get(key, 'settings')}: {key}={shown} is not possible; allowed: {allowed(key)}"
        ) from None


def environment_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Settings named by ``LLMCO2_<KEY>`` variables. Raises ConfigError on a name that is no key."""
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name == ENABLE_VARIABLE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key not in Settings.model_fields:
            names = ", ".join(ENVIRONMENT_PREFIX + k.upper() for k in Settings.model_fields)
            raise ConfigError(f"environment: unknown variable {name}; allowed: {ENABLE_VARIABLE}, {names}")
        found[key] = value
    return found


def enabled_by_environment(environ: Mapping[str, str]) -> bool:
    """Whether ``LLMCO2_CARBON`` asks for the meter. Raises ConfigError on anything but a yes or a no."""
    value = environ.get(ENABLE_VARIABLE, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"environment: {ENABLE_VARIABLE}={value!r} is not possible; allowed: 1 or 0")
