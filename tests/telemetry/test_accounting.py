"""Accounting: what is stated is used, what is not is a marked stand-in or left open."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.telemetry.accounting import Accounting, HostShare

maybe = st.none() | st.floats(0, 5)


def test_without_an_intensity_the_world_average_stands_in_and_says_so() -> None:
    accounting = Accounting.from_values("FR", None, None, None)
    assert (accounting.grams_per_kwh, accounting.zone) == (475, "WORLD")
    assert (accounting.source, accounting.estimated) == ("default:world-average", True)


@given(st.none() | st.just("US-CAL-CISO"), st.floats(0, 3000), maybe, maybe)
def test_a_stated_intensity_is_taken_as_it_is(
    zone: str | None, grams: float, pue: float | None, overhead: float | None
) -> None:
    accounting = Accounting.from_values(zone, grams, pue, overhead)
    assert (accounting.grams_per_kwh, accounting.zone, accounting.source) == (grams, zone, "settings")
    assert not accounting.estimated
    assert (accounting.pue, accounting.node_overhead_ratio) == (pue, overhead)


def test_an_intensity_of_zero_is_stated_and_not_missing() -> None:
    assert Accounting.from_values("NO", 0.0, None, None).source == "settings"


@given(st.floats(0, 1e6), st.floats(0, 5), st.floats(0, 5), st.floats(1, 5))
def test_host_auxiliaries_and_site_are_each_counted_once(joules: float, host: float, more: float, pue: float) -> None:
    plain = Accounting.from_values("FR", 100.0, None, None).operational_grams(joules)
    whole = Accounting.from_values("FR", 100.0, pue, host, more).operational_grams(joules)
    assert whole == pytest.approx(plain * (1 + host) * (1 + more) * pue)


def test_a_measured_host_takes_the_place_of_nothing_stated_and_of_no_setting() -> None:
    silent, stated = Accounting.from_values("FR", 56, None, None), Accounting.from_values("FR", 56, None, 0.2)
    found = silent.with_host_measured(0.1, "rapl")
    assert (found.node_overhead_ratio, found.node_overhead_source) == (0.1, "rapl")
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
        share.see(host, devices, blind)
    assert share.ratio == pytest.approx((90 + 3) / (300 + 10))


def test_a_restarted_engine_begins_the_hosts_share_anew_without_a_negative_span() -> None:
    share = HostShare()
    for host, devices in ((0, 0), (30, 100), (1, 2), (4, 12)):
        share.see(host, devices, 0)
    assert share.ratio == pytest.approx(33 / 110)
