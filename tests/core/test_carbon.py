"""Carbon equations: published worked examples and the laws behind them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.carbon import host_joules, operational_grams, sci_grams

joules = st.floats(0, 1e9)
intensity = st.floats(0, 3000)
pue = st.floats(1, 5)


def test_a_thousand_joules_at_400_grams_and_a_pue_of_1_2_emit_0_1333_grams() -> None:
    assert operational_grams(1000, 400, 1.2) == pytest.approx(0.13333, rel=1e-4)


def test_one_kilowatt_hour_emits_the_intensity() -> None:
    assert operational_grams(3.6e6, 475) == pytest.approx(475)


@given(joules, joules, intensity, pue)
def test_grams_add_up_over_energy(first: float, second: float, grams: float, site: float) -> None:
    together = operational_grams(first + second, grams, site)
    assert together == pytest.approx(operational_grams(first, grams, site) + operational_grams(second, grams, site))


@given(joules, intensity, pue)
def test_a_site_never_emits_less_than_its_it_load(energy: float, grams: float, site: float) -> None:
    assert operational_grams(energy, grams, site) >= operational_grams(energy, grams)


@given(joules)
def test_no_overhead_adds_no_energy(energy: float) -> None:
    assert host_joules(energy, 0) == 0


@given(joules, st.floats(0, 5))
def test_the_host_takes_its_ratio_of_the_device(energy: float, ratio: float) -> None:
    assert energy + host_joules(energy, ratio) == pytest.approx(energy * (1 + ratio))


def test_sci_adds_embodied_to_operational_and_divides_by_the_functional_unit() -> None:
    # SCI for AI, worked example: 6500 kg over 50e9 tokens are 130 g per million.
    assert sci_grams(6.0e6, 0.5e6, 50e9 / 1e6) == pytest.approx(130.0)
    with pytest.raises(ValueError, match="functional_units"):
        sci_grams(1.0, 1.0, 0.0)
