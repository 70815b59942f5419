"""From Prometheus's answers to a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import date

import pytest

from llmco2_vllm.grid.stated import TableProvider
from llmco2_vllm.grid.zones import WORLD
from llmco2_vllm.reporting import prometheus
from llmco2_vllm.reporting.figures import ALL
from llmco2_vllm.reporting.hours import Period, Record, Selection
from llmco2_vllm.reporting.page import html
from llmco2_vllm.reporting.pricing import SiteChoice, open_pricing
from llmco2_vllm.reporting.prometheus import (
    COUNTERS,
    OWN_LABELS,
    Prometheus,
    PrometheusError,
    asked_period,
    check_match,
    questions,
)
from llmco2_vllm.reporting.recorded import GAUGES
from llmco2_vllm.reporting.report import Report, make_report
from llmco2_vllm.reporting.writing import markdown
from llmco2_vllm.telemetry.metric_table import METRICS
from tests.reporting.made import BEGIN
from tests.reporting.prometheus_server import Scraped, prometheus_server

FIRST = int(BEGIN // 3600)
PERIOD = Period(FIRST, FIRST + 48)
NAME = "org/model"
MARGINAL = {"basis": "location", "method": "marginal", "source": "watttime", "zone": "CAISO_NORTH"}


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    """Two days: a model that serves for 40 hours with a meter."""
    with prometheus_server() as server:
        hours = range(FIRST, FIRST + 40)
        for metric, amount, names in (
            ("llmco2_metered_energy_joules_total", 1000.0, {}),
            ("llmco2_energy_joules_total", 200.0, {"phase": "prefill"}),
            ("llmco2_energy_joules_total", 500.0, {"phase": "decode"}),
            ("llmco2_idle_energy_joules_total", 250.0, {"state": "awake"}),
            ("llmco2_idle_energy_joules_total", 30.0, {"state": "sleeping"}),
            ("llmco2_estimated_energy_joules_total", 7.0, {}),
            ("llmco2_aborted_energy_joules_total", 5.0, {}),
            ("llmco2_predicted_energy_joules_total", 690.0, {}),
            ("llmco2_tokens_total", 4000.0, {"phase": "prefill"}),
            ("llmco2_tokens_total", 1000.0, {"phase": "decode"}),
            ("llmco2_embodied_carbon_grams_total", 0.3, {"state": "busy"}),
            ("llmco2_embodied_carbon_grams_total", 0.1, {"state": "idle"}),
        ):
            server.add(metric, dict.fromkeys(hours, amount), model_name=NAME, **names)
        # No series before the first request.
        served = dict.fromkeys(range(FIRST + 2, FIRST + 40), 10.0)
        server.add("llmco2_request_predicted_energy_joules_count", served, model_name=NAME)
        yield server


def read(scraped: Scraped, selection: Selection | None = None, period: Period = PERIOD, match: str = "") -> Record:
    with closing(Prometheus(scraped.url)) as server:
        return prometheus.read(server, selection or Selection(), period, questions(period, match))


def report(scraped: Scraped, site: SiteChoice, match: str = "") -> Report:
    record = read(scraped, match=match)
    return make_report(record, open_pricing(site, record))


def value(found: Report, name: str) -> float | None:
    return found.find()[ALL, ALL, name].value


def test_counters_become_the_parts_of_the_energy_and_the_rest_is_unattributed(scraped: Scraped) -> None:
    found = report(scraped, SiteChoice(grams_per_kwh=360.0))
    wanted = {"prefill": 200, "decode": 500, "idle": 250, "sleeping": 30, "unattributed": 20}
    for part, joules in wanted.items():
        assert value(found, f"{part}_joules") == pytest.approx(40 * joules), part
    assert value(found, "energy_joules") == pytest.approx(40_000)
    assert value(found, "operational_location_grams") == pytest.approx(4.0)
    assert value(found, "hours_without_data") == 8
    assert value(found, "measured_energy_ratio") == pytest.approx(700 / 707)
    assert value(found, "aborted_joules") == pytest.approx(200)


def test_sci_per_request_counts_hours_before_the_first_request_too(scraped: Scraped) -> None:
    found = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(found, "requests") == 380
    assert value(found, "sci_per_request_grams") == pytest.approx((4.0 + 40 * 0.4) / 380)
    assert value(found, "sci_per_1000_tokens_grams") == pytest.approx((4.0 + 40 * 0.4) / 200)


def test_predictions_without_a_meter_are_shown_apart_and_no_energy_is_measured(scraped: Scraped) -> None:
    for metric in ("llmco2_metered_energy_joules_total", "llmco2_energy_joules_total"):
        del scraped.series[metric]
    found = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(found, "energy_joules") is None and value(found, "operational_location_grams") is None
    assert value(found, "predicted_joules") == pytest.approx(40 * 690)
    assert value(found, "predicted_operational_grams") == pytest.approx(2.76)
    assert "Predicted energy by day, not measured" in html(found)
    assert "| predicted, J |" in markdown(found)
    assert any("40 of 48 hours have predictions but no measurement" in line for line in found.unknown)


def test_recorded_intensities_are_taken_by_the_hour_where_none_is_given(scraped: Scraped) -> None:
    grams = {hour: 100.0 if hour < FIRST + 20 else 300.0 for hour in range(FIRST, FIRST + 39)}
    scraped.add("llmco2_grid_intensity_grams_per_kwh", grams, basis="location")
    scraped.add("llmco2_grid_intensity_grams_per_kwh", dict.fromkeys(grams, 36.0), basis="market")
    scraped.add("llmco2_grid_intensity_estimated", dict.fromkeys(grams, 1.0), basis="location")
    found = report(scraped, SiteChoice())
    assert value(found, "operational_location_grams") == pytest.approx(1000 / 3.6e6 * (20 * 100 + 19 * 300))
    assert value(found, "operational_market_grams") == pytest.approx(0.39)
    assert value(found, "hours_without_intensity") == 1
    assert value(found, "hours_with_estimated_intensity") == 39
    given = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(given, "operational_location_grams") == pytest.approx(4.0)
    assert value(given, "operational_market_grams") is None


def test_a_recorded_marginal_intensity_is_called_so_and_two_methods_are_not_taken(scraped: Scraped) -> None:
    hours = range(FIRST, FIRST + 40)
    scraped.add("llmco2_grid_intensity_grams_per_kwh", dict.fromkeys(hours, 500.0), basis="location")
    scraped.add("llmco2_grid_intensity_grams_per_kwh", dict.fromkeys(hours, 36.0), basis="market")
    scraped.add("llmco2_grid_info", dict.fromkeys(hours, 1.0), **MARGINAL)
    hidden = {"basis": "location", "method": "average", "source": "old"}
    scraped.add("llmco2_grid_info", dict.fromkeys(hours, 0.0), **hidden)
    record = read(scraped)
    assert open_pricing(SiteChoice(), record).location.method == "marginal"
    assert "(watttime in CAISO_NORTH)" in open_pricing(SiteChoice(), record).location.words
    assert open_pricing(SiteChoice(), record).market is None
    scraped.add("llmco2_grid_info", dict.fromkeys(hours, 1.0), basis="location", method="average")
    mixed = read(scraped)
    assert any("recorded location intensities" in line for line in mixed.unknown)
    pricing = open_pricing(SiteChoice(), mixed)
    assert pricing.location.method == "average" and "shipped table" in pricing.location.words


def test_long_periods_are_asked_a_month_at_a_time_and_nothing_twice(scraped: Scraped) -> None:
    period = Period(FIRST - 24 * 365, FIRST + 48)
    record = read(scraped, period=period)
    assert sum(use.amounts["energy_joules"] for use in record.uses) == pytest.approx(40_000)
    asked = [(one["query"], one["start"]) for one in scraped.asked]
    assert len(asked) == len(set(asked)) == 13 * (len(COUNTERS) + len(GAUGES))


def test_hours_are_the_hours_of_the_values_and_carry_no_value_that_is_no_number(scraped: Scraped) -> None:
    scraped.add("llmco2_metered_energy_joules_total", {FIRST: 5.0, FIRST + 1: float("nan")}, model_name=NAME)
    energies = {use.hour: use.amounts.get("energy_joules") for use in read(scraped).uses}
    assert energies[FIRST] == 5.0 and energies[FIRST + 1] is None


def test_hours_before_and_after_the_period_are_not_in_it(scraped: Scraped) -> None:
    record = read(scraped, period=Period(FIRST + 3, FIRST + 5))
    assert [use.hour for use in record.uses] == [FIRST + 3, FIRST + 4]


def test_every_metric_asked_for_is_one_that_is_exported_and_no_matcher_may_name_its_labels() -> None:
    asked = [METRICS[counter.metric.removesuffix("_count")] for counter in COUNTERS]
    for counter, metric in zip(COUNTERS, asked, strict=True):
        assert not counter.label or counter.label in metric.labels
    asked += [METRICS[gauge.metric] for gauge in GAUGES.values()]
    assert {label for metric in asked for label in metric.labels} == set(OWN_LABELS)


def two_servers(scraped: Scraped, first: float, second: float) -> None:
    """Intensities of two servers in the first hours; both know theirs."""
    for instance, grams in (("a:1", first), ("b:1", second)):
        hours = range(FIRST, FIRST + 40)
        names = {"basis": "location", "instance": instance, "job": "vllm"}
        scraped.add("llmco2_grid_intensity_grams_per_kwh", dict.fromkeys(hours, grams), **names)
        scraped.add("llmco2_grid_intensity_known", dict.fromkeys(hours, 1.0), **names)
        scraped.add("llmco2_metered_energy_joules_total", dict.fromkeys(hours, 3.6e6), model_name="m", **names)


@pytest.mark.parametrize(("second", "known"), [(100.0, True), (100.9, True), (101.1, False), (400.0, False)])
def test_servers_that_differ_by_more_than_a_hundredth_have_no_intensity_in_common(
    scraped: Scraped, second: float, known: bool
) -> None:
    two_servers(scraped, 100.0, second)
    found = report(scraped, SiteChoice())
    assert (value(found, "hours_without_intensity") == 0) == known
    assert (value(found, "operational_location_grams") is not None) == known
    said = [line for line in found.unknown if "recorded location intensities: in 40 hours" in line]
    assert len(said) == (not known) and all("--match" in line for line in said)
    # The average of the world never stands in for zones that are known to differ.
    assert not found.cautions


def test_a_zone_reported_by_itself_has_its_own_intensity(scraped: Scraped) -> None:
    scraped.series.clear()
    two_servers(scraped, 0.0, 400.0)
    clean, dirty = (report(scraped, SiteChoice(), f'job=~"vl.*",instance="{name}:1"') for name in "ab")
    assert value(clean, "operational_location_grams") == 0.0
    assert value(dirty, "operational_location_grams") == pytest.approx(40 * 400.0)
    assert value(dirty, "energy_joules") == pytest.approx(40 * 3.6e6)


def test_matchers_are_in_every_query(scraped: Scraped) -> None:
    match = 'instance="a:1",job!="x"'
    asked = questions(PERIOD, match)
    assert len(asked) == len(COUNTERS) + len(GAUGES)
    assert all(question.expression.count(f"{{{match}}}[1h]") == 1 for question in asked)


@pytest.mark.parametrize("text", ['a="b"', ' a = "b" , c=~"d.*|e" ', r'a!~"\\d+"', r'a!="say \"x\""', 'a=""'])
def test_label_matchers_are_taken_as_they_are(text: str) -> None:
    assert check_match(text) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a=b",
        "a='b'",
        '{a="b"}',
        'a="b",',
        ',a="b"',
        'a="b"c="d"',
        '1a="b"',
        'a=="b"',
        r'a="\d"',
        'a="b\n"',
        'a="b',
    ],
)
def test_what_is_no_label_matcher_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^match=.* is not possible; allowed: label matchers with commas") as caught:
        check_match(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["model_name", "phase", "__name__"])
def test_a_label_that_only_some_metrics_have_is_no_way_to_choose(label: str) -> None:
    with pytest.raises(ValueError, match=rf"match='{label}' is not possible; allowed: labels of the scrape"):
        check_match(f'job="x",{label}="y"')


def test_an_hour_in_which_the_intensity_was_not_known_has_none(scraped: Scraped) -> None:
    hours = range(FIRST, FIRST + 40)
    grams = {hour: float("nan") if hour == FIRST + 3 else 100.0 for hour in hours}
    scraped.add("llmco2_grid_intensity_grams_per_kwh", grams, basis="location")
    scraped.add("llmco2_grid_intensity_known", {h: float(h != FIRST + 5) for h in hours}, basis="location")
    found = report(scraped, SiteChoice())
    assert value(found, "hours_without_intensity") == 2
    assert value(found, "operational_location_grams") == pytest.approx(38 * 1000 / 3.6e6 * 100)
    assert any("2 of 48 hours have no known intensity" in line for line in found.unknown)


@pytest.mark.parametrize("metric", ["grams_per_kwh", "known"])
def test_servers_that_never_knew_their_intensity_do_not_get_the_worlds(scraped: Scraped, metric: str) -> None:
    value_of_none = float("nan") if metric == "grams_per_kwh" else 0.0
    hours = dict.fromkeys(range(FIRST, FIRST + 40), value_of_none)
    scraped.add(f"llmco2_grid_intensity_{metric}", hours, basis="location")
    found = report(scraped, SiteChoice())
    assert value(found, "operational_location_grams") is None and not found.cautions


def test_servers_that_had_only_the_worlds_average_are_said_to_above_all(scraped: Scraped) -> None:
    hours = range(FIRST, FIRST + 40)
    figure = TableProvider(WORLD).at(BEGIN)
    assert figure is not None
    scraped.add("llmco2_grid_intensity_grams_per_kwh", dict.fromkeys(hours, figure.grams_per_kwh), basis="location")
    names = {"basis": "location", "method": "average", "source": figure.source, "zone": "WORLD"}
    scraped.add("llmco2_grid_info", dict.fromkeys(hours, 1.0), **names)
    assert ["the world's average" in line for line in report(scraped, SiteChoice()).cautions] == [True]
    assert not report(scraped, SiteChoice(zone="FR")).cautions


def test_wasted_tokens_make_no_figure_per_token_smaller(scraped: Scraped) -> None:
    clean = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(clean, "useful_tokens") == 200_000
    assert sum("still in what SCI is divided by" in line for line in clean.unknown) == 2
    # 500 tokens more an hour are computed, and as many are of no use.
    scraped.add(
        "llmco2_tokens_total", dict.fromkeys(range(FIRST, FIRST + 40), 4300.0), model_name=NAME, phase="prefill"
    )
    scraped.add("llmco2_tokens_total", dict.fromkeys(range(FIRST, FIRST + 40), 1200.0), model_name=NAME, phase="decode")
    # The counters were not there from the beginning.
    scraped.add("llmco2_recomputed_tokens_total", {FIRST + 39: 40 * 300.0}, model_name=NAME)
    scraped.add("llmco2_rejected_draft_tokens_total", dict.fromkeys(range(FIRST, FIRST + 40), 200.0), model_name=NAME)
    found = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(found, "prefill_tokens") == 40 * 4300 and value(found, "recomputed_tokens") == 12_000
    for name in ("useful_tokens", "sci_per_1000_tokens_grams", "energy_per_1000_tokens_joules"):
        assert value(found, name) == pytest.approx(value(clean, name)), name
    assert not any("still in what SCI is divided by" in line for line in found.unknown)
    assert "| tokens of use | 200,000 |" in markdown(found)


def test_where_more_tokens_were_wasted_than_computed_there_is_no_figure_per_token(scraped: Scraped) -> None:
    scraped.add("llmco2_recomputed_tokens_total", {FIRST: 1e6}, model_name=NAME)
    found = report(scraped, SiteChoice(grams_per_kwh=360.0))
    assert value(found, "sci_per_1000_tokens_grams") is None
    assert value(found, "energy_per_1000_tokens_joules") is None


def test_an_unknown_model_is_refused_with_those_that_are_there(scraped: Scraped) -> None:
    with pytest.raises(ValueError, match=r"model='other' is not in the data; allowed: org/model"):
        read(scraped, Selection(model="other"))


def test_a_prometheus_without_our_metrics_is_told(scraped: Scraped) -> None:
    scraped.series.clear()
    with pytest.raises(ValueError, match="no llmco2 metrics from 2026-03-02 00:00 to 2026-03-04 00:00 UTC"):
        read(scraped)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((200, b"<html>"), "answered with something that is not its matrix"),
        ((200, b'{"data": {"result": [{"metric": {}, "values": [[1]]}]}}'), "not its matrix"),
        ((200, b"[]"), "not its matrix"),
        ((422, b'{"error": "query\\ntimed out"}'), "answered 422: query timed out"),
        ((503, b"busy"), "answered 503"),
    ],
)
def test_an_answer_that_is_none_is_told_in_one_line(scraped: Scraped, broken: tuple[int, bytes], message: str) -> None:
    scraped.broken = broken
    with pytest.raises(PrometheusError, match=message) as caught:
        read(scraped)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "host:9090", "ftp://host", "http://", "http://[", 5])
def test_an_address_that_is_none_is_refused(url: object) -> None:
    with pytest.raises(PrometheusError, match="the address is not possible; allowed: http://HOST:PORT"):
        Prometheus(url)  # type: ignore[arg-type]


def test_a_prometheus_that_is_not_there_is_told_without_its_password() -> None:
    server = Prometheus("http://user:secret@127.0.0.1:1")
    with closing(server), pytest.raises(PrometheusError, match=r"prometheus 127.0.0.1:1 is not reachable") as caught:
        server.query("up", PERIOD)
    assert "secret" not in str(caught.value)


def test_the_period_is_whole_hours_up_to_now() -> None:
    now = BEGIN + 90 * 60
    assert asked_period(Selection(), now) == Period(FIRST - 6 * 24, FIRST + 1)
    assert asked_period(Selection(date(2026, 2, 27), date(2026, 3, 1)), now) == Period(FIRST - 72, FIRST)
    assert asked_period(Selection(date(2026, 3, 2), date(2026, 3, 9)), now) == Period(FIRST, FIRST + 1)
    with pytest.raises(ValueError, match="allowed: a day before now"):
        asked_period(Selection(date(2026, 3, 3)), now)
