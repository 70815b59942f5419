"""Accounting: what is stated is used, what is not is a marked stand-in or left open."""

from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.telemetry.accounting import Accounting

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
