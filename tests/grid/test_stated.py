"""What is shipped or stated: the table of yearly averages, regions, constants, and slips in what is asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.intensity import Kind
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.regions import check_regions, load_regions, region, shipped_regions
from llmco2_vllm.grid.stated import ConstantProvider, TableProvider, sources, year_begin
from llmco2_vllm.grid.zones import check_zone, country, known_zones, near, shipped_rows
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import NOW

COUNTRIES = sorted({row["zone"] for row in shipped_rows("intensity")})
moments = st.datetimes(datetime(2018, 1, 1), datetime(2060, 1, 1)).map(lambda at: at.replace(tzinfo=UTC).timestamp())


def test_every_row_of_the_tables_names_a_source_with_year_and_licence() -> None:
    rows = [row["source"] for row in shipped_rows("intensity")]
    rows += [row["zone_source"] for row in shipped_rows("regions")]
    rows += [row["pue_source"] for row in shipped_rows("regions") if row["pue"]]
    assert {"title", "url", "year", "licence"} <= set.intersection(*(set(sources()[name]) for name in rows))


def test_a_source_whose_licence_asks_for_a_notice_has_one() -> None:
    asking = [one for one in sources().values() if any(word in one["licence"] for word in ("CC BY", "Apache", "MIT"))]
    assert asking and all(one["notice"] for one in asking)


def test_no_zone_and_year_is_there_twice() -> None:
    keys = [(row["zone"], row["year"]) for row in shipped_rows("intensity")]
    assert len(keys) == len(set(keys))


@given(st.sampled_from(COUNTRIES), moments)
def test_a_yearly_average_is_of_that_year_or_the_latest_before_and_always_a_stand_in(zone: str, moment: float) -> None:
    figure = TableProvider(zone).at(moment)
    years = [int(row["year"]) for row in shipped_rows("intensity") if row["zone"] == zone]
    possible = [year for year in years if year_begin(year) <= moment]
    assert (figure is None) == (not possible)
    if figure is not None:
        assert figure.estimated
        assert figure.valid_from_epoch_seconds == year_begin(max(possible))
        assert figure.source in (f"static:{max(possible)}", "default:world-average")


def test_part_of_a_country_has_the_average_of_the_country_and_says_so() -> None:
    figure = TableProvider("US-CAL-CISO").at(NOW)
    assert figure is not None and (figure.zone, figure.source) == ("US", "static:2023")
    assert figure.age_seconds(NOW) == NOW - year_begin(2024)


def test_a_time_before_the_table_is_not_known() -> None:
    provider = TableProvider("FR")
    assert provider.at(year_begin(2020)) is None
    assert "begins in 2021" in provider.reason(year_begin(2020))


@given(st.sampled_from(sorted(shipped_regions())))
def test_a_region_has_a_zone_whose_country_has_an_average(name: str) -> None:
    found = region(name)
    assert found.zone_year >= 2020 and TableProvider(found.zone).at(NOW) is not None
    assert (found.pue is None) == (found.pue_source is None) == (found.pue_year is None)


def test_each_cloud_has_regions_and_a_pue_only_where_a_source_was_read() -> None:
    found = shipped_regions().values()
    assert {one.provider for one in found} == {"aws", "azure", "gcp"}
    scopes = {(one.provider, one.pue_scope) for one in found if one.pue is not None}
    assert scopes == {("aws", "fleet"), ("gcp", "fleet"), ("azure", "geography")}
    assert all(one.pue is not None and one.pue_source for one in found)


def test_a_region_is_found_whatever_its_case() -> None:
    assert region("AWS:us-east-1").zone == "US-MIDA-PJM"


GOOD = {
    "provider": "aws",
    "region": "r-1",
    "location": "here",
    "zone": "FR",
    "zone_source": "own-2025",
    "pue": "1.2",
    "pue_source": "own-2025",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zone": ""}, "zone is blank"),
        ({"zone": "XX"}, "zone='XX' is not known"),
        ({"region": " "}, "region is blank"),
        ({"provider": "ovh"}, "provider='ovh' is not possible; allowed: aws, azure, gcp"),
        ({"pue": "0.9"}, "pue='0.9' is not possible; allowed: 1 to 5"),
        ({"pue": "nan"}, "pue='nan' is not possible"),
        ({"pue_source": ""}, "pue_source='' is not possible; allowed: a source and its year"),
        ({"zone_source": "somewhere"}, "zone_source='somewhere' is not possible"),
        ({"zone": None}, "column 'zone' is missing"),
    ],
)
def test_a_row_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^own.csv, row 2: {message}"):
        check_regions([GOOD, {**GOOD, "region": "r-2", **change}], "own.csv")


def test_a_region_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2: region='aws:r-1' is there twice"):
        check_regions([GOOD, {**GOOD, "zone": "DE"}], "own.csv")


def test_a_table_of_the_user_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(",".join(GOOD) + "\n" + ",".join(GOOD.values()) + "\n")
    found = load_regions(path)["aws:r-1"]
    assert (found.pue, found.pue_year, found.pue_scope) == (1.2, 2025, None)
    with pytest.raises(ValueError, match="cannot be read"):
        load_regions(tmp_path / "none.csv")


@given(st.sampled_from([zone for zone in known_zones() if zone != "WORLD"]))
def test_a_known_zone_and_any_part_of_a_known_country_pass(zone: str) -> None:
    part = f"{country(zone)}-NEW"
    assert (check_zone(zone), check_zone(part)) == (zone, part)


@pytest.mark.parametrize(("zone", "meant"), [("UK", "GB"), ("fr", "FR"), ("US_CAL_CISO", "US-CAL-CISO"), ("DEE", "DE")])
def test_a_zone_that_is_not_known_is_answered_with_near_ones(zone: str, meant: str) -> None:
    assert meant in near(zone)
    with pytest.raises(ValueError, match=f"^zone='{zone}' is not known; .*near: .*{meant}"):
        open_chain(GridChoice(zone=zone))


@given(st.floats(0, 3000), moments)
def test_a_constant_is_the_same_at_all_times_and_has_no_age(value: float, moment: float) -> None:
    figure = ConstantProvider(value, Kind("FR")).at(moment)
    assert figure is not None and figure.grams_per_kwh == value and not figure.estimated
    assert figure.age_seconds(moment) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"provider": "electricty-maps"}, "provider='electricty-maps' is not possible; allowed: constant"),
        ({"provider": "constant"}, "intensity is missing; allowed: 0 to 3000"),
        ({"provider": "constant", "grams_per_kwh": 4000}, "intensity=4000 is not possible; allowed: 0 to 3000"),
        ({"provider": "constant", "grams_per_kwh": 1, "basis": "mixed"}, "basis='mixed' is not possible"),
        ({"provider": "file"}, "intensity_file is missing; allowed: the path"),
        ({"provider": "electricity-maps"}, "zone is missing for electricity-maps; allowed: a zone"),
        ({"provider": "electricity-maps", "zone": "DE"}, "key: none in the variable ELECTRICITY_MAPS_API_KEY; set"),
        (
            {"provider": "watttime", "zone": "US-CAL-CISO"},
            "zone='US-CAL-CISO' is not possible; allowed: a region of Wa",
        ),
        ({"provider": "watttime", "zone": "CAISO_NORTH"}, "key: none in the variable WATTTIME_USER"),
        ({"provider": "uk-carbon-intensity", "zone": "FR"}, "zone='FR' is not possible for uk-carbon-intensity"),
        (
            {"provider": "uk-carbon-intensity", "provider_url": "ftp://x"},
            "provider uk-carbon-intensity: provider_url is not",
        ),
        ({"region": "aws:us-eest-1"}, "region='aws:us-eest-1' is not in the table; .*near: .*aws:us-east-1"),
        ({"region": "aws:us-east-1", "zone": "FR"}, "region='aws:us-east-1' and zone='FR' are both there"),
        ({"zone": "AD"}, "zone='AD' is not in the shipped table"),
    ],
)
def test_a_slip_is_one_line_that_names_the_key_and_what_is_allowed(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        open_chain(GridChoice(**choice), environment={})
    assert "\n" not in str(caught.value)


def test_a_region_stands_for_its_zone() -> None:
    chain = open_chain(GridChoice(region="aws:eu-west-3"), clock=FakeClock(NOW))
    assert chain.current is not None and chain.current.zone == "FR"


def test_without_a_zone_the_world_average_stands_in() -> None:
    chain = open_chain(GridChoice(), clock=FakeClock(NOW))
    assert chain.current is not None
    assert (chain.current.grams_per_kwh, chain.current.zone) == (475, "WORLD")
    assert (chain.current.source, chain.current.estimated) == ("default:world-average", True)
