"""Metrics of prometheus_client whose lines are kept ready for a scrape.

The library stays the interface to the values, and every line but its number is the library's own text, kept from the
first time. A scrape that puts the text in by itself begins with ``leave_out``: then the library leaves our families
out. Not for exemplars, nor for gauges with a function.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue
from pydantic_core import to_json

# Functions without types of their own.
_of_library: Callable[[float], str] = floatToGoString
_openmetrics: Callable[[_Collected], bytes] = exposition.generate_latest
# By the number of digits in front of the point: from 1e6 on the library writes 1.5e+10, in its older releases 1.5e+010.
_EXPONENTS = {digits: _of_library(10.0 ** (digits - 1))[1:].encode() for digits in range(7, 17)}
_LARGE = 1e6
# Not numpy's powers, which need not be exact.
_POWERS = np.array([10.0**power for power in range(17)])
# The end of a line in a template: for a small count, and for a number made text.
_COUNT, _TEXT = b"%d.0\n", b"%b\n"


class LeftOut:
    """The families that the library left out of one scrape, in its order; until ``over``."""

    __slots__ = ("families", "over")

    def __init__(self) -> None:
        self.families: dict[Family, None] = {}
        self.over = False

    def text(self, openmetrics: bool) -> bytes:
        """What the library would have written of them, in the OpenMetrics or in the classic text format."""
        lines = [family.lines() for family in self.families]
        if stale := [of_family for of_family in lines if of_family.look()]:
            numbers = iter(_written(np.concatenate([of_family.numbers() for of_family in stale])))
            for of_family in stale:
                of_family.write(numbers)
        return b"".join([part for of_family in lines for part in (of_family.headers[openmetrics], of_family.text)])


_left_out: ContextVar[LeftOut | None] = ContextVar("llmco2_left_out", default=None)


def leave_out() -> LeftOut:
    """Have the library leave our families out in this context, and in the threads and tasks that it calls.

    A task may keep the context for longer than the scrape lasts: set ``over`` at its end.
    """
    left_out = LeftOut()
    _left_out.set(left_out)
    return left_out


class Family(MetricWrapperBase):
    """A metric with labels."""

    _lines: _Lines | None = None

    def collect(self) -> Iterable[Metric]:
        """For the library: nothing while we are left out."""
        left_out = _left_out.get()
        if left_out is None or left_out.over:
            return super().collect()
        left_out.families[self] = None
        return ()

    def lines(self) -> _Lines:
        """What is kept of its text."""
        if self._lines is None:
            self._lines = _Lines(self)
        return self._lines

    def _child_samples(self) -> Iterable[Sample]:
        # Without the time of birth: a fifth more series, and nobody asks for it. The library can only be told for
        # the whole process, hence for the host's own metrics too.
        return tuple(sample for sample in super()._child_samples() if sample.name != "_created")


class FamilyCounter(Family, Counter):
    """A counter."""


class FamilyGauge(Family, Gauge):
    """A gauge."""


class FamilyHistogram(Family, Histogram):
    """A histogram."""


FAMILIES: dict[type[MetricWrapperBase], type[Family]] = {
    Counter: FamilyCounter,
    Gauge: FamilyGauge,
    Histogram: FamilyHistogram,
}


class _Cell(MutexValue):
    """A value of the library whose number lies beside those of its family, where one look takes them all."""

    def __init__(self, value: Any, numbers: array[float]) -> None:
        self._lock, self._exemplar = value._lock, value._exemplar
        self._numbers, self._place = numbers, len(numbers)
        with self._lock:
            numbers.append(value._value)

    @property
    def _value(self) -> float:
        return self._numbers[self._place]

    @_value.setter
    def _value(self, number: float) -> None:
        self._numbers[self._place] = number


class _Collected:
    """Stands in for a registry."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class _Lines:
    """The lines of a family: written anew when a number has changed, begun anew when there are other series.

    Belongs to the thread that changes the family.
    """

    def __init__(self, family: Any) -> None:
        self._family = family
        empty = _Collected(*family.describe())
        self.headers = generate_latest(empty), _openmetrics(empty).removesuffix(b"# EOF\n")
        self.text = b""
        self._count, self._last = 0, None
        self._values, self._seen = array("d"), b""
        # The text without its numbers, and the lines of each child. While all counts of a histogram are small, the
        # template takes them as integers: that is half the time.
        self._template, self._width, self._small = b"", 0, False
        self._counts: list[Any] = []

    def look(self) -> bool:
        """Whether the text is out of date; remembers the values of now."""
        children = self._family._metrics
        # New ones come at the end: as many as before and the same one last, hence the same.
        if len(children) != self._count or next(reversed(children.values()), None) is not self._last:
            self._begin(tuple(children.values()))
        seen, self._seen = self._seen, self._values.tobytes()
        return seen != self._seen

    def numbers(self) -> NDArray[np.float64]:
        """Those that ``write`` wants as text: one of each line, but for small counts."""
        values = np.frombuffer(self._seen)
        if not isinstance(self._family, Histogram):
            return values
        children = values.reshape(self._count, -1)
        # Room for the sum in the last column.
        counts = np.zeros(children.shape, np.int64)
        children[:, :-1].astype(np.int64).cumsum(axis=1, out=counts[:, :-1])
        if self._small:
            self._counts = counts.ravel().tolist()
            if max(self._counts[self._width - 2 :: self._width]) < _LARGE:
                return children[:, -1]
            self._small, self._template = False, self._template.replace(_COUNT, _TEXT)
        numbers = counts.astype(np.float64)
        numbers[:, -1] = children[:, -1]
        return numbers[:, : self._width].ravel()

    def write(self, texts: Iterator[bytes]) -> None:
        """Make the text anew, with as many of these as there were numbers."""
        if self._small:
            self._counts[self._width - 1 :: self._width] = islice(texts, self._count)
            self.text = self._template % tuple(self._counts)
        else:
            self.text = self._template % tuple(islice(texts, self._count * self._width))
        # Nothing of the past is left to be fetched and freed at the next scrape.
        self._counts = []

    def _begin(self, children: Sequence[Any]) -> None:
        self._count, self._last = len(children), children[-1] if children else None
        self._values, self._seen, self.text = array("d"), b"", b""
        metric = self._family._get_metric()
        for child in children:
            labels = dict(zip(child._labelnames, child._labelvalues, strict=True))
            for sample in child._child_samples():
                metric.add_sample(metric.name + sample.name, {**labels, **sample.labels}, sample.value)
            _gather(child, self._values)
        lines = generate_latest(_Collected(metric)).removeprefix(self.headers[False]).split(b"\n")[:-1]
        self._width = len(lines) // max(self._count, 1)
        # The library shows neither count nor sum where a bound is negative.
        self._small = isinstance(self._family, Histogram) and len(lines) == len(self._values)
        ends = [*[_COUNT if self._small else _TEXT] * (self._width - 1), _TEXT] * self._count
        heads = [line[: line.rfind(b" ") + 1].replace(b"%", b"%%") for line in lines]
        self._template = b"".join([head + end for head, end in zip(heads, ends, strict=True)])


def _gather(child: Any, numbers: array[float]) -> None:
    """Have the values of a child lie in ``numbers`` from now on."""
    if hasattr(child, "_buckets"):
        child._buckets = [_Cell(value, numbers) for value in child._buckets]
        numbers.append(0.0)  # adding this to the buckets gives the count
        child._sum = _Cell(child._sum, numbers)
    else:
        child._value = _Cell(child._value, numbers)


def _written(numbers: NDArray[np.float64]) -> list[bytes]:
    """Each number as the library writes it; all at once takes a sixth of the time."""
    # Most often the library writes what JSON has: the shortest text that reads back the same.
    text = to_json(numbers.tolist())
    (large,) = ((numbers >= _LARGE) & (numbers < 1e16)).nonzero()
    if large.size:
        text = _with_exponents(text, large, np.searchsorted(_POWERS, numbers[large], side="right"))
    texts = text[1:-1].split(b",")
    sizes = np.abs(numbers)
    # The library writes 1e-05 for what JSON has as 1e-5; two digits are the same in both.
    plain = (sizes >= 1e-4) & (sizes < 1e16) | (sizes == 0.0) | (sizes >= 1e-99) & (sizes < 1e-10)
    for place in (~plain).nonzero()[0].tolist():
        texts[place] = _of_library(numbers.item(place)).encode()
    return texts


def _with_exponents(text: bytes, places: NDArray[np.intp], digits: NDArray[np.intp]) -> bytes:
    """A JSON list with 1.5e+06 for 1500000.0 at these places, where so many digits stand in front of the point.

    The last bracket becomes a comma. One number after the other would take three times as long.
    """
    signs = np.frombuffer(bytearray(text), np.uint8)
    signs[0] = signs[-1] = ord(",")
    (commas,) = (signs == ord(",")).nonzero()
    points, ends = commas[places] + 1 + digits, commas[places + 1]
    present = sorted(set(digits.tolist()))
    for count in present:
        point = points[digits == count]
        moved = point[:, None] - np.arange(count - 1)
        signs[moved] = signs[moved - 1]
        signs[point - (count - 1)] = ord(".")
    last = ends - 1
    while (last := last[(signs[last] == ord("0")) | (signs[last] == ord("."))]).size:
        signs[last] = 0  # to go
        last -= 1
    # In place of the comma a sign that is not in JSON, for the exponent and the comma.
    signs[ends] = 128 + digits
    text = signs.tobytes().replace(b"\0", b"")
    for count in present:
        text = text.replace(bytes([128 + count]), _EXPONENTS[count] + b",")
    return text
