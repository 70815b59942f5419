import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core import units


def test_one_kilowatt_for_one_hour_is_one_kwh() -> None:
    assert units.joules_to_kwh(1000 * 3600) == 1.0
    assert units.kwh_per_hour_to_watts(1.0) == 1000.0


def test_prefixes_are_decimal() -> None:
    assert (units.mega(1), units.giga(1), units.tera(1)) == (1e6, 1e9, 1e12)
    assert units.kilograms_to_grams(1.5) == 1500.0


@given(st.floats(0, 1e12))
def test_small_prefixes_undo_large_ones(value: float) -> None:
    assert units.micro(units.mega(value)) == pytest.approx(value)
    assert units.milli(units.kilograms_to_grams(value)) == pytest.approx(value)
    assert units.micro(units.kilograms_to_grams(value)) == pytest.approx(units.milli(value))


@given(st.floats(1e-9, 1e12))
def test_joules_survive_the_way_to_kwh_and_back(energy_joules: float) -> None:
    back = units.kwh_to_joules(units.joules_to_kwh(energy_joules))
    assert abs(back - energy_joules) <= 1e-12 * energy_joules
