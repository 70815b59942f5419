"""Sample: what one metered window of one engine teaches. Counts and identities; no text, no token, no request."""

from __future__ import annotations

import json
import math
import operator
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import PhaseShape
from llmco2_vllm.core.hardware import Topology

FloatArray = NDArray[np.float64]
# window_share: fraction of the step inside the window, 0 to 1. Predictions are of the whole step; NaN when unknown.
STEP_COLUMNS: Final = (
    "window_share",
    "duration_seconds",
    "predicted_joules",
    *(f"{phase}_{count}" for phase in ("prefill", "decode") for count in PhaseShape._fields),
    "encoder_tokens",
)
_PREDICTED = STEP_COLUMNS.index("predicted_joules")
# Names and versions are short; a longer text has no business here.
MOST_CHARACTERS = 120
_MOST_INTEGER = 2**31 - 1
# Seconds, joules and counts of a step stay far below; sums of them must be finite.
_MOST_OF_STEP = 1e18
# What a share may exceed 1 by.
_ROUNDING = 1e-9
_MAY_BE_NEGATIVE = {"temperature_celsius"}
_KINDS = {"float": float, "int": int, "str": str, "bool": bool}


@dataclass(frozen=True, eq=False)
class Sample:
    """One metered window of one engine. Raises ValueError that names the field which is not possible.

    energy_joules, sigma_joules: metered over ``devices`` devices, and its standard deviation by the meter.
    idle_seconds, idle_joules: of the window, time without a step and the energy that is put down to it.
    predicted_joules: of the steps on these devices, by their shares of the window; None when unknown.
    devices, scope: how many devices the energy is of, and what of them the meter sees ("gpu", "module", ...).
    model_fingerprint: digest of the model's sizes. engine: its index. doubt: why not to learn from it, "" when trusted.
    steps: shape (n, len(STEP_COLUMNS)), seconds, joules and counts; copied, read-only.
    """

    began_epoch_seconds: float
    duration_seconds: float
    energy_joules: float
    sigma_joules: float
    idle_seconds: float
    idle_joules: float | None
    predicted_joules: float | None
    device: str
    devices: int
    scope: str
    meter: str
    predictor: str
    topology: Topology
    model_fingerprint: str
    engine: int
    engine_version: str
    package_version: str
    sm_clock_mhz: float | None
    temperature_celsius: float | None
    doubt: str
    feature_version: str
    steps: FloatArray

    def __post_init__(self) -> None:
        if not isinstance(self.topology, Topology):
            raise ValueError(f"topology={type(self.topology).__name__} is not possible; allowed: a Topology")
        spread = {}
        for column, value in zip(COLUMNS, self.values, strict=True):
            if column.of_topology:
                spread[column.name] = column.checked(value)
            else:
                object.__setattr__(self, column.name, column.checked(value))
        object.__setattr__(self, "topology", Topology(**spread))
        object.__setattr__(self, "steps", _checked_steps(self.steps))

    @property
    def values(self) -> tuple[Any, ...]:
        """All but the steps, in the order of ``COLUMNS``."""
        return tuple(getattr(self.topology if column.of_topology else self, column.name) for column in COLUMNS)

    @classmethod
    def from_values(cls, values: Sequence[Any], steps: FloatArray) -> Sample:
        """The reverse of ``values``. Raises ValueError as the constructor does."""
        own: dict[str, Any] = {}
        spread: dict[str, Any] = {}
        for column, value in zip(COLUMNS, values, strict=True):
            (spread if column.of_topology else own)[column.name] = column.checked(value)
        return cls(**own, topology=Topology(**spread), steps=steps)

    @cached_property
    def content_key(self) -> bytes:
        """16 bytes that two samples share when all they hold is the same, to the last bit."""
        digest = blake2b(json.dumps(self.values).encode(), digest_size=16)
        digest.update(step_bytes(self.steps))
        return digest.digest()

    @property
    def regime(self) -> tuple[float, float, float, float]:
        """The mean step: prefill sequences, tokens of each, decode sequences, cached tokens of each; counts.

        Without decode the last is of each prefilling one. Zeros for a window without a step.
        """
        column = dict(zip(STEP_COLUMNS, (self.steps[:, 0] @ self.steps).tolist(), strict=True))
        share = float(self.steps[:, 0].sum())
        prefill, decode = column["prefill_sequences"], column["decode_sequences"]
        each = _ratio(column["prefill_tokens"], prefill)
        context = _ratio(column["decode_kv_tokens"], decode)
        if not decode:
            context = max(0.0, _ratio(column["prefill_kv_tokens"], prefill) - each)
        return _ratio(prefill, share), each, _ratio(decode, share), context

    @property
    def relative_error(self) -> float | None:
        """Predicted over metered energy of the steps, less 1: a ratio; None when a part of it is unknown."""
        if self.predicted_joules is None or self.idle_joules is None:
            return None
        metered = self.energy_joules - self.idle_joules
        error = self.predicted_joules / metered - 1 if metered > 0 else math.inf
        return error if math.isfinite(error) else None


def _ratio(total: float, parts: float) -> float:
    """Mean of a count; 0 without parts."""
    return min(total / parts, _MOST_OF_STEP) if parts else 0.0


class Column(NamedTuple):
    """A scalar of a sample. kind: float, int, str or bool."""

    name: str
    kind: type
    optional: bool
    of_topology: bool

    def checked(self, value: Any) -> Any:
        """The value as plain Python. Raises ValueError that names the column and what is allowed."""
        if value is None and self.optional:
            return None
        try:
            found = self._plain(value)
        except (TypeError, ValueError, OverflowError):
            found = None
        if found is None:
            # Its type, not its value: what is refused may be anything, and messages are logged.
            shown = value if isinstance(value, (bool, int, float)) else type(value).__name__
            raise ValueError(f"{self.name}={shown} is not possible; allowed: {self._allowed()}")
        return found

    def _plain(self, value: Any) -> Any:
        if self.kind is str:
            possible = isinstance(value, str) and len(value) <= MOST_CHARACTERS and value.isprintable()
            return str(value) if possible else None
        if self.kind is float and not isinstance(value, (str, bytes)):
            number = float(value) + 0.0  # no negative zero: SQLite has none
            return number if math.isfinite(number) and (number >= 0 or self.name in _MAY_BE_NEGATIVE) else None
        index = int(value) if isinstance(value, np.bool_) else operator.index(value)
        if self.kind is bool:
            return bool(index) if index in (0, 1) else None
        return index if 0 <= index <= _MOST_INTEGER else None

    def _allowed(self) -> str:
        texts = {
            str: f"at most {MOST_CHARACTERS} printable characters",
            float: "a finite number" + ("" if self.name in _MAY_BE_NEGATIVE else ", 0 or more"),
            int: f"a whole number, 0 to {_MOST_INTEGER}",
            bool: "true or false",
        }
        return texts[self.kind] + (", or nothing" if self.optional else "")


def _columns(owner: type, of_topology: bool) -> Iterator[Column]:
    for field in fields(owner):
        kind, _, rest = str(field.type).partition(" | ")
        if field.name == "topology":
            yield from _columns(Topology, True)
        elif field.name != "steps":
            yield Column(field.name, _KINDS[kind], rest == "None", of_topology)


COLUMNS: Final = tuple(_columns(Sample, False))


def _checked_steps(steps: Any) -> FloatArray:
    found = np.array(steps, dtype=np.float64, order="C")
    if found.ndim != 2 or found.shape[1] != len(STEP_COLUMNS):
        raise ValueError(f"steps of shape {found.shape} are not possible; allowed: (n, {len(STEP_COLUMNS)})")
    possible = (found >= 0) & (found <= _MOST_OF_STEP)
    possible[:, _PREDICTED] |= np.isnan(found[:, _PREDICTED])
    possible[:, 0] &= found[:, 0] <= 1 + _ROUNDING
    if not possible.all():
        row, column = np.argwhere(~possible)[0].tolist()
        allowed = f"0 to {_MOST_OF_STEP if column else 1:g}"
        raise ValueError(f"steps: {STEP_COLUMNS[column]}={found[row, column]} is not possible; allowed: {allowed}")
    # One zero and one NaN, so that alike samples are the same bytes.
    found[np.isnan(found)] = np.nan
    found += 0.0
    found.setflags(write=False)
    return found


def step_bytes(steps: FloatArray) -> bytes:
    """Little-endian float64, column after column, which compresses better than row after row."""
    return steps.T.astype("<f8", order="C").tobytes()


def pack_steps(steps: FloatArray) -> bytes:
    """``step_bytes``, deflated."""
    return zlib.compress(step_bytes(steps), 1)


def unpack_steps(packed: bytes) -> FloatArray:
    """The reverse of ``pack_steps``. Raises ValueError when it is not such bytes."""
    try:
        columns = np.frombuffer(zlib.decompress(packed), dtype="<f8").reshape(len(STEP_COLUMNS), -1)
    except (zlib.error, TypeError) as error:
        raise ValueError(f"steps are not readable ({error})") from None
    return columns.T.astype(np.float64)
