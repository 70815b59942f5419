"""Metrics of prometheus_client whose lines are kept ready for a scrape.

The library stays the interface to the values, and every line but its number is the library's own text, kept from the
first time. A scrape that puts the text in by itself begins with ``leave_out``: then the library leaves our families
out. Not for exemplars, nor for gauges with a function.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from io import BytesIO
from itertools import islice, pairwise
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
# The library writes 1e-06 for what JSON has as 1e-6; two digits are the same in both.
_SHORT_EXPONENTS = [(b"e-%d," % digit, b"e-0%d," % digit) for digit in range(5, 10)]
# Not numpy's powers, which need not be exact.
_POWERS = np.array([10.0**power for power in range(17)])


class LeftOut:
    """The families that the library left out of one scrape, in its order; until ``over``."""

    __slots__ = ("families", "over")

    def __init__(self) -> None:
        self.families: dict[Family, None] = {}
        self.over = False

    def text(self, openmetrics: bool) -> bytes:
        """What the library would have written of them, in the OpenMetrics or in the classic text format."""
        families = tuple(self.families)
        page = families[0].page
        if page is None or page.families != families:
            page = families[0].page = _Page(families)
        return page.text(openmetrics)


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

    page: _Page | None = None  # that begins with it
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
            self._lines = _HistogramLines(self) if isinstance(self, Histogram) else _Lines(self)
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
        self.parts: list[bytes | memoryview] = []
        self.stale = False
        self._count, self._last = 0, None
        self._values, self._seen = array("d"), b""
        self._template = b""

    def look(self) -> bool:
        """Whether the text is out of date; remembers the values of now."""
        children = self._family._metrics
        # New ones come at the end: as many as before and the same one last, hence the same.
        if len(children) != self._count or next(reversed(children.values()), None) is not self._last:
            self._begin(tuple(children.values()))
        seen, self._seen = self._seen, self._values.tobytes()
        self.stale = seen != self._seen
        return self.stale

    def numbers(self) -> array[float]:
        """Those that ``write`` wants as text."""
        return self._values

    def write(self, texts: Sequence[bytes]) -> None:
        """Make the text anew."""
        self.parts = [self._template % tuple(texts)]

    def _begin(self, children: Sequence[Any]) -> None:
        self._count, self._last = len(children), children[-1] if children else None
        self._values, self._seen, self.parts = array("d"), b"", []
        metric = self._family._get_metric()
        for child in children:
            labels = dict(zip(child._labelnames, child._labelvalues, strict=True))
            for sample in child._child_samples():
                metric.add_sample(metric.name + sample.name, {**labels, **sample.labels}, sample.value)
            _gather(child, self._values)
        lines = generate_latest(_Collected(metric)).removeprefix(self.headers[False]).split(b"\n")[:-1]
        heads = [line[: line.rfind(b" ") + 1] for line in lines]
        self._template = b"".join([head.replace(b"%", b"%%") + b"%b\n" for head in heads])
        self._prepare(lines, heads)

    def _prepare(self, lines: Sequence[bytes], heads: Sequence[bytes]) -> None:
        """For these of the library, which begin so."""


class _HistogramLines(_Lines):
    """The lines of a histogram in two parts a child: up to its sum, which part belongs to ``home``; and its sum.

    Once a count has got large, or less, all are written anew like those of another family.
    """

    home: _Counts | None = None
    small = False  # the counts

    def numbers(self) -> array[float]:
        """The sums, or all."""
        wide = len(self._values) // self._count
        if self.small:
            return self._values[wide - 1 :: wide] if self.tails[0] else array("d")
        sums = np.frombuffer(self._values).reshape(self._count, wide)[:, wide - bool(self.tails[0]) :]
        return array("d", np.concatenate([self.counts(), sums], axis=1).tobytes())

    def write(self, texts: Sequence[bytes]) -> None:
        """Put them in."""
        if self.small:
            self.parts[1::2] = texts
        else:
            self.parts = [self._template % tuple(texts)]

    def counts(self) -> NDArray[np.float64]:
        """Of each child, as its lines show them."""
        return np.frombuffer(self._values).reshape(self._count, -1)[:, : self.counted].cumsum(axis=1)

    def _prepare(self, lines: Sequence[bytes], heads: Sequence[bytes]) -> None:
        self.home, self.small = None, False
        if not lines:
            return
        width = len(lines) // self._count
        # The library does not show the sum where a bound is negative, and its older releases neither the count.
        summed = width == len(self._values) // self._count
        self.counted = width - summed  # of each child
        self.small = bool(self.counts().max() < _LARGE)
        tails = heads[width - 1 :: width] if summed else [b""] * self._count
        self.tails = [len(tail) for tail in tails]  # behind these counts
        # The line of a sum ends where the next part begins.
        end = b"\n" * summed
        for at, tail in zip(range(0, len(lines), width), tails, strict=True):
            self.parts += [end * (at > 0) + b"\n".join([*lines[at : at + self.counted], tail]), b""]
        self.parts.append(end)


class _Counts:
    """The counts of histograms in one text, changed where they stand: they hardly ever get wider."""

    def __init__(self, histograms: Sequence[_HistogramLines]) -> None:
        self._all = histograms
        self._move_in()

    def _move_in(self) -> None:
        """Take over the text of all whose counts are small."""
        for lines in self._all:
            lines.home = self
        self._small = [lines for lines in self._all if lines.small]
        text = bytearray().join([part for lines in self._small for part in lines.parts[:-1:2]])
        rows = [row for row in text.split(b"\n") if row.endswith(b".0")]
        self._now = np.array([float(row[row.rfind(b" ") :]) for row in rows], np.float64)
        self._limit = _POWERS[1 + np.searchsorted(_POWERS[1:], self._now, side="right")]
        signs = np.frombuffer(text, np.uint8)
        (ends,) = (signs == ord("\n")).nonzero()
        self._places = ends[signs[ends - 1] == ord("0")] - len(b"1.0")
        self._last = np.cumsum([lines.counted for lines in self._small for _ in lines.tails], dtype=np.intp) - 1
        self._tails = np.array([tail for lines in self._small for tail in lines.tails], np.intp) + len(b"1.0\n")
        self._hand_out(text)

    def _hand_out(self, text: bytearray) -> None:
        self._signs, view = np.frombuffer(text, np.uint8), memoryview(text)
        ends = (self._places[self._last] + self._tails).tolist()
        parts = iter([view[begin:end] for begin, end in pairwise([0, *ends])])
        for lines in self._small:
            lines.parts[:-1:2] = islice(parts, len(lines.tails))

    def write(self) -> None:
        """Bring the text up to date."""
        if any(lines.home is not self for lines in self._all):
            self._move_in()
        elif not any(lines.stale for lines in self._all):
            return
        now = self._sum()
        if not ((now >= self._now) & (now < self._limit)).all():
            now = self._make_room(now)
        (changed,) = (now != self._now).nonzero()
        places, old, new = self._places[changed], self._now[changed].astype(np.int32), now[changed].astype(np.int32)
        self._now = now
        # From the last digit on, as far as they differ.
        while places.size:
            old, tens = old // 10, new // 10
            self._signs[places] = (new - 10 * tens + ord("0")).astype(np.uint8)
            (left,) = (tens != old).nonzero()
            places, old, new = places[left] - 1, old[left], tens[left]

    def _sum(self) -> NDArray[np.float64]:
        return np.frombuffer(b"".join([lines.counts().data for lines in self._small]))

    def _make_room(self, now: NDArray[np.float64]) -> NDArray[np.float64]:
        """Have them fit, and return those that can."""
        fit = (now >= self._now) & (now < _LARGE)
        if not fit.all():
            bounds = np.cumsum([lines.counted * len(lines.tails) for lines in self._small])
            for lines, those in zip(self._small, np.split(fit, bounds[:-1]), strict=True):
                lines.small = bool(those.all())
            self._move_in()
            now = self._sum()
        while (wide := now >= self._limit).any():
            # All digits of these will differ: one more may stand anywhere among them.
            cuts = [0, *self._places[wide].tolist(), len(self._signs)]
            self._places += wide.cumsum()
            self._limit[wide] *= 10.0
            self._hand_out(bytearray(b"0").join([self._signs.data[begin:end] for begin, end in pairwise(cuts)]))
        return now


class _Page:
    """The text of some families."""

    def __init__(self, families: tuple[Family, ...]) -> None:
        self.families = families
        self._lines = [family.lines() for family in families]
        self._counts = _Counts([lines for lines in self._lines if isinstance(lines, _HistogramLines)])
        self._text = BytesIO()

    def text(self, openmetrics: bool) -> bytes:
        """As of now."""
        stale = [lines for lines in self._lines if lines.look()]
        self._counts.write()
        numbers = {lines: values for lines in stale if (values := lines.numbers())}
        if numbers:
            for lines, texts in zip(numbers, _written([*numbers.values()]), strict=True):
                lines.write(texts)
        # Into the memory of the last text, or a copy while somebody holds that: new memory takes five times as long.
        self._text.seek(0)
        for lines in self._lines:
            self._text.write(lines.headers[openmetrics])
            self._text.writelines(lines.parts)
        self._text.truncate()
        return self._text.getvalue()


def _gather(child: Any, numbers: array[float]) -> None:
    """Have the values of a child lie in ``numbers`` from now on."""
    if hasattr(child, "_buckets"):
        child._buckets = [_Cell(value, numbers) for value in child._buckets]
        numbers.append(0.0)  # adding this to the buckets gives the count
        child._sum = _Cell(child._sum, numbers)
    else:
        child._value = _Cell(child._value, numbers)


def _written(families: Sequence[array[float]]) -> Iterator[list[bytes]]:
    """The numbers of each as the library writes them, in a sixth of the time."""
    text = b"".join([_json(family) for family in families])
    numbers = np.frombuffer(b"".join(families))
    (large,) = ((numbers >= _LARGE) & (numbers < 1e16)).nonzero()
    if large.size:
        text = _with_exponents(text, large, np.searchsorted(_POWERS, numbers[large], side="right"))
    sizes = np.abs(numbers)
    like_json = (sizes >= 1e-4) & (sizes < 1e16) | (sizes >= 1e-99) & (sizes < 1e-5) | (sizes == 0.0)
    others = (~like_json).nonzero()[0].tolist()[::-1]
    begin = 0
    for family, line in zip(families, text.splitlines(), strict=True):
        texts = line[:-1].split(b",")
        while others and others[-1] < begin + len(family):
            place = others.pop() - begin
            texts[place] = _of_library(family[place]).encode()
        begin += len(family)
        yield texts


def _json(numbers: array[float]) -> bytes:
    """A line with a comma behind each number; most often the library writes the same, the shortest that reads back."""
    text = to_json(numbers.tolist())[1:-1] + b",\n"
    if b"e" in text:
        for short, long in _SHORT_EXPONENTS:
            text = text.replace(short, long)
    return text


def _with_exponents(text: bytes, places: NDArray[np.intp], digits: NDArray[np.intp]) -> bytes:
    """Lines with 1.5e+06 for 1500000.0 at these places, where so many digits stand in front of the point."""
    signs = np.frombuffer(bytearray(b",%b" % text), np.uint8)
    (commas,) = (signs == ord(",")).nonzero()
    begins, ends = commas[places] + 1, commas[places + 1]
    begins += signs[begins] == ord("\n")
    present = np.bincount(digits).nonzero()[0].tolist()
    for count in present:
        # All between the first digit and the point moves on by one.
        begin, size = begins[digits == count], count - 1
        pieces = np.ndarray(len(signs) - size + 1, f"V{size}", signs, strides=(1,))
        pieces[begin + 2] = pieces[begin + 1]
        signs[begin + 1] = ord(".")
    last = ends - 1
    while (last := last[signs[last] <= ord("0")]).size:  # or a point
        signs[last] = 0  # to go
        last -= 1
    # In place of the comma a sign that is not in JSON, for the exponent and the comma.
    signs[ends] = 128 + digits
    text = signs[1:].tobytes().replace(b"\0", b"")
    for count in present:
        text = text.replace(bytes([128 + count]), _EXPONENTS[count] + b",")
    return text
