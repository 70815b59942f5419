"""Embodied carbon: published figures reproduced, the laws of sharing, and a catalog with a source for every figure."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import llmco2_vllm
from llmco2_vllm.core import embodied_catalog, units
from llmco2_vllm.core.carbon import operational_grams
from llmco2_vllm.core.embodied import (
    MODELS,
    EmbodiedModel,
    Fab,
    Holding,
    IdlePolicy,
    Lifetimes,
    act_node,
    board_grams,
    chip_grams,
    cooling_grams,
    device_footprint,
    die_grams,
    die_grams_per_cm2,
    embodied_grams,
    engine_hardware,
    grams_per_busy_second,
    grams_per_second,
    host_share,
    lifetime_seconds,
    memory_grams,
    package_grams,
    power_delivery_grams,
    split_idle,
    ssd_grams,
)
from llmco2_vllm.core.embodied_catalog import STATUSES, constant, constants, names_in, sources
from llmco2_vllm.core.hardware import device_by_name, device_names
from llmco2_vllm.core.units import convert

CATALOG = Path(llmco2_vllm.__file__).parent / "data" / "embodied.toml"
UNITS = sorted(units._UNITS)
ACT_NODES = names_in("act.energy-per-area")

grams = st.floats(0, 1e9)
seconds = st.floats(0, 1e8)
years = st.floats(3, 5)
ratio = st.floats(0, 1)
policies = st.sampled_from(get_args(IdlePolicy))
holdings = st.lists(st.builds(Holding, grams, years, st.floats(0, 1e4)), max_size=6)


# ------------------------------------------------------------------------------------------------------ the catalog


def tables(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every table of the catalog that is no group of tables, with its path."""
    for name, value in node.items():
        if isinstance(value, dict) and name not in ("source", "values"):
            yield from [(f"{path}{name}", value)] if "unit" in value else tables(value, f"{path}{name}.")


def document() -> dict[str, Any]:
    return tomllib.loads(CATALOG.read_text("utf-8"))


@pytest.mark.parametrize(
    ("path", "row"), list(tables(document())), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_shipped_constant_has_a_source_a_year_a_unit_and_a_status(path: str, row: Mapping[str, Any]) -> None:
    assert ("value" in row) != ("values" in row)
    assert row["source"] in sources()
    assert isinstance(row["year"], int) and 2010 <= row["year"] <= 2026
    assert row["status"] in STATUSES
    assert units._resolve(row["unit"])


def test_no_number_of_the_catalog_stands_outside_of_a_constant() -> None:
    def numbers(node: Any, path: str, inside: bool) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from numbers(value, f"{path}.{name}", inside or "unit" in node)
        elif isinstance(node, (int, float)) and not inside:
            yield path

    assert list(numbers(document(), "", False)) == [".schema"]


def test_every_constant_of_the_file_can_be_read_and_no_other() -> None:
    expected = {
        f"{path}.{name}" if name else path for path, row in tables(document()) for name in row.get("values", {"": 0})
    }
    assert set(constants()) == expected


@pytest.mark.parametrize("key", sources())
def test_every_source_says_what_it_is_where_it_is_and_its_licence_and_is_used(key: str) -> None:
    row = sources()[key]
    assert row["title"] and row["url"].startswith("https://") and row["licence"]
    assert any(found.source == key for found in constants().values())
    if row["licence"] in ("MIT", "Apache-2.0"):
        assert row["notice"]


def test_devices_of_the_catalog_are_devices_of_the_device_catalog() -> None:
    named = {device for found in constants().values() for device in found.facts.get("devices", ())}
    assert named and named <= set(device_names())


def test_an_unknown_constant_is_an_error_that_lists_its_neighbours() -> None:
    with pytest.raises(ValueError, match="'tape' is not in the catalog; allowed: ssd, hdd"):
        constant("storage.power.tape")


def test_a_constant_cannot_be_read_in_a_unit_of_another_dimension() -> None:
    with pytest.raises(ValueError, match=r"component.ssd: unit 'kg/GB' is mass per data, 'g/part' is mass per count"):
        constant("component.ssd").to("g/part")


# ------------------------------------------------------------------------------------------------------------ units


@given(st.floats(1e-6, 1e12), st.sampled_from(UNITS), st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_a_unit_converts_there_and_back_or_not_at_all(value: float, unit: str, other: str, below: str) -> None:
    if units._UNITS[unit][0] != units._UNITS[other][0]:
        for pair in ((unit, other), (f"{unit}/{below}", f"{other}/{below}")):
            with pytest.raises(ValueError, match="no conversion"):
                convert(value, *pair)
        return
    assert convert(convert(value, unit, other), other, unit) == pytest.approx(value)
    assert convert(value, f"{unit}/{below}", f"{other}/{below}") == pytest.approx(convert(value, unit, other))
    assert convert(value, f"{below}/{unit}", f"{below}/{other}") == pytest.approx(convert(value, other, unit))


def test_units_agree_with_the_functions_that_convert_one_of_them() -> None:
    assert convert(3.0, "kWh", "J") == units.kwh_to_joules(3.0)
    assert convert(3.0, "kg", "g") == units.kilograms_to_grams(3.0)
    assert convert(1.0, "kg/GB", "g/byte") == 1e-6
    assert convert(1.0, "cm2", "mm2") == 100
    assert convert(1.0, "year", "h") == 8760


@pytest.mark.parametrize("unit", ["stone", "kg/stone", "kg/GB/s", "", "/", "kg per GB"])
def test_an_unknown_unit_is_an_error_that_lists_the_known_ones(unit: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; allowed: mg, g, kg, t, lb, J, kWh"):
        convert(1.0, unit, "g")


# ----------------------------------------------------------------------------------------------------- amortisation


def test_the_worked_example_of_sci_is_28_5_grams_an_hour() -> None:
    assert embodied_grams(1e6, 3600, 4) == pytest.approx(28.5, abs=0.05)


def test_an_h100_over_three_years_is_6_24_grams_an_hour() -> None:
    footprint = device_footprint("h100-sxm", "product")
    assert footprint is not None
    assert 3600 * grams_per_second([Holding(footprint.grams, 3)]) == pytest.approx(6.24, abs=0.005)


@pytest.mark.parametrize(("lifetime_years", "kilograms"), [(3, 944), (4, 1259), (5, 1574)])
def test_hotcarbons_server_takes_9_98_milligrams_a_second(lifetime_years: float, kilograms: float) -> None:
    rate = grams_per_second([Holding(units.kilograms_to_grams(kilograms), lifetime_years)])
    assert convert(rate, "g", "mg") == pytest.approx(9.98, rel=1e-3)


@pytest.mark.parametrize(
    ("source", "milligrams"),
    [("coal", 250.56), ("gas", 149.72), ("solar", 12.53), ("hydro", 7.33), ("nuclear", 3.67), ("wind", 3.36)],
)
def test_hotcarbons_server_at_1100_watts_emits_by_source(source: str, milligrams: float) -> None:
    intensity = constant(f"act.electricity.{source}").to("g/kWh")
    assert convert(operational_grams(1100.0, intensity), "g", "mg") == pytest.approx(milligrams, rel=1e-3)


@pytest.mark.parametrize("lifetime_years", [2.99, 5.01, 0, -3, float("nan"), float("inf")])
def test_a_lifetime_outside_of_three_to_five_years_is_refused(lifetime_years: float) -> None:
    for refused in (lambda: lifetime_seconds(lifetime_years), lambda: embodied_grams(1, 1, lifetime_years)):
        with pytest.raises(ValueError, match=r"lifetime_years=.* is not possible; allowed: 3 to 5"):
            refused()


@pytest.mark.parametrize(
    ("held_seconds", "held_ratio", "key"),
    [(-1, 1, "held_seconds"), (1, 1.1, "held_ratio"), (1, -0.1, "held_ratio"), (float("inf"), 1, "held_seconds")],
)
def test_a_share_that_cannot_be_held_is_refused_by_its_name(held_seconds: float, held_ratio: float, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=.* is not possible; allowed: 0"):
        embodied_grams(1, held_seconds, 3, held_ratio)


@given(grams, years)
def test_a_whole_life_of_the_whole_part_carries_its_whole_footprint(total: float, lifetime_years: float) -> None:
    assert embodied_grams(total, lifetime_seconds(lifetime_years), lifetime_years) == pytest.approx(total)


@given(grams, years, seconds, st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_shares_by_time_and_fraction_add_up_to_what_was_held(
    total: float, lifetime_years: float, held: float, weights: list[float]
) -> None:
    assume(sum(weights) > 1e-3)
    parts = [embodied_grams(total, held, lifetime_years, weight / sum(weights) * 0.999) for weight in weights]
    assert sum(parts) == pytest.approx(0.999 * embodied_grams(total, held, lifetime_years))


@given(holdings, years)
def test_with_one_lifetime_the_rate_is_the_sum_of_the_footprints_over_it(parts: list[Holding], life: float) -> None:
    same = [dataclasses.replace(part, lifetime_years=life) for part in parts]
    together = sum(part.count * part.total_grams for part in parts)
    assert grams_per_second(same) == pytest.approx(embodied_grams(together, 1, life))


@given(holdings, holdings)
def test_rates_of_parts_with_lifetimes_of_their_own_add_up(gpus: list[Holding], hosts: list[Holding]) -> None:
    assert grams_per_second([*gpus, *hosts]) == pytest.approx(grams_per_second(gpus) + grams_per_second(hosts))


def test_a_host_kept_for_five_years_beside_gpus_of_three_emits_less_than_one_replaced_with_them() -> None:
    gpu, host = 164e3, 5700e3
    together = grams_per_second([Holding(gpu, 3, 8), Holding(host, 3)])
    apart = grams_per_second([Holding(gpu, 3, 8), Holding(host, 5)])
    assert together - apart == pytest.approx(embodied_grams(host, 1, 3) * (1 - 3 / 5))


@given(st.floats(0, 10), seconds, seconds, policies)
def test_idle_and_busy_time_together_carry_all_of_the_time_held(
    rate: float, busy: float, idle: float, policy: IdlePolicy
) -> None:
    carried, line = split_idle(rate, busy, idle, policy)
    assert carried + line == pytest.approx(rate * (busy + idle))
    assert carried >= 0 and line >= 0


def test_idle_time_is_a_line_of_its_own_unless_busy_time_carries_it() -> None:
    assert split_idle(2, 3, 4, "line") == (6, 8)
    assert split_idle(2, 3, 4, "busy") == (14, 0)
    assert split_idle(2, 0, 4, "busy") == (0, 8)


@given(st.floats(1e-6, 10), st.floats(1, 1e6), st.floats(0.01, 1), policies)
def test_the_rate_of_busy_time_is_that_of_its_split(
    rate: float, busy: float, utilisation: float, policy: IdlePolicy
) -> None:
    carried, _ = split_idle(rate, busy, busy / utilisation - busy, policy)
    assert busy * grams_per_busy_second(rate, utilisation, policy) == pytest.approx(carried)


@pytest.mark.parametrize("utilisation", [0, -0.1, 1.1])
def test_a_utilisation_that_is_none_is_refused(utilisation: float) -> None:
    with pytest.raises(ValueError, match=r"utilisation_ratio=.* is not possible; allowed: "):
        grams_per_busy_second(1, utilisation)


# -------------------------------------------------------------------------------------------------------------- ACT


@pytest.mark.parametrize(
    ("node", "kilograms"),
    [
        ("28nm", 1.328),
        ("20nm", 1.542),
        ("14nm", 1.557),
        ("10nm", 1.777),
        ("8nm", 1.807),
        ("7nm", 2.318),
        ("5nm", 2.778),
        ("3nm", 3.163),
    ],
)
def test_acts_dies_are_reproduced_to_the_printed_digits(node: str, kilograms: float) -> None:
    assert round(convert(die_grams_per_cm2(node), "g", "kg"), 3) == kilograms


@pytest.mark.parametrize(
    ("node", "taken"),
    [
        ("12FFN", "14nm"),
        ("TSMC 12nm", "14nm"),
        ("Samsung 8N", "8nm"),
        ("TSMC 4N", "5nm"),
        ("4NP", "5nm"),
        ("N6", "7nm"),
        ("N7", "7nm"),
        ("5nm", "5nm"),
    ],
)
def test_a_node_that_act_lacks_is_taken_as_the_stated_one(node: str, taken: str) -> None:
    assert act_node(node) == taken
    assert die_grams(2, node) == 2 * die_grams_per_cm2(taken)


@pytest.mark.parametrize("node", ["", "90nm", "N90", "fast"])
def test_an_unknown_node_is_an_error_that_lists_the_known_ones(node: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; allowed: 28nm, 20nm.*12FFN"):
        act_node(node)


@given(st.sampled_from(ACT_NODES), st.floats(0, 2000), st.floats(0.95, 0.99), st.floats(0.1, 1))
def test_a_dirtier_fab_a_lower_yield_and_less_abatement_never_emit_less(
    node: str, intensity: float, abated: float, good: float
) -> None:
    here = die_grams_per_cm2(node, Fab(intensity, abated, good))
    assert die_grams_per_cm2(node, Fab(intensity + 1, abated, good)) > here
    assert die_grams_per_cm2(node, Fab(intensity, abated, good * 0.9)) > here
    assert die_grams_per_cm2(node, Fab(intensity, 0.95, good)) >= here


def test_an_abatement_that_act_has_no_figure_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"abated_ratio=0.9 is not possible; allowed: 0.95 to 0.99"):
        die_grams_per_cm2("7nm", Fab(abated_ratio=0.9))


# ------------------------------------------------------------------------------------------------------ HotCarbon'24


def test_hotcarbons_ssd_factor_follows_from_the_drives_of_the_r740() -> None:
    assert round(3378.944 / (8 * 3.84 * 1000), 5) == constant("component.ssd").to("kg/GB") == 0.10999
    assert ssd_grams(units.giga(30720)) == pytest.approx(units.kilograms_to_grams(3378.944), rel=1e-4)


def test_hotcarbons_boards_follow_from_the_mainboard_of_the_r740() -> None:
    assert round(175.8 * 0.62 * 0.85 / 1925, 3) == constant("component.pcb").to("kg/cm2") == 0.048
    ethernet, controller = (
        constant(f"component.board-area.{name}").to("cm2/part") for name in ("ethernet", "hdd-controller")
    )
    assert convert(board_grams(ethernet), "g", "kg") == pytest.approx(4.91, abs=0.005)
    assert convert(board_grams(controller), "g", "kg") == pytest.approx(5.136, abs=0.0005)


def test_hotcarbons_a6000_has_its_power_delivery_and_cooling() -> None:
    assert convert(power_delivery_grams(300), "g", "kg") == pytest.approx(22.89)
    assert convert(cooling_grams(300), "g", "kg") == pytest.approx(23.63)
    assert round(power_delivery_grams(1), 1) == 76.3 and round(cooling_grams(1), 1) == 78.8


@pytest.mark.parametrize(
    ("kind", "kilograms"),
    [
        ("hbm2", 0.28),
        ("hbm2e", 0.24),
        ("hbm3", 0.24),
        ("hbm3e", 0.24),
        ("ddr4", 0.29),
        ("lpddr5", 0.29),
        ("gddr6", 0.62),
    ],
)
def test_hotcarbons_memory_is_counted_by_gigabytes_of_its_kind(kind: str, kilograms: float) -> None:
    assert memory_grams(kind, units.giga(10)) == pytest.approx(units.kilograms_to_grams(10 * kilograms))


def test_an_unknown_memory_is_an_error_that_lists_the_known_kinds() -> None:
    with pytest.raises(ValueError, match="memory 'core' is not in the catalog; allowed: hbm2, hbm2e"):
        memory_grams("core", 1)


def test_packages_are_150_grams_each() -> None:
    assert package_grams(3) == 450


# ------------------------------------------------------------------------------------------------------- footprints


@pytest.mark.parametrize(
    ("chip", "kilograms"), [("cpu", 1.47), ("v100", 9.78), ("h100", 14.652), ("tpu-v3", 7), ("tpu-v4", 6.4)]
)
def test_chips_of_llmcarbons_table_are_reproduced(chip: str, kilograms: float) -> None:
    assert convert(chip_grams(chip), "g", "kg") == pytest.approx(kilograms, rel=1e-9)


@pytest.mark.parametrize(
    ("device", "kilograms"),
    [("h100-sxm", 164), ("b200", 284.25), ("a100-40", 127.6), ("a100-80", 127.6), ("h200-sxm", 216.5)],
)
def test_whole_parts_have_the_footprint_their_sheet_states(device: str, kilograms: float) -> None:
    footprint = device_footprint(device, "product")
    assert footprint is not None and convert(footprint.grams, "g", "kg") == pytest.approx(kilograms)


def test_a_derived_footprint_says_how_wide_it_is() -> None:
    spreads = {
        name: getattr(device_footprint(name, "product"), "spread_ratio", None) for name in ("h200-sxm", "h100-sxm")
    }
    assert spreads == {"h200-sxm": 0.2, "h100-sxm": None}
    share, gigabytes = 0.42, 141 / 80
    assert 164 * (1 - share + share * gigabytes) == pytest.approx(constant("product.h200-sxm").to("kg/part"), rel=1e-3)


@pytest.mark.parametrize("device", device_names())
def test_components_of_a_device_add_up_and_name_what_is_missing(device: str) -> None:
    footprint = device_footprint(device, "components")
    assert footprint is not None and footprint.model == "components"
    assert footprint.grams == sum(footprint.parts.values()) and min(footprint.parts.values()) > 0
    assert "circuit board" in footprint.omitted and "as ACT's" in footprint.notes[0]
    watts = device_by_name(device).power_limit_watts
    assert footprint.parts["cooling"] == cooling_grams(watts)


@pytest.mark.parametrize("device", ["h100-sxm", "h200-sxm", "b200", "a100-40", "a100-80"])
def test_components_explain_most_of_a_whole_part_and_never_much_more(device: str) -> None:
    found = {model: device_footprint(device, model) for model in MODELS}
    components, product = found["components"], found["product"]
    assert components is not None and product is not None
    assert 0.6 < components.grams / product.grams < 1.1


def test_a_chiplet_device_counts_every_die_and_one_package_each() -> None:
    footprint = device_footprint("mi300x", "components")
    assert footprint is not None
    assert footprint.parts["package"] == package_grams(12)
    assert footprint.parts["die.mi300x-compute"] == pytest.approx(8 * die_grams(1.15, "N5"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", ["cpu", "CPU"])
def test_what_no_model_knows_is_none_and_not_zero(model: EmbodiedModel, device: str) -> None:
    assert device_footprint(device, model) is None
    assert device_footprint("t4", "product") is None and device_footprint("t4", "llmcarbon") is None


def test_an_unknown_model_or_device_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'guess' is not known; allowed: product, components, llmcarbon"):
        device_footprint("h100-sxm", "guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'abacus' is not in the catalog"):
        device_footprint("abacus", "product")


def test_the_catalog_is_read_once() -> None:
    assert embodied_catalog.constants() is embodied_catalog.constants()


def test_a_device_carries_an_eighth_of_its_own_host_and_says_when_another_stands_in() -> None:
    own, other = host_share("h100-sxm", "product"), host_share("b200", "product")
    assert own is not None and other is not None
    assert own.grams == other.grams == pytest.approx(5700e3 / 8)
    assert "stands in" not in own.notes[0] and "stands in" in other.notes[0]
    assert host_share("h100-sxm", "components") is None and host_share("cpu", "product") is None


@given(st.integers(1, 8), st.floats(3, 5), st.floats(3, 5))
def test_an_engines_hardware_is_its_cards_and_hosts_each_over_its_own_life(
    count: int, card: float, host: float
) -> None:
    found = engine_hardware("h100-sxm", count, "product", Lifetimes(card, host))
    assert found is not None and found.omitted == ()
    year = 365 * 86400
    assert found.rate_grams_per_second == pytest.approx(count * (164e3 / (card * year) + 5700e3 / 8 / (host * year)))
    assert engine_hardware("cpu", count, "product", Lifetimes()) is None


def test_hardware_without_a_known_host_says_that_it_is_omitted() -> None:
    found = engine_hardware("l4", 1, "components", Lifetimes())
    assert found is not None and "host" in found.omitted
