"""CalibratedPredictor: another predictor, corrected by what was measured on the very deployment it serves.

``llmco2 calibrate`` measures step mixes on a running server and writes a Calibration, a JSON document: for each phase
how many times the prediction a step took, and, where a meter was open, how many times it drew, with the spread that is
left. It is bound to one deployment and one predictor; for any other it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Estimate, Predictor, Rates
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.calibration import Interval
from llmco2_vllm.predictor.offsets import architecture_key

SCHEMA: Final = "llmco2-calibration/1"
SUFFIX: Final = "+cal"
# 95 % quantile of the normal distribution: an interval of 90 % leaves out as much on either side.
_NORMAL_QUANTILE = 1.6448536269514722
# Of the variance of the base's log interval, what is left where time was measured and power was not: time and power
# are taken to share it equally, as no source tells them apart.
_POWER_VARIANCE_RATIO = 0.5

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


class Ratio(_Part):
    """Measured over predicted. value: geometric mean, drawn towards 1. log_standard_deviation: of the natural log of
    a point's own ratio around it. n: points that say so, those with most of their prediction in the phase."""

    value: float = Field(gt=0)
    log_standard_deviation: Amount
    n: int = Field(ge=1)

    @property
    def half_width(self) -> float:
        """Half of the 90 % interval of the next step's log ratio: Student's quantile, for a mean known from n points.

        The quantile by the first two terms of its expansion, Abramowitz and Stegun 26.7.5, with n degrees of freedom:
        the prior stands for the one that the mean takes.
        """
        z, n = _NORMAL_QUANTILE, self.n
        quantile = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)
        return quantile * self.log_standard_deviation * math.sqrt(1 + 1 / n)


class PhaseCalibration(_Part):
    """Ratios of one phase; without ``energy_ratio`` no meter was open and power is as predicted."""

    time_ratio: Ratio
    energy_ratio: Ratio | None = None


class Identity(_Part):
    """The deployment that was measured. ``model_name`` and ``vllm_version`` are for people; the rest must agree.

    architecture: sizes of the model, as architecture_key() names them. dtype: of activations; weight_bytes: bytes per
    weight of the linear layers. expert_ranks: devices the experts of a stage are spread over.
    """

    model_name: str = ""
    vllm_version: str = ""
    architecture: str
    dtype: str
    weight_bytes: float
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    expert_ranks: int

    @classmethod
    def of(cls, model: ModelSpec, device_name: str, topology: Topology) -> Self:
        """The identity of an engine."""
        return cls(
            architecture=architecture_key(model),
            dtype=model.activation_dtype,
            weight_bytes=model.weight_bytes,
            device=device_name,
            tensor_parallel=topology.tensor_parallel,
            pipeline_parallel=topology.pipeline_parallel,
            expert_ranks=topology.expert_ranks,
        )

    def difference(self, other: Identity) -> str | None:
        """The first key in which another deployment differs, in words; None when it is the same."""
        for key in Identity.model_fields:
            mine, its = getattr(self, key), getattr(other, key)
            if key not in ("model_name", "vllm_version") and mine != its:
                return f"{key}={mine!r} was measured, this engine has {its!r}"
        return None


class Point(_Part):
    """One measured mix of steps. The first four are those of the step it was to be, see training.traffic.Candidate.

    steps, seconds: of the steps that stand for it, their prediction by phase. joules: of the whole run, the prefill of
    what decodes included; None without a meter.
    """

    prefill_sequences: Count
    prefill_tokens: Count
    decode_sequences: Count
    context_tokens: Count
    steps: Count
    predicted_prefill_seconds: Amount
    predicted_decode_seconds: Amount
    observed_seconds: float = Field(gt=0)
    predicted_prefill_joules: Amount
    predicted_decode_joules: Amount
    observed_joules: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _predicted(self) -> Self:
        if self.predicted_prefill_seconds + self.predicted_decode_seconds <= 0:
            raise ValueError("predicted_prefill_seconds and predicted_decode_seconds are both 0")
        return self


class Calibration(_Part):
    """What ``llmco2 calibrate`` found. A phase nothing was measured of is left out, and stays as predicted.

    predictor: whose predictions the ratios correct. created: ISO 8601. energy: ``measured``, or why it is not.
    """

    schema_: Literal["llmco2-calibration/1"] = Field(SCHEMA, alias="schema")
    created: str
    predictor: str
    deployment: Identity
    energy: str
    prefill: PhaseCalibration | None = None
    decode: PhaseCalibration | None = None
    points: tuple[Point, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file. Raises OSError, and ValueError in one line that names the first wrong key."""
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"calibration: not JSON ({error})") from None
        found = content.get("schema") if isinstance(content, Mapping) else None
        if found != SCHEMA:
            raise ValueError(f"calibration: schema={found!r} is not possible; expected {SCHEMA!r}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"calibration: {key}: {first['msg']}") from None

    def save(self, path: Path) -> None:
        """Write the file; unknown parts are left out. Raises OSError."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The document, for JSON."""
        return self.model_dump(mode="json", exclude_none=True)


class CalibratedPredictor:
    """``base`` with duration, rates and interval of each phase as measured. Raises ValueError for another base.

    Where only time was measured, power is taken to be as predicted: energy then scales with time, and the interval
    keeps the base's doubt about the power. In a mixed step the seconds are shared over the phases as the joules are.
    """

    def __init__(self, base: Predictor, calibration: Calibration) -> None:
        if base.name != calibration.predictor:
            raise ValueError(
                f"calibration: predictor={calibration.predictor!r} was measured, this engine has {base.name!r}"
            )
        self._base = base
        self._prefill = _Correction(calibration.prefill)
        self._decode = _Correction(calibration.decode)
        self._identity = calibration.prefill is None and calibration.decode is None

    @property
    def name(self) -> str:
        """The base's name with ``+cal``, for example ``roofline/1-cpu+cal``."""
        return self._base.name + SUFFIX

    def estimate(self, batch: BatchShape) -> Estimate:
        """Energy and duration of ``batch``; see the Predictor protocol."""
        base = self._base.estimate(batch)
        if self._identity or batch.tokens <= 0:
            return base
        prefill, decode = self._prefill, self._decode
        share = base.prefill_joules / base.energy_joules if base.energy_joules else batch.prefill.tokens / batch.tokens
        duration = base.duration_seconds * (decode.time + share * (prefill.time - decode.time))
        prefill_rates, decode_rates = prefill.rates(base.prefill), decode.rates(base.decode)
        prefill_joules, decode_joules = _joules(batch.prefill, prefill_rates), _joules(batch.decode, decode_rates)
        given = Interval(base.lower_ratio, base.upper_ratio)
        low, high = decode.interval(given)
        if batch.prefill.tokens:
            joules = prefill_joules + decode_joules
            part = prefill_joules / joules if joules else share
            first_low, first_high = prefill.interval(given)
            low, high = low + part * (first_low - low), high + part * (first_high - high)
        known = base.in_distribution or not (
            batch.encoder_tokens
            or (batch.prefill.tokens and not prefill.metered)
            or (batch.decode.tokens and not decode.metered)
        )
        return Estimate(prefill_joules, decode_joules, prefill_rates, decode_rates, duration, low, high, known)


class _Correction:
    """What is done to one phase; nothing where it was not measured."""

    def __init__(self, phase: PhaseCalibration | None) -> None:
        self.time = 1.0 if phase is None else phase.time_ratio.value
        ratio = None if phase is None else phase.energy_ratio or phase.time_ratio
        self.energy = 1.0 if ratio is None else ratio.value
        self.metered = phase is not None and phase.energy_ratio is not None
        self._half_width = None if ratio is None else ratio.half_width

    def rates(self, rates: Rates) -> Rates:
        ratio = self.energy
        return Rates(rates[0] * ratio, rates[1] * ratio, rates[2] * ratio)

    def interval(self, given: Interval) -> Interval:
        """Of the energy, from the spread that was measured; ``given`` is the base's."""
        half = self._half_width
        if half is None:
            return given
        if self.metered:
            return Interval(math.exp(-half), math.exp(half))
        squared = half * half
        below = math.sqrt(squared + _POWER_VARIANCE_RATIO * math.log(given.lower_ratio) ** 2)
        above = math.sqrt(squared + _POWER_VARIANCE_RATIO * math.log(given.upper_ratio) ** 2)
        return Interval(math.exp(-below), math.exp(above))


def _joules(shape: PhaseShape, rates: Rates) -> float:
    return shape.tokens * rates[0] + shape.pairs * rates[1] + shape.samples * rates[2]


def calibrated(calibration: Calibration, base: Predictor, deployment: Identity) -> CalibratedPredictor:
    """``base`` corrected by a calibration. Raises ValueError, one line, when that is of another deployment."""
    if difference := calibration.deployment.difference(deployment):
        raise ValueError(f"calibration: deployment: {difference}; run llmco2 calibrate on this deployment")
    return CalibratedPredictor(base, calibration)
