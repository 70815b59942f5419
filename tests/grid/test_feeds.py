"""Each provider's answers become figures of its kind, for the hour they speak of."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from llmco2_vllm.testing import FakeClock
from tests.grid.answers import HOUR, NOW, electricity_maps, electricity_maps_history, uk, watttime, when
from tests.grid.conftest import PASSWORD, SECRET, Opener
from tests.grid.server import Answer, Remote

LATEST, HISTORY = "/v3/carbon-intensity/latest", "/v3/carbon-intensity/history"
FORECAST, HISTORICAL = "/v3/forecast", "/v3/historical"
HALF = HOUR  # 15:00 also begins a half-hour


async def test_electricity_maps_gives_the_hour_and_the_day_before_it(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, electricity_maps_history())
    chain = opened("electricity-maps")
    await chain.refresh()
    figure = chain.current
    assert figure is not None
    assert (figure.grams_per_kwh, figure.zone, figure.source, figure.estimated) == (302, "DE", "electricity-maps", True)
    assert (figure.method, figure.basis, figure.factors) == ("average", "location", "lifecycle")
    assert (figure.valid_from_epoch_seconds, figure.valid_to_epoch_seconds) == (HOUR, HOUR + 3600)
    assert figure.fetched_epoch_seconds == NOW and figure.age_seconds(NOW + 60) == 60
    past = chain.at(HOUR - 5 * 3600 + 1)
    assert past is not None and (past.grams_per_kwh, past.estimated) == (305, False)


async def test_electricity_maps_is_asked_with_the_key_and_never_for_the_callers_own_place(
    remote: Remote, opened: Opener
) -> None:
    remote.on(LATEST, electricity_maps(emissionFactorType="direct"))
    remote.on(HISTORY, electricity_maps_history(emissionFactorType="direct"))
    chain = opened("electricity-maps", factors="direct")
    await chain.refresh()
    asked = remote.asked[0]
    assert asked.headers["auth-token"] == SECRET
    assert asked.parameters == {
        "zone": "DE",
        "emissionFactorType": "direct",
        "shouldUseFallbackCallerLookup": "false",
    }
    assert chain.current is not None and chain.current.factors == "direct"


async def test_a_plan_without_history_still_has_the_figure_of_now(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps())
    remote.on(HISTORY, Answer({"error": "not in your plan"}, 403))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.grams_per_kwh == 302


async def test_missed_hours_are_asked_for_and_only_then(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps(), electricity_maps(HOUR + 3600), electricity_maps(HOUR + 5 * 3600))
    remote.on(HISTORY, electricity_maps_history())
    chain = opened("electricity-maps")
    asked = []
    for hours in (1, 5, 0):
        await chain.refresh()
        asked.append(remote.paths().count(HISTORY))
        clock.advance(hours * 3600)
    assert asked == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": None}, "carbonIntensity is null: not known yet for zone DE"),
        ({"value": -4}, "carbonIntensity=-4 is not possible; allowed: 0 to 3000"),
        ({"value": "302"}, "carbonIntensity=str is not possible"),
        ({"zone": "US-CAL-CISO"}, "another zone was answered than 'DE'"),
        ({"emissionFactorType": "direct"}, "emissionFactorType is not 'lifecycle' as asked for"),
        ({"temporalGranularity": "yearly"}, "temporalGranularity is none of 5_minutes, 15_minutes, hourly"),
        ({"datetime": "2026-03-14T15:00:00"}, "datetime does not say its time zone"),
        ({"datetime": "yesterday"}, "datetime is no ISO 8601 time"),
        ({"datetime": 5}, "the answer has no 'datetime' as expected"),
    ],
)
async def test_an_answer_that_is_not_as_asked_for_is_no_figure(
    change: dict[str, Any], reason: str, remote: Remote, opened: Opener
) -> None:
    remote.on(LATEST, electricity_maps(**change))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.source == "static:2023"
    assert reason in chain.state()["links"][0]["reason"]


async def test_watttime_logs_in_and_pounds_become_grams(remote: Remote, opened: Opener) -> None:
    remote.on("/login", {"token": "token-1"})
    remote.on(FORECAST, watttime([(NOW - 60, 1000), (NOW + 240, 2000)]))
    remote.on(HISTORICAL, watttime([(NOW - 360, 500), (NOW - 660, None)]))
    chain = opened("watttime")
    await chain.refresh()
    figure = chain.current
    assert figure is not None and figure.grams_per_kwh == pytest.approx(453.59237)
    assert (figure.method, figure.zone, figure.factors) == ("marginal", "CAISO_NORTH", "direct")
    assert (figure.source, figure.estimated) == ("watttime:co2_moer", True)
    past = chain.at(NOW - 300)
    assert past is not None and (past.grams_per_kwh, past.estimated) == (pytest.approx(226.796185), False)
    sent = remote.asked[0].headers["authorization"].removeprefix("Basic ")
    assert base64.b64decode(sent).decode() == f"somebody:{PASSWORD}"
    assert remote.asked[1].headers["authorization"] == "Bearer token-1"
    assert remote.asked[1].parameters == {"region": "CAISO_NORTH", "signal_type": "co2_moer", "horizon_hours": "0"}


async def test_watttime_keeps_its_token_and_replaces_one_that_has_run_out(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on("/login", {"token": "token-1"}, {"token": "token-2"}, {"token": "token-3"})
    remote.on(FORECAST, watttime([(NOW, 1000)]))
    chain = opened("watttime")
    for seconds in (400, 400, 1800):
        await chain.refresh()
        clock.advance(seconds)
    assert remote.paths().count("/login") == 1
    await chain.refresh()
    assert remote.paths().count("/login") == 2
    remote.on(FORECAST, Answer({}, 401), watttime([(NOW + 3000, 2000)]))
    clock.advance(400)
    await chain.refresh()
    assert remote.paths().count("/login") == 3
    assert chain.current is not None and chain.current.grams_per_kwh == pytest.approx(907.18474)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"units": "kg_co2_per_mwh"}, "meta.units is not 'lbs_co2_per_mwh' as asked for"),
        ({"units": None}, "meta.units is not 'lbs_co2_per_mwh'"),
        ({"region": "PJM_DC"}, "meta.region is not 'CAISO_NORTH' as asked for"),
        ({"signal_type": "co2_aoer"}, "meta.signal_type is not 'co2_moer' as asked for"),
    ],
)
async def test_another_unit_region_or_signal_is_refused(
    change: dict[str, Any], reason: str, remote: Remote, opened: Opener
) -> None:
    remote.on("/login", {"token": "token-1"})
    remote.on(FORECAST, watttime([(NOW, 1000)], **change))
    chain = opened("watttime")
    await chain.refresh()
    assert chain.current is None
    assert reason in chain.state()["links"][0]["reason"]


async def test_a_marginal_figure_that_is_missing_stays_unknown(remote: Remote, opened: Opener) -> None:
    remote.on("/login", Answer({}, 401))
    chain = opened("watttime")
    await chain.refresh()
    assert chain.current is None and chain.at(NOW) is None
    assert [link["method"] for link in chain.state()["links"]] == ["marginal"]


async def test_great_britain_has_the_actual_value_and_else_the_forecast(remote: Remote, opened: Opener) -> None:
    remote.on("/intensity", {"data": [uk(HALF, 146, None)]})
    remote.on("/intensity/*", {"data": [uk(HALF - 3600, 140, 151), uk(HALF - 1800, 141, None), uk(HALF, 139, None)]})
    chain = opened("uk-carbon-intensity")
    await chain.refresh()
    figures = [chain.at(HALF - 3600), chain.at(HALF - 1), chain.current]
    assert [(one.grams_per_kwh, one.estimated) for one in figures if one] == [(151, False), (141, True), (146, True)]
    assert chain.current is not None
    assert (chain.current.zone, chain.current.factors, chain.current.method) == ("GB", "direct", "average")
    assert remote.asked[1].path == "/intensity/2026-03-13T15:10Z/2026-03-14T15:10Z"


async def test_a_forecast_is_replaced_when_the_actual_value_comes(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on("/intensity", {"data": [uk(HALF, 146, None)]}, {"data": [uk(HALF + 1800, 120, None)]})
    remote.on("/intensity/*", {"data": []}, {"data": [uk(HALF, 146, 159)]})
    chain = opened("uk-carbon-intensity")
    await chain.refresh()
    clock.advance(2000)
    await chain.refresh()
    past = chain.at(NOW)
    assert past is not None and (past.grams_per_kwh, past.estimated) == (159, False)
    assert remote.paths()[-1].startswith("/intensity/2026-03-14T13:00Z/")


async def test_two_nulls_are_no_figure_of_zero(remote: Remote, opened: Opener) -> None:
    remote.on("/intensity", {"data": [uk(HALF, None, None)]})
    remote.on("/intensity/*", {"data": []})
    chain = opened("uk-carbon-intensity")
    await chain.refresh()
    assert chain.current is None
    assert "forecast and actual are null" in chain.state()["links"][0]["reason"]


def test_the_answers_of_the_tests_speak_of_the_hour_of_the_tests() -> None:
    assert when(HOUR) == "2026-03-14T15:00:00.000Z"
