"""What holds of every report: sums, hours, units, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.carbon import node_joules, operational_grams
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.reporting.figures import ALL, functional_unit
from llmco2_vllm.reporting.held import EmbodiedChoice
from llmco2_vllm.reporting.hours import PARTS, Record, Selection, pieces
from llmco2_vllm.reporting.page import html
from llmco2_vllm.reporting.pricing import SiteChoice, open_pricing
from llmco2_vllm.reporting.report import Report, make_report
from llmco2_vllm.reporting.stored import read
from llmco2_vllm.reporting.writing import markdown
from llmco2_vllm.store.sample import Sample
from tests.reporting.made import BEGIN, HOUR, MODEL, OTHER, intensity_file, window

ADDITIVE = (
    "energy_joules",
    "site_energy_joules",
    *(f"{part}_joules" for part in PARTS),
    *(f"{part}_operational_grams" for part in PARTS),
    "doubtful_joules",
    "operational_location_grams",
    "operational_market_grams",
    "embodied_busy_grams",
    "embodied_idle_grams",
    "carbon_grams",
    "predicted_joules",
    "predicted_operational_grams",
    "prefill_tokens",
    "decode_tokens",
    "useful_tokens",
)
ROWS = st.tuples(st.floats(0.1, 100), st.integers(0, 500), st.integers(0, 64))
WINDOWS = st.builds(
    lambda hours, joules, idle, rows, model, doubt: replace(
        window(hours, joules, *rows, model=model, idle=idle * joules), doubt=doubt
    ),
    st.floats(0, 71.9),
    st.floats(1, 1e4),
    st.floats(0, 1),
    st.lists(ROWS, max_size=5),
    st.sampled_from((MODEL, OTHER)),
    st.sampled_from(("", "reader was late", "engine sleeping", "device shared with other tenants")),
)
STORES = st.lists(WINDOWS, min_size=1, max_size=12)


def record(samples: Sequence[Sample], selection: Selection | None = None) -> Record:
    return read(samples, selection or Selection(), EmbodiedChoice(), "store")


def report(samples: Sequence[Sample], site: SiteChoice, *units: str) -> Report:
    found = record(samples)
    return make_report(found, open_pricing(site, found), [functional_unit(unit) for unit in units])


def value(found: Report, name: str, day: str = ALL, model: str = ALL) -> float | None:
    return found.find()[day, model, name].value


def known(found: Report, name: str, day: str = ALL, model: str = ALL) -> float:
    answer = value(found, name, day, model)
    assert answer is not None
    return answer


@settings(deadline=None)
@given(STORES)
def test_days_and_models_add_up_to_the_total(samples: list[Sample]) -> None:
    found = report(samples, SiteChoice(grams_per_kwh=300.0, market="20", pue=1.3, node_overhead_ratio=0.2))
    days = list(found.period.days())
    for name in ADDITIVE:
        total = value(found, name) or 0.0
        for groups in (
            [(day, ALL) for day in days],
            [(ALL, model) for model in found.models],
            [(day, model) for day in days for model in found.models],
        ):
            parts = [value(found, name, *group) or 0.0 for group in groups]
            assert sum(parts) == pytest.approx(total, rel=1e-9, abs=1e-12), name


@settings(deadline=None)
@given(STORES)
def test_the_energy_of_the_windows_is_the_energy_of_the_report_and_of_its_parts(samples: list[Sample]) -> None:
    found = report(samples, SiteChoice())
    metered = sum(sample.energy_joules for sample in samples)
    parts = sum(value(found, f"{part}_joules") or 0.0 for part in PARTS)
    assert known(found, "energy_joules") == pytest.approx(metered)
    assert parts == pytest.approx(metered)


@settings(deadline=None)
@given(STORES, st.floats(0.1, 1400))
def test_twice_the_intensity_is_twice_the_operational_grams_and_the_same_embodied(
    samples: list[Sample], grams: float
) -> None:
    one, two = (report(samples, SiteChoice(grams_per_kwh=factor * grams)) for factor in (1, 2))
    for name in ("operational_location_grams", "predicted_operational_grams"):
        assert known(two, name) == pytest.approx(2 * known(one, name))
    assert value(two, "embodied_idle_grams") == value(one, "embodied_idle_grams")


@settings(deadline=None)
@given(STORES, st.integers(0, 3000))
def test_the_market_never_changes_an_sci_nor_the_location(samples: list[Sample], market: int) -> None:
    without, given_one = (
        report(samples, SiteChoice(grams_per_kwh=300.0, market=text), "page=500 tokens") for text in (None, str(market))
    )
    assert value(without, "operational_market_grams") is None
    assert value(given_one, "operational_market_grams") is not None
    for figure in without.figures:
        if figure.name != "operational_market_grams":
            assert figure in given_one.figures


@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(0.001, 1e5))
def test_the_shares_of_a_stretch_of_time_in_its_hours_add_up_to_one(begin: float, seconds: float) -> None:
    found = list(pieces(begin, begin + seconds))
    assert sum(share for _, share in found) == pytest.approx(1.0, rel=1e-6)
    assert [hour for hour, _ in found] == sorted({hour for hour, _ in found})


def test_energy_is_multiplied_by_the_intensity_of_the_hour_in_which_it_was_used(tmp_path: Path) -> None:
    file = intensity_file(tmp_path / "grid.csv", [100.0, 700.0])
    # The second window lies half in each hour.
    samples = [window(0.5, 3.6e6), window(1.0 - 5 / HOUR, 7.2e6)]
    found = report(samples, SiteChoice(file=file))
    assert known(found, "operational_location_grams") == pytest.approx(100 + 100 + 700)
    assert known(found, "location_intensity_grams_per_kwh") == pytest.approx(300)


def file_of(path: Path, step_seconds: float, values: Sequence[float | None]) -> Path:
    rows = [f"{BEGIN + step_seconds * n},{'' if grams is None else grams}" for n, grams in enumerate(values)]
    path.write_text("\n".join(["epoch_seconds,grams_per_kwh", *rows, ""]))
    return path


@pytest.mark.parametrize(
    ("step_seconds", "values", "mean"),
    [
        (1800, [100, 300], 200),
        (300, [0, 900, 900] * 4, 600),
        (300, [900, 0, 0] * 4, 300),
        (60, [600, *[0] * 59], 10),
    ],
)
def test_the_intensity_of_an_hour_is_the_mean_of_all_rows_in_it(
    tmp_path: Path, step_seconds: float, values: list[float | None], mean: float
) -> None:
    file = file_of(tmp_path / "grid.csv", step_seconds, values)
    found = report([window(0.1, 3.6e6)], SiteChoice(file=file, market=str(file)))
    assert known(found, "operational_location_grams") == pytest.approx(mean)
    assert known(found, "operational_market_grams") == pytest.approx(mean)


@settings(deadline=None)
@given(st.data())
def test_an_hour_of_which_any_row_is_missing_has_no_intensity(data: st.DataObject) -> None:
    missing = data.draw(st.integers(0, 11))
    with TemporaryDirectory() as folder:
        file = file_of(Path(folder) / "grid.csv", 300, [None if row == missing else 100.0 for row in range(24)])
        found = report([window(0.1, 3.6e6), window(1.1, 3.6e6)], SiteChoice(file=file))
    assert known(found, "operational_location_grams") == pytest.approx(100)
    assert known(found, "hours_without_intensity") == 1
    assert any("1 of 2 hours have no known intensity, or not for all of the hour" in line for line in found.unknown)


@pytest.mark.parametrize("site", [{"zone": "FR"}, {"grams_per_kwh": 5.0}, {"region": "aws:eu-west-3"}])
def test_only_a_report_without_any_place_says_above_all_that_it_is_of_the_world(site: dict[str, Any]) -> None:
    samples = [window(0, 100.0, (10.0, 0, 8))]
    assert not report(samples, SiteChoice(**site)).cautions
    nowhere = report(samples, SiteChoice())
    assert ["The world's average" in line for line in nowhere.cautions] == [True]
    written = markdown(nowhere)
    assert written.index("The world's average") < written.index("## Totals")
    page = html(nowhere)
    assert page.index('role="note"') < page.index('class="cards"') and 'role="note"' not in html(
        report(samples, SiteChoice(**site))
    )


def test_the_method_says_what_sci_holds_and_which_tokens_divide_it() -> None:
    found = report([window(0, 100.0, (10.0, 0, 8))], SiteChoice())
    said = dict(found.methods)
    assert "idle energy and the idle embodied carbon" in said["SCI"] and "single response has neither" in said["SCI"]
    assert "computed again after a preemption and rejected drafts" in said["Tokens of use"]
    assert any("samples do not tell them apart" in line for line in found.unknown)
    assert value(found, "recomputed_tokens") is None and value(found, "useful_tokens") == 8


def test_pue_and_what_the_node_adds_are_counted_once() -> None:
    site = SiteChoice(grams_per_kwh=200.0, pue=1.5, node_overhead_ratio=0.4, auxiliary_ratio=0.1)
    found = report([window(0, 1000.0)], site)
    node = node_joules(1000.0, 0.4, 0.1)
    assert known(found, "operational_location_grams") == pytest.approx(operational_grams(node, 200.0, 1.5))
    assert known(found, "site_energy_joules") == pytest.approx(node * 1.5)
    assert known(found, "energy_joules") == pytest.approx(1000.0)


def test_an_hour_without_intensity_has_energy_but_no_grams_and_is_counted(tmp_path: Path) -> None:
    file = intensity_file(tmp_path / "grid.csv", [100.0, None, 100.0])
    samples = [window(hour, 3.6e6, (10.0, 0, 1000)) for hour in (0, 1, 2)]
    found = report(samples, SiteChoice(file=file, zone="FR"))
    assert known(found, "energy_joules") == pytest.approx(3 * 3.6e6)
    assert known(found, "operational_location_grams") == pytest.approx(200)
    assert known(found, "hours_without_intensity") == 1
    assert found.find()[ALL, ALL, "operational_location_grams"].missing_hours == 1
    # Neither the grams nor the tokens of that hour are in the SCI.
    assert known(found, "operational_per_1000_tokens_grams") == pytest.approx(100)
    assert known(found, "energy_per_1000_tokens_joules") == pytest.approx(3.6e6)
    assert any("1 of 3 hours have no known intensity" in line for line in found.unknown)


def test_where_no_intensity_is_known_grams_are_unknown_and_not_0(tmp_path: Path) -> None:
    file = intensity_file(tmp_path / "grid.csv", [100.0])
    found = report([window(48, 1000.0, (10.0, 0, 10))], SiteChoice(file=file))
    for name in ("operational_location_grams", "carbon_grams", "sci_per_1000_tokens_grams"):
        assert value(found, name) is None, name


def test_days_without_windows_are_said_to_be_without_data() -> None:
    found = report([window(0, 10.0), window(60, 10.0)], SiteChoice())
    assert list(found.period.days()) == ["2026-03-02", "2026-03-03", "2026-03-04"]
    assert value(found, "energy_joules", "2026-03-03") is None
    assert known(found, "hours_without_data", "2026-03-03") == 24
    assert known(found, "hours_without_data") == 59


def test_every_device_of_an_engine_counts_for_its_part_of_the_tokens() -> None:
    topology = Topology(tensor_parallel=4)
    devices = [replace(window(0, 100.0 + n, (50.0, 300, 0), (50.0, 0, 8)), topology=topology) for n in range(4)]
    found = report(devices, SiteChoice())
    assert known(found, "prefill_tokens") == pytest.approx(300)
    assert known(found, "decode_tokens") == pytest.approx(8)
    assert known(found, "recorded_time_ratio") == pytest.approx(10 / HOUR)


def test_energy_goes_to_prefill_decode_and_steps_of_both_by_predicted_joules() -> None:
    found = report([window(0, 110.0, (10.0, 100, 0), (20.0, 0, 4), (20.0, 50, 4), idle=10.0)], SiteChoice())
    parts = {part: value(found, f"{part}_joules") for part in PARTS}
    assert parts == {
        "prefill": pytest.approx(20.0),
        "decode": pytest.approx(40.0),
        "mixed": pytest.approx(40.0),
        "idle": 10.0,
        "sleeping": 0.0,
        "unattributed": 0.0,
        "unsplit": None,
    }


def test_the_energy_of_a_device_shared_with_others_is_nobodys() -> None:
    shared = replace(window(0, 110.0, (10.0, 0, 4)), doubt="device shared with other tenants")
    found = report([shared], SiteChoice())
    assert known(found, "unattributed_joules") == 110.0 and known(found, "decode_joules") == 0.0
    assert known(found, "doubtful_joules") == 110.0


def test_a_window_without_predictions_is_split_by_measured_duration_and_its_prediction_is_unknown() -> None:
    blind = window(0, 90.0, (1.0, 100, 0), (5.0, 0, 4), (1.0, 0, 4))
    rows = blind.steps.copy()
    rows[1, 2], rows[2, 1] = float("nan"), 0.4
    found = report([replace(blind, predicted_joules=None, steps=rows)], SiteChoice())
    assert known(found, "prefill_joules") == pytest.approx(15.0)
    assert known(found, "decode_joules") == pytest.approx(75.0)
    assert value(found, "predicted_joules") is None


def test_a_window_whose_idle_energy_is_unknown_is_not_split() -> None:
    found = report([replace(window(0, 90.0, (1.0, 100, 0)), idle_joules=None)], SiteChoice())
    assert known(found, "unsplit_joules") == 90.0 and known(found, "idle_joules") == 0.0


def test_an_intensity_that_stands_in_for_the_hour_is_said_to() -> None:
    found = report([window(0, 90.0)], SiteChoice(zone="FR"))
    assert known(found, "hours_with_estimated_intensity") == 1
    assert any("an estimate or the average of a year" in line for line in found.unknown)


def test_what_is_predicted_is_never_among_the_measured_figures() -> None:
    one, two = (report([window(0, 100.0, (joules, 0, 8))], SiteChoice()) for joules in (50.0, 500.0))
    assert known(two, "predicted_joules") == 10 * known(one, "predicted_joules")
    predicted = ("predicted_joules", "predicted_operational_grams", "prediction_bias_ratio")
    for figure in one.figures:
        if figure.name not in predicted:
            assert figure in two.figures


def test_sci_is_operational_and_embodied_grams_over_the_functional_units() -> None:
    found = report([window(0, 3.6e6, (10.0, 0, 4000))], SiteChoice(grams_per_kwh=100.0), "page=500 tokens")
    carbon = 100.0 + known(found, "embodied_busy_grams") + known(found, "embodied_idle_grams")
    assert known(found, "carbon_grams") == pytest.approx(carbon)
    assert known(found, "sci_per_1000_tokens_grams") == pytest.approx(carbon / 4)
    assert known(found, "sci_per_page_grams") == pytest.approx(carbon / 8)
    assert value(found, "sci_per_request_grams") is None


def test_embodied_carbon_goes_by_the_time_the_device_was_held_busy_and_idle() -> None:
    choice = EmbodiedChoice("product", 4.0, 4.0)
    rate = choice.rate("h100-sxm").grams_per_second
    assert rate is not None and rate == pytest.approx((164e3 + 5700e3 / 8) / (4 * 365 * 86400))
    found = report([window(0, 100.0, (10.0, 0, 8))], SiteChoice())
    assert known(found, "embodied_busy_grams") == pytest.approx(0.1 * rate)
    assert known(found, "embodied_idle_grams") == pytest.approx(9.9 * rate)


def test_without_the_embodied_carbon_of_a_device_there_is_no_sci_and_no_total() -> None:
    samples = [window(0, 100.0, (10.0, 0, 8)), replace(window(0, 90.0, (10.0, 0, 8), model=OTHER), device="abacus")]
    found = report(samples, SiteChoice())
    assert value(found, "sci_per_1000_tokens_grams") is None
    assert value(found, "sci_per_1000_tokens_grams", ALL, MODEL) is not None
    assert value(found, "carbon_grams", ALL, OTHER) is None
    assert any("abacus: no embodied figure" in line for line in found.unknown)


def test_the_interval_holds_the_meter_and_the_gain_that_all_windows_share() -> None:
    found = report([window(hour / 100, 1000.0) for hour in range(100)], SiteChoice())
    windows = 100 * (0.01 * 1000.0) ** 2
    assert known(found, "energy_half_width_joules") == pytest.approx(1.6449 * (windows + (0.03 * 1e5) ** 2) ** 0.5)


def test_worst_windows_are_the_trusted_ones_that_are_off_by_most_joules() -> None:
    samples = [window(n, 100.0, (100.0 + n, 0, 8)) for n in range(15)]
    samples.append(replace(window(20, 100.0, (900.0, 0, 8)), doubt="reader was late"))
    windows = record(samples).windows
    assert windows is not None
    assert [round(one.error_joules) for one in windows] == list(range(14, 4, -1))


def test_only_the_hours_of_the_days_asked_for_count() -> None:
    from datetime import date

    samples = [window(23.999, 100.0), window(30, 7.0), window(60, 5.0)]
    found = record(samples, Selection(date(2026, 3, 3), date(2026, 3, 3)))
    late = 10 - 3.6  # seconds of the first window after midnight
    assert sum(use.amounts["energy_joules"] for use in found.uses) == pytest.approx(7 + 10 * late)
    assert found.period.hours == 24


def test_windows_of_an_impossible_time_are_left_out_and_said() -> None:
    found = record([window(0, 10.0), replace(window(0, 11.0), began_epoch_seconds=1e300)])
    assert sum(use.amounts["energy_joules"] for use in found.uses) == pytest.approx(10.0)
    assert "1 windows without a possible time were left out" in found.unknown


@pytest.mark.parametrize("text", ["page", "page=", "page=0 tokens", "page=5 words", "request=2 requests", "=5 tokens"])
def test_a_unit_that_is_none_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"unit=.* is not possible; allowed: page=500 tokens"):
        functional_unit(text)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"grams_per_kwh": 5.0, "file": Path("x")}, "intensity and intensity-file are both there"),
        ({"grams_per_kwh": 5.0, "method": "marginal", "market": "3"}, "averages never join marginals"),
        ({"zone": "FR", "method": "marginal"}, "method=marginal needs intensity or intensity-file"),
    ],
)
def test_average_and_marginal_figures_are_never_mixed(site: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiteChoice(**site)  # type: ignore[arg-type]
