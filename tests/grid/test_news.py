"""When a server is asked: once a figure, just after the last one's end, and patiently where it is late."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.electricity_maps import ElectricityMapsFeed
from llmco2_vllm.grid.feed import Feed
from llmco2_vllm.grid.keys import Key
from llmco2_vllm.grid.live import LiveProvider
from llmco2_vllm.grid.server import Question, Server
from llmco2_vllm.grid.uk_carbon_intensity import UkCarbonIntensityFeed
from llmco2_vllm.grid.watttime import WattTimeFeed
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import HOUR, NOW, electricity_maps, electricity_maps_history, uk, watttime
from tests.grid.conftest import ENVIRONMENT, Opener
from tests.grid.server import Answer, Remote

LATEST, HISTORY = "/v3/carbon-intensity/latest", "/v3/carbon-intensity/history"
SPAN_SECONDS = 48 * 3600.0
ANSWER_SECONDS = 0.3
PERIODS = {"electricity-maps": 3600.0, "watttime": 300.0, "uk-carbon-intensity": 1800.0}


class PublishingServer(Server):
    """Has each figure ``late_seconds`` after its begin; an answer takes a moment. clock: stands still otherwise."""

    def __init__(self, clock: FakeClock, period_seconds: float, late_seconds: float = 0.0) -> None:
        super().__init__("https://host", clock)
        self.asked = 0
        self._time, self._period_seconds, self._late_seconds = clock, period_seconds, late_seconds

    async def get(self, question: Question) -> Any:
        self.asked += 1
        begin = (self._time() - self._late_seconds) // self._period_seconds * self._period_seconds
        self._time.advance(ANSWER_SECONDS)
        if question.path == LATEST:
            return electricity_maps(begin)
        if question.path == HISTORY:
            return electricity_maps_history()
        if question.path == "/login":
            return {"token": "token-1"}
        if question.path.startswith("/v3/"):
            return watttime([(begin, 1000)])
        return {"data": [uk(begin, 146, None)]}


def feed_of(name: str, server: Server) -> Feed:
    if name == "electricity-maps":
        return ElectricityMapsFeed(server, "DE", Key("ELECTRICITY_MAPS_API_KEY", None, ENVIRONMENT))
    if name == "uk-carbon-intensity":
        return UkCarbonIntensityFeed(server)
    keys = [Key(variable, None, ENVIRONMENT) for variable in ("WATTTIME_USER", "WATTTIME_PASSWORD")]
    return WattTimeFeed(server, "CAISO_NORTH", *keys)


def live_through(chain: Chain, clock: FakeClock) -> float:
    """Rounds for the whole span. Returns seconds in which the figure of now was not the one of its own time."""
    until, missed = clock() + SPAN_SECONDS, 0.0
    while clock() < until:
        before = clock()
        wait = asyncio.run(chain.refresh())
        # While an answer is on its way nothing is known for certain: all of it counts.
        missed += clock() - before
        figure, end = chain.current, clock() + wait
        known = clock() if figure is None else min(max(clock(), figure.valid_to_epoch_seconds or 0.0), end)
        missed += end - known
        clock.advance(wait)
    return missed


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", PERIODS)
def test_each_figure_is_known_for_its_own_time_and_asked_for_about_once(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmco2_vllm.grid.live.process_share", lambda: share)
    clock, period = FakeClock(NOW + 137.0), PERIODS[name]
    server = PublishingServer(clock, period)
    missed = live_through(Chain([LiveProvider(feed_of(name, server))], clock), clock)
    assert missed / SPAN_SECONDS < 0.03
    assert server.asked <= 2.5 * SPAN_SECONDS / period


@pytest.mark.parametrize("name", PERIODS)
def test_a_source_that_is_late_each_time_is_neither_missed_for_long_nor_pressed(name: str) -> None:
    clock, period = FakeClock(NOW), PERIODS[name]
    server = PublishingServer(clock, period, late_seconds=0.2 * period)
    missed = live_through(Chain([LiveProvider(feed_of(name, server))], clock), clock)
    assert 0.2 < missed / SPAN_SECONDS < 0.4
    # Great Britain is two questions each time.
    assert server.asked <= (7 if name == "uk-carbon-intensity" else 3.5) * SPAN_SECONDS / period


def test_a_source_that_has_stopped_is_asked_once_a_period_in_the_end() -> None:
    clock = FakeClock(NOW)
    server = PublishingServer(clock, 1e6)
    provider = LiveProvider(feed_of("electricity-maps", server))
    waits = []
    for _ in range(7):
        waits.append(asyncio.run(provider.refresh(clock())))
        clock.advance(waits[-1] or 0.0)
    assert waits == [360, 720, 1440, 2880, 3600, 3600, 3600]


async def test_processes_ask_at_different_moments(
    remote: Remote, opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remote.on(LATEST, electricity_maps())
    waits = []
    for number in range(8):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("os.getpid", lambda number=number: 4000 + number)
            chain = opened("electricity-maps", cache=tmp_path / str(number))
            await chain.refresh()
            waits.append(chain.state()["links"][0]["next_seconds"])
    gaps = [later - earlier for earlier, later in zip(sorted(waits), sorted(waits)[1:], strict=False)]
    assert min(waits) >= HOUR + 3600 - NOW and max(waits) <= HOUR + 3600 - NOW + 60
    assert min(gaps) > 2


async def test_what_another_front_end_has_asked_in_vain_just_now_is_not_asked_again(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on(LATEST, electricity_maps())
    chains = [opened("electricity-maps") for _ in range(2)]
    for at, asked in ((NOW, 1), (HOUR + 3600 + 60, 2), (HOUR + 3600 + 100, 2), (HOUR + 3600 + 600, 3)):
        clock.now_seconds = at
        for chain in chains:
            await chain.refresh()
        assert remote.paths().count(LATEST) == asked


async def test_a_restart_in_the_same_hour_asks_nobody(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps())
    await opened("electricity-maps").refresh()
    asked = len(remote.asked)
    clock.advance(2900)
    again = opened("electricity-maps")
    await again.refresh()
    assert len(remote.asked) == asked
    clock.advance(200)
    await again.refresh()
    assert len(remote.asked) > asked


@pytest.mark.parametrize("seconds", [5, 7200])
async def test_retry_after_is_kept_to_also_where_the_answer_could_be_done_without(
    seconds: int, remote: Remote, opened: Opener
) -> None:
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, Answer({}, 429, {"Retry-After": str(seconds)}))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.source == "electricity-maps"
    next_seconds = chain.state()["links"][0]["next_seconds"]
    assert next_seconds == 7200 if seconds == 7200 else 3000 < next_seconds < 3060


async def test_retry_after_is_kept_to_also_where_another_answer_was_the_failure(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps(value=None))
    remote.on(HISTORY, Answer({}, 429, {"Retry-After": "7200"}))
    chain = opened("electricity-maps")
    await chain.refresh()
    link = chain.state()["links"][0]
    assert (link["failures"], link["next_seconds"]) == (1, 7200)
