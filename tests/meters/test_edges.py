"""The pace finds a counter's ticks within the call limit, and its edge times are as good as it says."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmco2_vllm.meters.edges import CALLS_PER_SECOND, POLL_SECONDS, CallLimit, Edge, Pace, tick_of

PHASE = 0.0137


class Run:
    """A pace over a counter that ticks every ``tick`` seconds, looked at ``late`` seconds late on average."""

    def __init__(self, tick: float, late: float = 0.0002, seconds: float = 60.0, seed: int = 0) -> None:
        source = random.Random(seed)
        self.pace, limit = Pace(), CallLimit()
        self.calls: list[float] = []
        self.edges: list[tuple[float, Edge]] = []
        now, value = 100.0, -1
        while now < 100.0 + seconds:
            seen = int((now - PHASE) // tick)
            limit.note(now)
            self.calls.append(now)
            edge = self.pace.saw(now, value not in (-1, seen))
            value = seen
            if edge:
                self.edges.append((seen * tick + PHASE, edge))
            now = max(now + 3e-5, max(self.pace.due, limit.free_at) + source.expovariate(1 / late))

    @property
    def tail(self) -> np.ndarray:
        """Errors of the later edges in units of their stated standard deviation."""
        rows = self.edges[len(self.edges) // 3 :]
        return np.array([(edge.time_seconds - true) / edge.sigma_seconds for true, edge in rows])


@settings(deadline=None, max_examples=25)
@given(st.floats(0.008, 0.4), st.integers(0, 5))
@example(0.010804528099876356, 3)
@example(0.0693047547785099, 0)
def test_the_tick_is_learnt_whatever_it_is(tick: float, seed: int) -> None:
    assert Run(tick, seconds=30.0, seed=seed).pace.tick_seconds == pytest.approx(tick, rel=2e-3)


@pytest.mark.parametrize("tick", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("late", [0.0002, 0.004])
def test_edge_times_are_as_good_as_stated(tick: float, late: float) -> None:
    assert 0.2 < Run(tick, late).tail.std() < 1.3


def test_edges_of_a_quiet_reader_are_known_to_the_poll_interval() -> None:
    sigma = [edge.sigma_seconds for _, edge in Run(0.1).edges[100:]]
    assert np.mean(sigma) == pytest.approx(POLL_SECONDS / 12**0.5, rel=0.05)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.001, 1.0), st.floats(0.0001, 0.02), st.integers(0, 9))
def test_no_second_has_more_calls_than_the_limit(tick: float, late: float, seed: int) -> None:
    calls = Run(tick, late, 12.0, seed).calls
    busiest = max(sum(begin <= t < begin + 1.0 - 1e-9 for t in calls[i : i + 60]) for i, begin in enumerate(calls))
    assert busiest <= CALLS_PER_SECOND


@pytest.mark.parametrize(("tick", "apart"), [(0.02, 0.1), (0.05, 0.1), (0.1, 0.1), (0.25, 0.25)])
def test_edges_are_taken_a_window_apart(tick: float, apart: float) -> None:
    times = [edge.time_seconds for _, edge in Run(tick).edges[-50:]]
    assert np.diff(times).mean() == pytest.approx(apart, rel=0.01)


def test_a_counter_that_ticks_faster_than_one_may_look_is_read_once_per_window() -> None:
    run = Run(0.001)
    assert run.pace.line is None
    assert np.diff([edge.time_seconds for _, edge in run.edges[-50:]]).mean() == pytest.approx(0.1, rel=0.02)


def test_few_calls_are_made_for_each_edge() -> None:
    run = Run(0.1)
    assert len([t for t in run.calls if t > 110]) / len([e for true, e in run.edges if true > 110]) < 4


def test_jitter_tells_how_late_the_reader_is() -> None:
    quiet, loud = (Run(0.1, late).pace.line for late in (0.0002, 0.004))
    assert quiet is not None and loud is not None
    assert quiet.jitter_seconds is not None and loud.jitter_seconds is not None
    assert quiet.jitter_seconds < 0.001 < 0.002 < loud.jitter_seconds


def test_a_device_that_changes_its_phase_is_found_again() -> None:
    pace, now, value = Pace(), 0.0, -1
    errors = []
    while now < 60.0:
        phase = 0.0137 if now < 30.0 else 0.0637
        seen = int((now - phase) // 0.1)
        edge = pace.saw(now, value not in (-1, seen))
        value = seen
        if edge and now > 45.0:
            errors.append(edge.time_seconds - (seen * 0.1 + phase))
        now = max(now + 3e-5, pace.due)
    assert max(map(abs, errors)) < 2 * POLL_SECONDS


@given(st.floats(0.01, 0.5), st.sets(st.integers(1, 25), min_size=8, max_size=20), st.randoms(use_true_random=False))
def test_missing_ticks_do_not_change_the_period(tick: float, ticks: set[int], source: random.Random) -> None:
    kept = sorted(ticks | {0, 1, 2})
    times = [k * tick + source.uniform(0, 0.05 * tick) for k in kept]
    assert tick_of(times, 0.1 * tick) == pytest.approx(tick, rel=0.06)
    assert all(a < b for a, b in pairwise(times))
