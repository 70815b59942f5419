"""A metered server under load, scraped by real Prometheus: every panel has data, and it is what the ledgers say."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from llmco2_vllm.dashboards.dashboard import dashboard
from llmco2_vllm.dashboards.rules import ALERTS, RECORDS
from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from llmco2_vllm.predictor.calibration import RooflineCalibration
from tests.nvml_shim import shim
from tests.observability import asking, traffic
from tests.observability.conftest import Scrape
from tests.observability.scraping import Prometheus
from tests.prometheus import Promtool, promtool
from tests.server.clients import MODEL, SIX_DIGITS, Clients, metered_joules
from tests.server.metered.device import BUSY_WATTS, IDLE_WATTS, Device

__all__ = ["promtool"]

pytestmark = pytest.mark.server

INTENSITY, PUE = 250.0, 1.2
ARGUMENTS = (
    *("--served-model-name", MODEL, "--max-num-seqs", "16", "--carbon"),
    *("--carbon-config.meter", "nvml", "--carbon-config.device", "h100-sxm", "--carbon-config.pue", str(PUE)),
    *("--carbon-config.zone", "FR", "--carbon-config.market_intensity", "40"),
)
# A device as slow as this host, so that panels look as they do where the predictor is right.
SLOW = {
    "compute_efficiency": 2e-4,
    "bandwidth_efficiency": 5e-3,
    "step_overhead_seconds": 0.02,
    "layer_overhead_seconds": 0.0,
    "static_power_ratio": 0.36,
    "compute_power_ratio": 0.0,
    "memory_power_ratio": 0.0,
}
LOADS_WATTS, LOAD_SECONDS, PAUSE_SECONDS = (BUSY_WATTS, 240.0, 280.0), 18.0, 4.0
# Sums of many additions, through text of full precision.
ADDED_UP = 1e-6
# Of either sign by what they are.
SIGNED = {
    "Predicted against measured",
    "Unattributed energy",
    "Conservation residual",
    "Drift: bias of the prediction",
    "By model",
}
# Series that are there once something has gone wrong.
ONLY_AFTER_A_FAULT = ("llmco2_hook_failures_total", "llmco2_unpriced_energy_joules_total")
DASHBOARD = dashboard()


@dataclass(frozen=True)
class Run:
    """What was sent and told, and the figures of the engine before and after, at rest."""

    prometheus: list[Prometheus]
    span: asking.Span
    counted: list[dict[str, float]]
    before: dict[str, Any]
    after: dict[str, Any]
    finals: list[dict[str, Any]]


@pytest.fixture(scope="module")
def intensities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the intensity of this day, hour by hour."""
    path = tmp_path_factory.mktemp("grid") / "intensity.csv"
    hour = time.time() // 3600 * 3600
    times = [datetime.fromtimestamp(hour + 3600 * k, UTC).isoformat() for k in range(-2, 4)]
    path.write_text("datetime_utc,FR\n" + "".join(f"{at},{INTENSITY}\n" for at in times))
    return path


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the Roofline of a slow device."""
    shipped = RooflineCalibration.load()
    gpu = replace(shipped.kinds["gpu"], coefficients=replace(shipped.kinds["gpu"].coefficients, **SLOW))
    path = tmp_path_factory.mktemp("predictor") / "slow.json"
    path.write_text(json.dumps(replace(shipped, version="slow/1", kinds={**shipped.kinds, "gpu": gpu}).to_dict()))
    return path


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with shim.Control(tmp_path_factory.mktemp("device") / "control") as control:
        yield Device(control)


@pytest.fixture(scope="module")
def server(
    model_dir: Path, shim_folder: Path, device: Device, intensities: Path, predictor: Path
) -> Iterator[VllmServer]:
    environment = shim.environment(shim_folder, shim.Settings(devices=(shim.H100,)), control=device.control)
    files = ("--carbon-config.intensity_file", str(intensities), "--carbon-config.predictor", str(predictor))
    with VllmServer(model_dir, (*ARGUMENTS, *files), environment, choose_port(None)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def clients(server: VllmServer) -> Iterator[Clients]:
    with Clients(server.url) as clients:
        yield clients


def counters(prometheus: Prometheus, clients: Clients) -> dict[str, float]:
    """Counters of an engine at rest, as Prometheus has them once it has seen the last step."""
    steps = clients.engine()["steps"]
    clients.wait_until(lambda: prometheus.value("sum(llmco2_steps_total)") == steps, "the last step is scraped")
    names = ("energy", "estimated_energy", "aborted_energy", "predicted_energy", "predicted_aborted_energy")
    found = {name: prometheus.value(f"sum(llmco2_{name}_joules_total)") for name in names}
    return found | {"carbon": prometheus.value("sum(llmco2_carbon_grams_total)")}


def at_rest(clients: Clients) -> dict[str, Any]:
    """Figures of the engine once every step is settled and the front end has recorded it."""
    clients.wait_until(lambda: clients.engine()["running_requests"] == 0, "the engine let go of who hung up")
    clients.wait_trusted(60)
    clients.settled()
    time.sleep(2.5)  # two scrapes
    return clients.engine()


@pytest.fixture(scope="module")
def run(server: VllmServer, clients: Clients, device: Device, scrape: Scrape) -> Run:
    clients.wait_trusted(20)
    found = scrape(server)
    begin = time.time()
    before = at_rest(clients)
    first = [counters(prometheus, clients) for prometheus in found]
    answers: list[dict[str, Any]] = []
    for watts in LOADS_WATTS:
        with device.drawing(watts):
            answers += traffic.send(clients, LOAD_SECONDS)
            clients.wait_until(lambda: clients.engine()["running_requests"] == 0, "the engine let go of who hung up")
        time.sleep(PAUSE_SECONDS)
    after = at_rest(clients)
    last = [counters(prometheus, clients) for prometheus in found]
    grown = [{name: b[name] - a[name] for name in b} for a, b in zip(first, last, strict=True)]
    finals = [clients.final(answer["id"]) for answer in answers]
    device.control.fail(shim.LOST)
    clients.wait_until(lambda: clients.engine()["meter"]["devices"][0]["source"] != "counter", "the device is lost")
    device.control.mend()
    clients.wait_until(lambda: clients.engine()["meter"]["devices"][0]["source"] == "counter", "it is back")
    # What is kept ends under load, so that pictures show a server at work.
    with device.drawing(BUSY_WATTS):
        traffic.send(clients, LOAD_SECONDS)
        span = asking.Span(begin, time.time())
    return Run(found, span, grown, before, after, finals)


@pytest.mark.parametrize("panel", asking.all_panels(DASHBOARD), ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_has_an_answer_of_the_right_sign(run: Run, panel: dict[str, Any]) -> None:
    for number, prometheus in enumerate(run.prometheus):
        results = asking.answered(prometheus, panel, run.span)
        if number == 0:
            asking.keep(asking.ANSWERS, panel, results)
        for answer in results:
            if any(name in answer["query"] for name in ONLY_AFTER_A_FAULT):
                continue
            found = list(asking.values(answer["result"]))
            assert found, f"Prometheus {prometheus.version}, no data: {answer['query']}"
            assert panel["title"] in SIGNED or min(found) >= 0.0, answer["query"]


def test_figures_are_those_of_the_device_and_the_settings(run: Run) -> None:
    def last(title: str) -> list[float]:
        (panel,) = [panel for panel in asking.all_panels(DASHBOARD) if panel["title"] == title]
        return [v for a in asking.answered(run.prometheus[0], panel, run.span) for v in asking.values(a["result"])]

    assert min(last("Power")) >= 0.9 * IDLE_WATTS
    assert max(last("Power")) <= 1.1 * BUSY_WATTS
    assert set(last("Grid intensity")) == {INTENSITY, 40.0}
    assert set(last("Age of the intensity")) == {0.0}
    # At the full power of the device for an hour, with the site's share: 300 W x 1.2 x 250 g/kWh = 90 g.
    assert max(last("Carbon per hour")) <= 1.5 * BUSY_WATTS / 1000 * PUE * INTENSITY
    assert all(0.0 <= share <= 1.0 + ADDED_UP for title in ("Coverage", "Idle share") for share in last(title))


@pytest.fixture(scope="module")
def scraped(run: Run, clients: Clients) -> str:
    return clients.http.get("/metrics").raise_for_status().text


def half_of_the_last_digit(figures: Iterable[float]) -> float:
    """What rounding each to six digits can have changed their sum by, at most."""
    return sum(0.5 * 10.0 ** (math.floor(math.log10(figure)) - 5) for figure in figures if figure)


def test_what_was_told_and_what_was_aborted_is_what_prometheus_counted(run: Run) -> None:
    assert len(run.finals) > 20
    told = [metered_joules(final) for final in run.finals]
    predicted = [final["estimate"]["energy_joules"] for final in run.finals]
    grams = [final["carbon_grams"]["operational"] for final in run.finals]
    for counted in run.counted:
        charged = counted["energy"] + counted["estimated_energy"]
        # Six digits are told.
        near = half_of_the_last_digit(told)
        assert sum(told) + counted["aborted_energy"] == approx(charged, abs=near)
        near = half_of_the_last_digit(predicted)
        assert sum(predicted) + counted["predicted_aborted_energy"] == approx(counted["predicted_energy"], abs=near)
        assert counted["carbon"] == approx(counted["energy"] * PUE * INTENSITY / 3.6e6, rel=ADDED_UP)
        assert sum(grams) == approx(sum(told) * PUE * INTENSITY / 3.6e6, rel=SIX_DIGITS)


def test_ledgers_of_the_engine_are_what_prometheus_counted_to_a_millionth(run: Run) -> None:
    a, b = run.before, run.after
    ledgers = {
        "energy": b["metered"]["attributed_joules"] - a["metered"]["attributed_joules"],
        "estimated_energy": b["metered"]["estimated_joules"] - a["metered"]["estimated_joules"],
        "aborted_energy": b["metered"]["aborted_joules"] - a["metered"]["aborted_joules"],
        "predicted_energy": sum(b[f"{phase}_joules"] - a[f"{phase}_joules"] for phase in ("prefill", "decode")),
        "predicted_aborted_energy": b["aborted_joules"] - a["aborted_joules"],
    }
    for counted in run.counted:
        for name, joules in ledgers.items():
            assert counted[name] == approx(joules, rel=ADDED_UP, abs=1e-9), name


def test_promtool_finds_nothing_wrong_with_our_part_of_a_real_scrape(scraped: str, promtool: Promtool) -> None:
    ours = "".join(line for line in scraped.splitlines(keepends=True) if "llmco2_" in line)
    answer = promtool("check", "metrics", text=ours)
    assert ours
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_prometheus_reads_our_rules_and_nothing_is_wrong_with_them(run: Run) -> None:
    for prometheus in run.prometheus:
        rules = prometheus.rules()
        assert {rule["name"] for rule in rules} == {rule.name for rule in (*RECORDS, *ALERTS)}
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        assert not [rule["lastError"] for rule in rules if rule.get("lastError")]
        # The meter was lost for a moment, and nothing else was wrong.
        assert {rule["name"] for rule in rules if rule.get("state") == "firing"} == set()
