"""Scores of predictions against measurements. Shares and errors are in percent: 12.3 means 12.3 %.

Arrays have shape (n,) and hold positive, finite quantities of one kind: joules, seconds or watts. EBA(delta), the
share of predictions within delta percent, is the score of NNLQP (Liu et al., ICPP 2022) and of LLMCO2
(arXiv:2410.02950).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Values = Sequence[float] | FloatArray
# Standard deviations that hold 90 % of a normal distribution.
NORMAL_90 = 1.6449


def relative_errors(predicted: Values, measured: Values) -> FloatArray:
    """Signed errors in percent of the measurement, shape (n,).

    Raises ValueError for empty, mismatched, non-finite or non-positive input.
    """
    guess, truth = _positive("predicted", predicted), _positive("measured", measured)
    _same_length(predicted=guess, measured=truth)
    return (guess / truth - 1.0) * 100.0


def mape(predicted: Values, measured: Values) -> float:
    """Mean absolute percentage error."""
    return float(np.abs(relative_errors(predicted, measured)).mean())


def median_ape(predicted: Values, measured: Values) -> float:
    """Median absolute percentage error."""
    return float(np.median(np.abs(relative_errors(predicted, measured))))


def eba(predicted: Values, measured: Values, delta: float) -> float:
    """EBA(delta): share of predictions at most ``delta`` percent off, in percent."""
    if not delta >= 0:
        raise ValueError(f"delta={delta!r} is not possible; allowed: 0 or more percent")
    return float((np.abs(relative_errors(predicted, measured)) <= delta).mean() * 100.0)


def bias(predicted: Values, measured: Values) -> float:
    """Mean signed relative error in percent; positive when predictions are too high."""
    return float(relative_errors(predicted, measured).mean())


def coverage(lower: Values, upper: Values, measured: Values) -> float:
    """Share of measurements inside their interval, bounds included, in percent. Lower bounds may be zero."""
    truth, high = _positive("measured", measured), _positive("upper", upper)
    low = _array("lower", lower)
    _same_length(lower=low, upper=high, measured=truth)
    if bool((low < 0).any()) or bool((low > high).any()):
        raise ValueError("lower must lie between zero and upper in every interval")
    return float(((low <= truth) & (truth <= high)).mean() * 100.0)


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` predictions, in percent; ``coverage_90`` is None where no intervals were given."""

    n: int
    mape: float
    median_ape: float
    eba_5: float
    eba_10: float
    eba_30: float
    bias: float
    coverage_90: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def score(predicted: Values, measured: Values, interval: tuple[Values, Values] | None = None) -> Scores:
    """All scores of predictions; ``interval``: lower and upper bounds of their 90 % intervals, each of shape (n,)."""
    return Scores(
        n=len(relative_errors(predicted, measured)),
        mape=mape(predicted, measured),
        median_ape=median_ape(predicted, measured),
        eba_5=eba(predicted, measured, 5.0),
        eba_10=eba(predicted, measured, 10.0),
        eba_30=eba(predicted, measured, 30.0),
        bias=bias(predicted, measured),
        coverage_90=None if interval is None else coverage(*interval, measured),
    )


def _array(name: str, values: Values) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; expected (n,)")
    if not array.size:
        raise ValueError(f"{name} is empty; scores need at least one value")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite, at position {int(np.argmin(np.isfinite(array)))}")
    return array


def _positive(name: str, values: Values) -> FloatArray:
    array = _array(name, values)
    if not (array > 0).all():
        position = int(np.argmin(array > 0))
        raise ValueError(f"{name}[{position}]={array[position]:g} is not possible; expected positive values")
    return array


def _same_length(**arrays: FloatArray) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"lengths differ: {told}")
