"""Who says what a request took: the product's metering, replayed over a simulated serving, and what others do.

For benchmarks/attribution.py. The sampler, monitor and metering are the shipped ones, in virtual time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated_serving import QUIET_SECONDS, Serving
from llmco2_vllm.core.attribution import Attributor
from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.estimate import Estimate, Predictor
from llmco2_vllm.core.ledgers import RequestCharge
from llmco2_vllm.core.metering import MeterWindow
from llmco2_vllm.core.settlement import Settled
from llmco2_vllm.metering import Metering
from llmco2_vllm.meters.activity import EngineActivity
from llmco2_vllm.meters.base import DeviceIdentity, Reading, Vitals
from llmco2_vllm.meters.sampler import EdgeSampler, Timing
from llmco2_vllm.monitor import StepMonitor
from llmco2_vllm.testing import FakeClock

FloatArray = NDArray[np.float64]
OURS = "ours"
PREDICTED = "ours, not metered"
METHODS = (OURS, PREDICTED, "token share", "output token share", "time share", "equal split", "whole GPU to each")
LATE_LOOK_SECONDS = 5e-4
IDENTITY = DeviceIdentity("GPU-simulated", "Simulated GPU")


@dataclass(frozen=True)
class Counter:
    """How an energy counter publishes. duty: share of each tick that the sensor sees; gain: shown over true joules."""

    tick_seconds: float = 0.1
    duty: float = 1.0
    lag_seconds: float = 0.02
    gain: float = 1.0


@dataclass
class SimulatedCounter:
    """The energy counter of a simulated device, as a Meter: published each tick, late, in whole millijoules."""

    serving: Serving
    counter: Counter
    clock: FakeClock
    identity: DeviceIdentity = IDENTITY
    name: str = "simulated"
    _published: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        tick, duty = self.counter.tick_seconds, self.counter.duty
        ticks = np.arange(int((self.serving.seen[-1] + 2 * QUIET_SECONDS) / tick), dtype=np.float64)
        edges: FloatArray = tick * ticks - self.counter.lag_seconds
        seen = (self.serving.energy(edges) - self.serving.energy(edges - duty * tick)) / duty
        self._published = np.floor(1e3 * self.counter.gain * seen.cumsum()) / 1e3

    def read(self) -> Reading:
        """The value published last; no power."""
        now = self.clock()
        return Reading(now, float(self._published[floor(now / self.counter.tick_seconds + 1e-9)]))

    def vitals(self) -> Vitals:
        """Nothing known."""
        return Vitals()

    def reopen(self) -> None:
        """Never lost."""

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass
class Remembering:
    """Asks a predictor once for each batch; several meters weigh the same steps."""

    predictor: Predictor
    known: dict[BatchShape, Estimate] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """That of the predictor."""
        return self.predictor.name

    def estimate(self, batch: BatchShape) -> Estimate:
        """As the predictor."""
        if (found := self.known.get(batch)) is None:
            found = self.known[batch] = self.predictor.estimate(batch)
        return found


class Weighed(NamedTuple):
    """settled: of each request. windows: all that were metered. kept_joules: requests + idle + unattributed."""

    settled: list[Settled]
    windows: list[MeterWindow]
    kept_joules: float
    lag_seconds: float | None


class Weighing:
    """Replays a serving through StepMonitor, Metering and EdgeSampler in virtual time, as the plugin's hook would."""

    def __init__(self, serving: Serving, counter: Counter, predictor: Predictor, seed: int) -> None:
        self._serving, self._clock, self._activity = serving, FakeClock(), EngineActivity()
        self._activity.idle(0.0)
        meter = SimulatedCounter(serving, counter, self._clock)
        self._sampler = EdgeSampler(lambda: [meter], Timing(self._clock, suspended=lambda: 0.0), None, self._activity)
        source = self._sampler.windows
        self._windows: list[MeterWindow] = []
        idle = serving.physics.device.idle_power_watts
        self._metering = Metering(Attributor([idle]), source, clock=self._clock)
        self._monitor = StepMonitor(predictor, self._clock, self._metering)
        self._charges: dict[int, RequestCharge] = {}
        self._draw, self._due = np.random.default_rng([3, seed]), 0.0
        self._before: list[int] | None = None
        self._keys = [object() for _ in serving.begin]  # the monitor knows a step by its object

    def run(self) -> Weighed:
        """All steps, and quiet before and after."""
        serving, count = self._serving, len(self._serving.begin)
        starts = np.searchsorted(serving.entries[:, 0], np.arange(count + 1))
        last = np.zeros(len(serving.prompt), np.int64)
        last[serving.entries[:, 1]] = serving.entries[:, 0]
        order = np.argsort(np.concatenate([serving.scheduled, serving.seen]), kind="stable").tolist()
        for place in order:
            step = place % count
            parts = serving.entries[starts[step] : starts[step + 1]].tolist()
            if place < count:
                self._until(float(serving.scheduled[step]))
                self._begin(step, parts)
                continue
            self._until(float(serving.seen[step]))
            self._monitor.end(self._keys[step])
            for _, request, *_ in parts:
                if last[request] == step:
                    self._leave(request)
            if step + 1 == count or serving.scheduled[step + 1] > serving.seen[step]:
                self._activity.idle(self._clock())
            self._metering.tend()
        self._until(float(serving.seen[-1]) + QUIET_SECONDS)
        self._metering.tend_all()
        totals = self._metering.attributor.totals
        settled = [self._settled(request) for request in range(len(last))]
        measured = sum(figures.measured_joules for figures in settled)
        kept = measured + totals.idle_joules + totals.unattributed_joules
        lag = self._sampler.state()["devices"][0]["lag_seconds"]
        return Weighed(settled, self._windows, kept, lag)

    def _settled(self, request: int) -> Settled:
        account = self._charges[request].account
        assert account is not None
        return account.settled(self._metering.settlement.now)

    def _until(self, seconds: float) -> None:
        """Let the sampler look as often as it wants to, each time a little late."""
        while self._due <= seconds:
            self._clock.now_seconds = max(self._clock(), self._due + self._draw.uniform(0, LATE_LOOK_SECONDS))
            taken = len(self._sampler.windows)
            self._due = self._sampler.poll_once()
            self._windows += list(self._sampler.windows)[taken:]
        self._clock.now_seconds = max(self._clock(), seconds)

    def _begin(self, step: int, parts: list[list[int]]) -> None:
        """As the plugin's StepReader and hook do it."""
        monitor = self._monitor
        if not monitor.open_tickets:
            self._activity.busy(self._clock())
        requests = [part[1] for part in parts]
        if requests == self._before:
            monitor.begin_steady(self._keys[step])
            return
        book, slices, others = monitor.book, [], []
        for name in set(book.decoding) - {str(request) for request in requests}:
            book.interrupt(name)
        for _, request, prefill, _, _, _ in parts:
            name = str(request)
            if name not in book.open:
                prompt = int(self._serving.prompt[request])
                self._charges[request] = book.join(name, 0, prompt, prompt)
            if name not in book.decoding:
                slices.append(book.open[name].slice(prefill or 1))
                others.append(name)
        monitor.begin(self._keys[step], slices)
        monitor.charge()
        for name in others:
            if book.open[name].computed >= book.open[name].known:
                book.enter(name)
        self._before = None if others else requests

    def _leave(self, request: int) -> None:
        charge = self._monitor.finish(str(request))
        assert charge is not None
        self._monitor.conclude(charge, charge.energy_joules)
        self._before = None


class Rivals:
    """What others make of the same windows. Each method returns joules by phase, shape (2, requests)."""

    def __init__(self, serving: Serving, windows: Sequence[MeterWindow]) -> None:
        known = [window for window in windows if window.energy_joules is not None]
        self._serving, requests = serving, len(serving.prompt)
        self._edges = np.array([known[0].begin_seconds] + [window.end_seconds for window in known])
        self._joules = np.array([window.energy_joules for window in known], dtype=np.float64)
        step, request, prefill, _, _, samples = serving.entries.T
        prompted = (prefill > 0) & (samples > 0)
        # Residence: from the begin of the first step to the first token, and on to the last.
        first = np.full(requests, len(serving.begin))
        np.minimum.at(first, request, step)
        last = np.zeros(requests, np.int64)
        np.maximum.at(last, request, step)
        answered = np.zeros(requests, np.int64)
        answered[request[prompted]] = step[prompted]
        self._times = np.array([serving.begin[first], serving.seen[answered], serving.seen[last]])

    def _spread(self, amounts: FloatArray) -> FloatArray:
        """Amounts of the steps by window, a step that an edge cuts by its time; shape (windows,)."""
        ends = np.column_stack([self._serving.begin, self._serving.end]).ravel()
        summed = np.column_stack([np.zeros(len(amounts)), amounts]).ravel().cumsum()
        result: FloatArray = np.diff(np.interp(self._edges, ends, summed))
        return result

    def by_tokens(self, prompts: bool) -> FloatArray:
        """Joules of a window times the request's tokens in it over all tokens; of the output alone, or all."""
        step, request, prefill, _, _, samples = self._serving.entries.T
        amount = np.where(prefill > 0, prefill, 1) if prompts else samples
        tokens = self._spread(np.bincount(step, amount, len(self._serving.begin)).astype(np.float64))
        rate = np.divide(self._joules, tokens, out=np.zeros(len(tokens)), where=tokens > 1e-9)
        # A step's rate: the mean of its windows', by time.
        rates = self._mean(rate, self._serving.begin, self._serving.end)
        return self._by_phase(request, prefill > 0, amount * rates[step])

    def _by_phase(self, request: NDArray[np.int64], first: NDArray[np.bool_], joules: FloatArray) -> FloatArray:
        count = len(self._serving.prompt)
        return np.array([np.bincount(request, joules * phase, count) for phase in (first, ~first)])

    def _mean(self, rate: FloatArray, begin: FloatArray, end: FloatArray) -> FloatArray:
        summed = np.concatenate([[0.0], (rate * np.diff(self._edges)).cumsum()])
        integral = np.interp(end, self._edges, summed) - np.interp(begin, self._edges, summed)
        result: FloatArray = integral / (end - begin)
        return result

    def _integral(self, watts: FloatArray) -> FloatArray:
        summed = np.concatenate([[0.0], (watts * np.diff(self._edges)).cumsum()])
        return np.diff(np.interp(self._times, self._edges, summed), axis=0)

    def by_time(self) -> FloatArray:
        """Joules of a window by the time each request was there."""
        grid = np.sort(self._times[[0, 2]].ravel())
        born, gone = np.sort(self._times[0]), np.sort(self._times[2])
        there = np.searchsorted(born, grid, "right") - np.searchsorted(gone, grid, "right")
        summed = np.concatenate([[0.0], (there[:-1] * np.diff(grid)).cumsum()])
        residence = np.diff(np.interp(self._edges, grid, summed))
        return self._integral(np.divide(self._joules, residence, out=np.zeros(len(residence)), where=residence > 1e-9))

    def equally(self) -> FloatArray:
        """Joules of a window equally to all that were there at any time of it."""
        first = np.searchsorted(self._edges, self._times[0], "right") - 1
        last = np.searchsorted(self._edges, self._times[2], "left") - 1
        count = (
            np.bincount(first, minlength=len(self._edges)) - np.bincount(last + 1, minlength=len(self._edges) + 1)[:-1]
        )
        share = self._joules / np.maximum(1, count.cumsum()[:-1])
        summed = np.concatenate([[0.0], share.cumsum()])
        total = summed[last + 1] - summed[first]
        # Phases: by time within what it got.
        prefill = (self._times[1] - self._times[0]) / (self._times[2] - self._times[0])
        return np.array([total * prefill, total * (1 - prefill)])

    def whole(self) -> FloatArray:
        """All the device drew while the request was there, as a process that meters itself reads it."""
        return self._integral(self._joules / np.diff(self._edges))


def attributed(serving: Serving, weighed: Weighed) -> dict[str, FloatArray]:
    """Joules of each request by phase and method, each of shape (2, requests)."""
    ours = np.array([(figures.prefill_joules, figures.decode_joules) for figures in weighed.settled]).T
    predicted = [(figures.predicted_prefill_joules, figures.predicted_decode_joules) for figures in weighed.settled]
    rivals = Rivals(serving, weighed.windows)
    others = (
        rivals.by_tokens(True),
        rivals.by_tokens(False),
        rivals.by_time(),
        rivals.equally(),
        rivals.whole(),
    )
    return dict(zip(METHODS, (ours, np.array(predicted).T, *others), strict=True))
