"""Accounting: what is stated is used, what is not is a marked stand-in or left open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.config import ConfigError
from llmco2_vllm.core.embodied import Hardware, Lifetimes
from llmco2_vllm.core.intensity import Intensity
from llmco2_vllm.telemetry.accounting import Accountant, Accounting, HostShare, Node
from tests.telemetry.books import accountant, accounting, with_hardware

maybe = st.none() | st.floats(0, 5)
HOUR = 3600.0


def hours(*grams: float | None) -> list[Intensity | None]:
    return [
        None if g is None else Intensity(g, "FR", "average", "location", f"hour {n}", False, n * HOUR, (n + 1) * HOUR)
        for n, g in enumerate(grams)
    ]


class Hours:
    """A grid whose intensity changes by the hour."""

    def __init__(self, *grams: float | None) -> None:
        self.figures = hours(*grams)

    def between(self, begin_epoch_seconds: float, end_epoch_seconds: float) -> list[tuple[Intensity | None, float]]:
        if begin_epoch_seconds == end_epoch_seconds:
            return [(self.figures[int(begin_epoch_seconds // HOUR)], 0.0)]
        found = []
        for number, figure in enumerate(self.figures):
            begin, end = max(number * HOUR, begin_epoch_seconds), min((number + 1) * HOUR, end_epoch_seconds)
            if begin < end:
                found.append((figure, end - begin))
        return found

    def state(self) -> dict[str, object]:
        return {}

    async def run(self) -> None:
        return None


def test_without_an_intensity_the_world_average_stands_in_and_says_so() -> None:
    found = accounting().intensity
    assert found is not None
    assert (found.grams_per_kwh, found.zone) == (475, "WORLD")
    assert (found.source, found.estimated) == ("default:world-average", True)


@given(st.none() | st.just("US-CAL-CISO"), st.floats(0, 3000), st.none() | st.floats(1, 5), maybe)
def test_a_stated_intensity_is_taken_as_it_is(
    zone: str | None, grams: float, pue: float | None, overhead: float | None
) -> None:
    found = accounting(zone, grams, pue, overhead)
    assert found.intensity is not None
    assert (found.intensity.grams_per_kwh, found.intensity.zone, found.intensity.source) == (grams, zone, "settings")
    assert not found.intensity.estimated
    assert (found.node.pue, found.node.host_ratio) == (pue, overhead)


def test_a_zone_alone_gives_the_average_of_its_last_year() -> None:
    found = accounting("FR").intensity
    assert found is not None and found.zone == "FR" and found.estimated
    assert found.source.startswith("static:20") and 10 < found.grams_per_kwh < 120


def test_an_intensity_of_zero_is_stated_and_not_missing() -> None:
    found = accounting("NO", 0.0)
    assert found.intensity is not None and found.intensity.source == "settings"
    assert found.operational_grams(1e6) == 0.0


def test_a_region_gives_zone_and_pue_and_a_setting_goes_before_it() -> None:
    found = accountant(region="aws:eu-west-3").now()
    assert found.intensity is not None and found.intensity.zone == "FR"
    assert found.node.pue is not None and found.node.pue >= 1 and found.node.pue_source not in (None, "settings")
    stated = accountant(region="aws:eu-west-3", pue=1.5).now().node
    assert (stated.pue, stated.pue_source) == (1.5, "settings")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"zone": "XX"}, "zone='XX'"),
        ({"zone": "FR", "region": "aws:eu-west-3"}, "region="),
        ({"region": "aws:mars-1"}, "region='aws:mars-1'"),
        ({"provider": "electricity-maps", "zone": "FR"}, "key: none in the variable ELECTRICITY_MAPS_API_KEY"),
        ({"provider": "electricity-maps"}, "zone is missing"),
        ({"provider": "watttime", "zone": "CAISO_NORTH"}, "WATTTIME"),
        ({"provider": "file"}, "intensity_file is missing"),
        ({"intensity": 56, "provider": "static"}, "intensity and provider static are both there"),
        ({"zone": "FR", "intensity_method": "marginal"}, "intensity_method='marginal' is not possible"),
        ({"zone": "FR", "intensity_factors": "direct"}, "intensity_factors='direct'"),
        ({"provider": "uk-carbon-intensity", "intensity_factors": "lifecycle"}, "intensity_factors='lifecycle'"),
        ({"intensity": 56, "intensity_method": "marginal", "market_intensity": 9}, "market_intensity stands beside an"),
        ({"embodied_idle": "busy"}, "utilisation is missing"),
        ({"zone": "FR", "provider_url": "http://localhost"}, "provider_url and provider static are both there"),
        ({"intensity_file": "no/such.csv"}, "no/such.csv"),
        ({"provider": "constant"}, "intensity is missing"),
        ({"provider": "uk-carbon-intensity", "zone": "FR"}, "zone='FR'"),
    ],
)
def test_what_cannot_be_is_one_line_at_start(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accountant(**settings)
    assert word in str(caught.value) and "\n" not in str(caught.value)


@given(st.floats(0, 1e6), st.floats(0, 5), st.floats(0, 5), st.floats(1, 5))
def test_host_auxiliaries_and_site_are_each_counted_once(joules: float, host: float, more: float, pue: float) -> None:
    plain = accounting("FR", 100.0).operational_grams(joules)
    whole = accounting("FR", 100.0, pue, host, more).operational_grams(joules)
    assert plain is not None
    assert whole == pytest.approx(plain * (1 + host) * (1 + more) * pue)


@given(st.floats(0, 7200), st.floats(1, 7200))
def test_energy_is_multiplied_by_the_intensity_of_the_hours_in_which_it_was_used(begin: float, seconds: float) -> None:
    end = min(begin + seconds, 3 * HOUR)
    grid = Hours(100.0, 400.0, 40.0)
    found = Accountant(grid).over(begin, end)
    parts = grid.between(begin, end)
    # Even power over the span: joules of each hour times the intensity of that hour.
    by_hour = sum(3.6e6 * length / (end - begin) / 3.6e6 * f.grams_per_kwh for f, length in parts if f is not None)
    assert found.operational_grams(3.6e6) == pytest.approx(by_hour)


def test_an_unknown_hour_makes_the_grams_unknown_and_not_smaller() -> None:
    accountant = Accountant(Hours(100.0, None, 40.0))
    assert accountant.over(0, 10).operational_grams(1.0) is not None
    assert accountant.over(HOUR, HOUR + 1).operational_grams(1.0) is None
    assert accountant.over(HOUR - 5, HOUR + 5).operational_grams(1.0) is None


def test_the_turn_of_an_hour_names_both_sources() -> None:
    found = Accountant(Hours(100.0, 400.0)).over(HOUR - 900, HOUR + 2700).intensity
    assert found is not None
    assert (found.grams_per_kwh, found.source) == (pytest.approx(325.0), "hour 0 + hour 1")


def test_contracts_stand_beside_the_grid_and_never_in_its_place() -> None:
    found = with_hardware(400.0, market_intensity=10)
    grid, market = found.operational_grams(3.6e6), found.market_grams(3.6e6)
    assert (grid, market) == (pytest.approx(400.0), pytest.approx(10.0))
    assert accounting("FR", 400.0).market_grams(1.0) is None


@given(st.floats(0, 1e6), st.floats(0.01, 1))
def test_embodied_carbon_is_of_time_and_carries_idle_time_only_by_policy(seconds: float, utilisation: float) -> None:
    line = Accounting(None, hardware=Hardware("product", 0.01, Lifetimes()), utilisation_ratio=utilisation)
    busy = Accounting(None, hardware=Hardware("product", 0.01, Lifetimes(), "busy"), utilisation_ratio=utilisation)
    assert line.embodied_grams(seconds) == pytest.approx(0.01 * seconds)
    assert busy.embodied_grams(seconds) == pytest.approx(0.01 * seconds / utilisation)


def test_a_measured_host_takes_the_place_of_nothing_stated_and_of_no_setting() -> None:
    silent, stated = Node(), Node.stated(None, 0.2, None)
    found = silent.with_host_measured(0.1, "rapl")
    assert (found.host_ratio, found.host_source) == (0.1, "rapl")
    assert stated.with_host_measured(0.1, "rapl") is stated
    assert silent.with_host_measured(None, "rapl") is silent


def test_the_hosts_share_is_that_of_the_time_in_which_both_meters_ran() -> None:
    share = HostShare()
    assert share.ratio is None
    for host, devices, blind in (
        (0, 0, 0),
        (30, 100, 0),
        (90, 300, 0),
        (5000, 300, 60),
        (5100, 310, 90),
        (5103, 320, 90),
    ):
        share.see(host, devices, blind, 0.0)
    assert share.ratio == pytest.approx((90 + 3) / (300 + 10))


def test_what_the_host_took_while_nobody_asked_is_not_for_those_who_ask_later() -> None:
    share = HostShare()
    host = devices = now = 0.0
    for seconds, watts, device_watts in ((9 * 3600, 200, 70), (3600, 250, 600)):
        for _ in range(seconds // 5):
            host, devices, now = host + 5 * watts, devices + 5 * device_watts, now + 5
            share.see(host, devices, 0.0, now)
    assert share.ratio == pytest.approx(250 / 600, rel=1e-3)


def test_a_restarted_engine_begins_the_hosts_share_anew_without_a_negative_span() -> None:
    share = HostShare()
    for host, devices in ((0, 0), (30, 100), (1, 2), (4, 12)):
        share.see(host, devices, 0, 0.0)
    assert share.ratio == pytest.approx(33 / 110)
