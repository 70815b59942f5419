"""What is not believed of an answer or a file: another zone, a time that cannot be, another address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.intensity import Intensity, Kind
from llmco2_vllm.grid.cache import Cache
from llmco2_vllm.grid.history import History
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import HOUR, NOW, electricity_maps, electricity_maps_history, uk, watttime
from tests.grid.conftest import Opener
from tests.grid.server import Remote

LATEST, HISTORY = "/v3/carbon-intensity/latest", "/v3/carbon-intensity/history"


async def test_a_row_of_another_zone_is_refused_and_the_others_are_not(remote: Remote, opened: Opener) -> None:
    history = electricity_maps_history()
    history["history"][-3]["zone"] = "PL"
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, history)
    chain = opened("electricity-maps")
    await chain.refresh()
    sources = [one and one.source for one in (chain.at(HOUR - 3600 * back) for back in (2, 3, 4))]
    assert sources == ["electricity-maps", "electricity-maps:held", "electricity-maps"]


async def test_a_history_whose_rows_are_all_of_another_zone_gives_nothing(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, electricity_maps_history(zone="PL"))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.grams_per_kwh == 302
    assert chain.state()["links"][0]["figures"] == 1


async def test_latest_wins_over_the_history_of_the_same_hour(remote: Remote, opened: Opener) -> None:
    history = electricity_maps_history()
    history["history"].append(electricity_maps(HOUR, 555, isEstimated=False))
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, history)
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and (chain.current.grams_per_kwh, chain.current.estimated) == (302, True)


@pytest.mark.parametrize(
    ("provider", "period", "answers"),
    [
        ("electricity-maps", 3600, lambda begin: {LATEST: electricity_maps(begin)}),
        ("watttime", 300, lambda begin: {"/login": {"token": "t"}, "/v3/forecast": watttime([(begin, 1000)])}),
        ("uk-carbon-intensity", 1800, lambda begin: {"/intensity": {"data": [uk(begin, 146, None)]}}),
    ],
)
async def test_a_figure_that_begins_more_than_one_period_ahead_is_dropped(
    provider: str, period: float, answers: Any, remote: Remote, opened: Opener, clock: FakeClock, tmp_path: Path
) -> None:
    clock.now_seconds = HOUR
    kept = []
    for ahead in (period, period + 60):
        for path, content in answers(HOUR + ahead).items():
            remote.on(path, content)
        chain = opened(provider, cache=tmp_path / str(ahead))
        await chain.refresh()
        kept.append((chain.state()["links"][0]["figures"], chain.state()["links"][0]["failures"]))
    assert kept == [(1, 0), (0, 1)]


async def test_a_figure_of_the_next_hour_does_not_hide_that_of_now(remote: Remote, opened: Opener) -> None:
    later = [uk(HOUR + 1800 * n, 200 + n, None) for n in range(1, 48)]
    remote.on("/intensity", {"data": [uk(HOUR, 146, None), *later]})
    chain = opened("uk-carbon-intensity")
    await chain.refresh()
    assert chain.current is not None and chain.current.grams_per_kwh == 146
    assert chain.state()["links"][0]["figures"] == 2


def figure(begin: float, seconds: float = 60.0, fetched: float = NOW) -> Intensity:
    return Intensity(
        5, "DE", "average", "location", "electricity-maps", False, begin, begin + seconds, fetched, "lifecycle"
    )


@given(st.sets(st.integers(0, 100), max_size=60), st.integers(0, 100), st.integers(1, 10))
def test_the_limit_never_drops_the_figure_of_now_and_keeps_as_many_as_it_may(
    begins: set[int], now: int, limit: int
) -> None:
    history = History(limit=limit)
    history.add([figure(float(begin)) for begin in begins], float(now))
    past = [begin for begin in begins if begin <= now]
    found = history.before(float(now))
    assert (found and found.valid_from_epoch_seconds) == (float(max(past)) if past else None)
    assert len(history) == min(limit, len(begins))


async def test_another_address_of_the_same_api_has_figures_of_its_own(
    remote: Remote, opened: Opener, tmp_path: Path
) -> None:
    remote.on(LATEST, electricity_maps())
    remote.on("/proxy" + LATEST, electricity_maps(value=50))
    for path in ("", "/proxy", "/proxy/"):
        await opened("electricity-maps", provider_url=remote.base_url + path).refresh()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    grams = [opened("electricity-maps", provider_url=remote.base_url + path).current for path in ("", "/proxy/")]
    assert [one and one.grams_per_kwh for one in grams] == [302, 50]


def test_the_providers_own_address_has_the_plain_name_however_it_is_written(opened: Opener, tmp_path: Path) -> None:
    kind = Kind("DE", "average", "location", "lifecycle")
    Cache(tmp_path / "cache", "electricity-maps", kind).write([figure(HOUR, 3600.0)])
    urls = (None, "https://api.electricitymaps.com", "https://api.electricitymaps.com/", "https://api.elsewhere.com")
    found = [opened("electricity-maps", provider_url=url).current for url in urls]
    assert [one and one.source for one in found] == ["electricity-maps"] * 3 + ["static:2023"]


@pytest.mark.parametrize(
    ("kept", "believed"),
    [
        (figure(HOUR, 3600.0, NOW), True),
        (figure(HOUR, 3600.0, NOW + 60), True),
        (figure(HOUR, 3600.0, NOW + 600), False),
        (figure(HOUR, 4 * 3600.0, NOW), True),
        (figure(HOUR, 30 * 86400.0, NOW), False),
        (figure(HOUR, float("inf"), NOW), False),
        (figure(HOUR, 3600.0, float("nan")), False),
        (figure(NOW + 7200, 3600.0, NOW), False),
    ],
)
def test_a_file_whose_times_cannot_be_is_not_believed(
    kept: Intensity, believed: bool, opened: Opener, tmp_path: Path
) -> None:
    Cache(tmp_path / "cache", "electricity-maps", kept.kind).write([kept])
    chain = opened("electricity-maps", provider_url=None)
    assert (chain.state()["links"][0]["figures"] == 1) == believed


async def test_a_file_fetched_in_the_future_does_not_spare_the_question(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on(LATEST, electricity_maps())
    clock.advance(3000)
    await opened("electricity-maps").refresh()
    clock.advance(-3000)
    await opened("electricity-maps").refresh()
    assert remote.paths().count(LATEST) == 2
