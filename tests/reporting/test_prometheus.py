"""From Prometheus's answers to a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import date

import pytest

from llmco2_vllm.reporting import prometheus
from llmco2_vllm.reporting.figures import ALL
from llmco2_vllm.reporting.hours import Period, Record, Selection
from llmco2_vllm.reporting.page import html
from llmco2_vllm.reporting.pricing import SiteChoice, open_pricing
from llmco2_vllm.reporting.prometheus import COUNTERS, Prometheus, PrometheusError, asked_period, questions
from llmco2_vllm.reporting.report import Report, make_report
from llmco2_vllm.reporting.writing import markdown
from llmco2_vllm.telemetry.metrics import METRICS
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


def read(scraped: Scraped, selection: Selection | None = None, period: Period = PERIOD) -> Record:
    with closing(Prometheus(scraped.url)) as server:
        return prometheus.read(server, selection or Selection(), period, questions(period))


def report(scraped: Scraped, site: SiteChoice) -> Report:
    record = read(scraped)
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
    assert len(asked) == len(set(asked)) == 13 * (len(COUNTERS) + 3)


def test_hours_are_the_hours_of_the_values_and_carry_no_value_that_is_no_number(scraped: Scraped) -> None:
    scraped.add("llmco2_metered_energy_joules_total", {FIRST: 5.0, FIRST + 1: float("nan")}, model_name=NAME)
    energies = {use.hour: use.amounts.get("energy_joules") for use in read(scraped).uses}
    assert energies[FIRST] == 5.0 and energies[FIRST + 1] is None


def test_hours_before_and_after_the_period_are_not_in_it(scraped: Scraped) -> None:
    record = read(scraped, period=Period(FIRST + 3, FIRST + 5))
    assert [use.hour for use in record.uses] == [FIRST + 3, FIRST + 4]


def test_every_counter_asked_for_is_one_that_is_exported() -> None:
    for counter in COUNTERS:
        metric = METRICS[counter.metric.removesuffix("_count")]
        assert not counter.label or counter.label in metric.labels


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
