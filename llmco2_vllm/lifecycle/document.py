"""The file of ``llmco2 lifecycle``: a model, its hardware and site, and the phases to count, as YAML.

A key that is unknown, missing or impossible raises :class:`LifecycleError` with one line. Units are in the keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llmco2_vllm.core import llmcarbon
from llmco2_vllm.core.embodied import LIFETIME_YEARS, EmbodiedModel, IdlePolicy
from llmco2_vllm.core.hardware import device_names

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Years = Annotated[float, Field(ge=LIFETIME_YEARS[0], le=LIFETIME_YEARS[1])]


class LifecycleError(ValueError):
    """A lifecycle file that cannot be used; the message is one line that names the key and what is allowed."""


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(_Keys):
    """Sizes from which the number of parameters follows."""

    layers: Count
    hidden: Count
    vocabulary: Count
    sequence: Count
    experts: Count = 1
    moe_layer_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class Model(_Keys):
    """``parameters`` (of a mixture: those of the base model, which FLOPs follow), or ``architecture``."""

    parameters: Positive | None = None
    total_parameters: Positive | None = None
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.parameters is None) == (self.architecture is None):
            raise ValueError("parameters or architecture, one of the two")
        return self

    def _shape(self) -> llmcarbon.Architecture | None:
        return None if self.architecture is None else llmcarbon.Architecture(**self.architecture.model_dump())

    def base(self) -> float:
        """Parameters that compute on a token."""
        shape = self._shape()
        return llmcarbon.base_parameters(shape) if shape else self.parameters or 0.0

    def total(self) -> float:
        """Parameters with every expert."""
        shape = self._shape()
        return self.total_parameters or (llmcarbon.total_parameters(shape) if shape else self.base())


class Part(_Keys):
    """``count`` equal parts of the embodied model; an amount where the catalog's figure is per amount."""

    part: str
    count: Positive = 1
    gigabytes: Positive | None = None
    square_centimetres: Positive | None = None
    watts: Positive | None = None
    node: str | None = None
    lifetime_years: Years | None = None


class Embodied(_Keys):
    """The parts that are held while devices work, by one model of embodied carbon."""

    model: EmbodiedModel
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    lifetime_years: Years = 5.0
    utilisation_ratio: Ratio = 1.0
    idle: IdlePolicy = "line"


class Hardware(_Keys):
    """Equal devices; ``device`` of the catalog gives peak and memory, ``throughput: megatron`` the efficiency."""

    device: str | None = None
    devices: Count | None = None
    power_watts: Positive
    peak_teraflops: Positive | None = None
    efficiency_ratio: Ratio | None = None
    throughput: Literal["megatron"] | None = None
    embodied: Embodied | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.device is not None and self.device not in device_names():
            raise ValueError(f"device to be one of {', '.join(device_names())}, not {self.device!r}")
        if (self.efficiency_ratio is None) == (self.throughput is None):
            raise ValueError("efficiency_ratio or throughput: megatron, one of the two")
        if self.throughput and self.device not in ("a100-40", "a100-80"):
            raise ValueError("device a100-40 or a100-80 with throughput: megatron, which was fitted on them")
        if self.throughput and self.peak_teraflops is not None:
            raise ValueError("no peak_teraflops with throughput: megatron, which has its own")
        if self.peak_teraflops is None and self.device is None:
            raise ValueError("peak_teraflops, or a device of the catalog that has it")
        if self.devices is None and not self.throughput:
            raise ValueError("devices, which only throughput: megatron can do without")
        return self


class Site(_Keys):
    """Where the devices stand."""

    pue: Annotated[float, Field(ge=1, le=5)] = 1.0
    intensity_grams_per_kwh: Annotated[float, Field(ge=0, le=3000)]


class Training(_Keys):
    """``held_days``: days the parts were held, where they are not the days computed."""

    tokens: Positive
    held_days: Positive | None = None


class Experimentation(_Keys):
    """Runs before the final one: their FLOPs, or the same as a ratio of training's."""

    flops: Positive | None = None
    training_ratio: Positive | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.flops is None) == (self.training_ratio is None):
            raise ValueError("flops or training_ratio, one of the two")
        return self


class Inference(_Keys):
    """Tokens processed, prompts included; ``hardware`` and ``site`` where they are not those of training."""

    tokens: Positive
    hardware: Hardware | None = None
    site: Site | None = None


class Storage(_Keys):
    """Data kept on drives: corpora, checkpoints, logs."""

    gigabytes: Positive
    days: Positive
    medium: Literal["ssd", "hdd"] = "ssd"
    replicas: Positive = 1


class Published(_Keys):
    """Figures to compare the totals of the file's phases with."""

    operational_tonnes: Positive | None = None
    embodied_tonnes: Positive | None = None


class Lifecycle(_Keys):
    """One lifecycle file."""

    name: str
    source: str = ""
    model: Model
    hardware: Hardware
    site: Site
    training: Training | None = None
    experimentation: Experimentation | None = None
    inference: Inference | None = None
    storage: Storage | None = None
    published: Published | None = None

    @model_validator(mode="after")
    def _some_phase(self) -> Self:
        if not (self.training or self.inference or self.storage or self.experimentation):
            raise ValueError("at least one of training, experimentation, inference, storage")
        if self.experimentation and self.experimentation.training_ratio and not self.training:
            raise ValueError("training, which experimentation.training_ratio is a ratio of")
        return self

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        own = self.inference.hardware if self.inference else None
        held = [hardware.embodied.model for hardware in (self.hardware, own) if hardware and hardware.embodied]
        if len(set(held)) > 1:
            raise ValueError(f"one embodied model for all hardware, not {' and '.join(held)}: they are not comparable")
        return self


# ---------------------------------------------------------------------------------------------------------- reading


def examples() -> dict[str, Path]:
    """Shipped lifecycle files by name: the rows of LLMCarbon's tables, and one with every phase."""
    folder = Path(str(files("llmco2_vllm").joinpath("data", "lifecycle")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_lifecycle(path: Path) -> Lifecycle:
    """The lifecycle of a YAML file. Raises LifecycleError with one line, OSError."""
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LifecycleError(f"not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, Mapping):
        raise LifecycleError(f"expected keys {', '.join(Lifecycle.model_fields)}, got {document!r}")
    try:
        return Lifecycle.model_validate(document)
    except ValidationError as error:
        raise LifecycleError(_one_line(error.errors()[0])) from None


def _one_line(error: ErrorDetails) -> str:
    """The key that is wrong, as a dotted path, and what it may hold."""
    steps, key = error["loc"], ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(_section(steps[:-1]).model_fields)
        near = difflib.get_close_matches(str(steps[-1]), known, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key {key!r}{hint}; allowed: {', '.join(known)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; allowed: {', '.join(_section(steps[:-1]).model_fields)}"
    if error["type"] == "value_error":
        return f"{key or 'file'}: expected {error['ctx']['error']}"
    expected = error["msg"].removeprefix("Input should be ")
    return f"{key}={error['input']!r} is not possible; allowed: {expected}"


def _section(steps: tuple[int | str, ...]) -> type[BaseModel]:
    """The class whose keys stand at ``steps``."""
    section: type[BaseModel] = Lifecycle
    for step in steps:
        if isinstance(step, str):
            section = _class_in(section.model_fields[step].annotation) or section
    return section


def _class_in(annotation: Any) -> type[BaseModel] | None:
    """The class of keys that ``annotation`` is, or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _class_in(inner))), None)
