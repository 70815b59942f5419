"""A figure: what it may be, how old it is, and how figures are found in time."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.intensity import HELD, Intensity, Kind
from llmco2_vllm.core.units import convert
from llmco2_vllm.grid.history import History

times = st.integers(0, 4_000_000_000).map(float)
maybe = st.none() | times
grams = st.floats(0, 3000)


def figure(value: float, begin: float | None, end: float | None, fetched: float | None = None) -> Intensity:
    return Intensity(value, "FR", "average", "location", "made", False, begin, end, fetched)


@given(grams, maybe, maybe, times)
def test_an_age_is_never_negative_and_is_unknown_only_without_any_time(
    value: float, end: float | None, fetched: float | None, now: float
) -> None:
    age = figure(value, None, end, fetched).age_seconds(now)
    known = [at for at in (end, fetched) if at is not None]
    assert (age is None) == (not known)
    assert age is None or age == max(0.0, now - min(known))


def test_a_server_that_repeats_an_old_hour_does_not_make_it_young() -> None:
    assert figure(50, 0, 3600, fetched=7200).age_seconds(7200) == 3600


@pytest.mark.parametrize("value", [-0.1, 3000.1, math.nan, math.inf, True, "50", None, 10**400])
def test_what_is_no_intensity_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"grams_per_kwh=.* allowed: 0 to 3000"):
        figure(value, None, None)


@given(times, times)
def test_a_figure_ends_after_it_begins(begin: float, end: float) -> None:
    if begin < end:
        assert figure(1, begin, end).covers(begin) and not figure(1, begin, end).covers(end)
    else:
        with pytest.raises(ValueError, match="later than"):
            figure(1, begin, end)


@pytest.mark.parametrize(
    ("key", "value"), [("method", "both"), ("basis", "mixed"), ("factors", "scope3"), ("method", None)]
)
def test_a_kind_names_the_key_that_is_wrong(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}={value!r} is not possible; allowed: "):
        Kind("FR", **{key: value})


def test_a_held_figure_says_that_it_is_a_stand_in() -> None:
    held = figure(50, 0, 3600).held()
    assert (held.grams_per_kwh, held.estimated, held.source) == (50, True, "made" + HELD)


tiles = st.lists(st.tuples(st.integers(1, 10_000), st.booleans(), grams), min_size=1, max_size=30)


def history(rows: list[tuple[int, bool, float]]) -> tuple[History, list[Intensity]]:
    """Stretches one after the other; a row that is not there leaves a gap."""
    at, found = 0.0, []
    for length, there, value in rows:
        if there:
            found.append(figure(value, at, at + length))
        at += length
    return History(found), found


@given(tiles, st.floats(-1000, 400_000))
def test_without_holding_a_moment_has_the_figure_that_covers_it_or_none(
    rows: list[tuple[int, bool, float]], moment: float
) -> None:
    found, figures = history(rows)
    assert found.at(moment) == next((one for one in figures if one.covers(moment)), None)


@given(tiles, st.floats(-1000, 400_000), st.floats(0, 50_000))
def test_a_moment_never_has_a_figure_of_later_or_of_too_long_ago(
    rows: list[tuple[int, bool, float]], moment: float, hold: float
) -> None:
    answer = history(rows)[0].at(moment, hold)
    if answer is not None:
        assert answer.valid_from_epoch_seconds is not None and answer.valid_to_epoch_seconds is not None
        assert answer.valid_from_epoch_seconds <= moment < answer.valid_to_epoch_seconds + hold or answer.covers(moment)
        assert answer.covers(moment) or (answer.estimated and answer.source.endswith(HELD))


@given(tiles, st.integers(1, 10))
def test_only_the_newest_figures_are_kept(rows: list[tuple[int, bool, float]], limit: int) -> None:
    figures = history(rows)[1]
    assert History(figures, limit).figures == tuple(figures[-limit:])


@given(grams, grams)
def test_a_later_word_on_the_same_hour_replaces_the_first(first: float, second: float) -> None:
    found = History([figure(first, 0, 3600)])
    found.add([figure(second, 0, 3600)])
    assert [one.grams_per_kwh for one in found.figures] == [second]


@given(st.floats(0, 6000))
def test_a_pound_per_megawatt_hour_is_a_thousandth_of_a_pound_per_kilowatt_hour(pounds: float) -> None:
    assert convert(pounds, "lb/MWh", "g/kWh") == pytest.approx(pounds * 0.45359237, rel=1e-12)
