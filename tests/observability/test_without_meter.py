"""A server without a meter, scraped by real Prometheus: what is predicted has data, what is not measured has none."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from pytest import approx

from llmco2_vllm.dashboards.dashboard import dashboard
from llmco2_vllm.dashboards.promql import families
from tests.conftest import Serve
from tests.observability import asking, traffic
from tests.observability.conftest import Scrape
from tests.observability.scraping import Prometheus
from tests.server.clients import MODEL, SIX_DIGITS, Clients, joules

pytestmark = pytest.mark.server

ARGUMENTS = (
    "--served-model-name",
    MODEL,
    "--carbon",
    "--carbon-config.intensity",
    "56",
    "--carbon-config.meter",
    "none",
)
LOAD_SECONDS = 20.0
DASHBOARD = dashboard()
PREDICTED = {
    "llmco2_predicted_energy_joules_total",
    "llmco2_predicted_carbon_grams_total",
    "llmco2_predicted_aborted_energy_joules_total",
    "llmco2_request_predicted_energy_joules",
    "llmco2_tokens_total",
    "llmco2_cached_tokens_total",
    "llmco2_recomputed_tokens_total",
    "llmco2_rejected_draft_tokens_total",
    "llmco2_steps_total",
    "llmco2_step_duration_seconds_total",
    "llmco2_predicted_step_duration_seconds_total",
    "llmco2_hook_duration_seconds_total",
    "llmco2_hook_active",
    "llmco2_build_info",
    "llmco2_grid_intensity_grams_per_kwh",
    "llmco2_grid_intensity_estimated",
    "llmco2_grid_intensity_known",
    "llmco2_grid_info",
}
# There where it is known, whether or not there is a meter; without a time of its own an intensity has no age.
EITHER = {
    "llmco2_embodied_carbon_grams_total",
    "llmco2_hook_failures_total",
}


@dataclass(frozen=True)
class Run:
    """What was predicted for those who got an answer, and the range in which."""

    prometheus: list[Prometheus]
    span: asking.Span
    answers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(serve: Serve, scrape: Scrape) -> Run:
    server = serve(ARGUMENTS)
    with Clients(server.url) as clients:
        found = scrape(server)
        begin = time.time()
        clients.settled()
        time.sleep(2.5)
        answers = traffic.send(clients, LOAD_SECONDS)
        clients.wait_until(lambda: clients.engine()["running_requests"] == 0, "the engine let go of who hung up")
        clients.settled()
        steps = clients.engine()["steps"]
        for prometheus in found:
            clients.wait_until(lambda p=prometheus: p.value("sum(llmco2_steps_total)") == steps, "it is scraped")
    return Run(found, asking.Span(begin, time.time()), answers)


@pytest.mark.parametrize("panel", asking.all_panels(DASHBOARD), ids=lambda panel: panel["title"])
def test_what_is_predicted_has_data_and_what_is_not_measured_has_none(run: Run, panel: dict[str, Any]) -> None:
    for number, prometheus in enumerate(run.prometheus):
        results = asking.answered(prometheus, panel, run.span)
        if number == 0:
            asking.keep(asking.ANSWERS / "without_meter", panel, results)
        for answer in results:
            names = set(families([answer["query"]]))
            if names & EITHER:
                continue
            found = list(asking.values(answer["result"]))
            assert bool(found) == (names <= PREDICTED), answer["query"]
            assert not found or min(found) >= 0.0


def test_what_was_told_and_what_was_aborted_is_what_prometheus_counted(run: Run) -> None:
    assert len(run.answers) > 10
    for prometheus in run.prometheus:
        spent, aborted = (
            prometheus.value(f"sum(llmco2_predicted_{name}energy_joules_total)") for name in ("", "aborted_")
        )
        told = sum(joules(answer["carbon"]) for answer in run.answers)
        assert told + aborted == approx(spent, rel=SIX_DIGITS)
