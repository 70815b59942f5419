"""What a metered server says of itself, keeps of its windows and shows in its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pytest import approx

from llmco2_vllm.cli.main import main
from llmco2_vllm.demo.server import VllmServer
from llmco2_vllm.store.reading import samples as stored_samples
from tests.nvml_shim.shim import H100
from tests.server.clients import SIX_DIGITS, Clients, metered_joules
from tests.server.metered.device import IDLE_WATTS, Device

pytestmark = pytest.mark.server

COMPLETIONS = "/v1/completions"
MEASURED = "llmco2_energy_joules_total"
WHOLE_LOG = 1_000_000
# Values travel through a scrape as text of full precision; sums of many additions differ in their last digits.
ADDED_UP = 1e-6


def metered_device(clients: Clients) -> dict[str, Any]:
    (found,) = clients.engine()["meter"]["devices"]
    assert isinstance(found, dict)
    return found


def test_the_status_says_which_device_is_metered_and_how(clients: Clients) -> None:
    clients.wait_until(lambda: metered_device(clients)["tick_seconds"] is not None, "the tick is learnt")
    # The device publishes power as late as energy.
    clients.wait_until(lambda: metered_device(clients)["power_watts"] == IDLE_WATTS, "it is seen to be idle")
    status = clients.http.get("/carbon").raise_for_status().json()
    assert (status["meter"], status["basis"]) == ("nvml", "measured")
    assert status["predictor"].endswith("h100-sxm")
    (engine,) = status["engines"]
    meter, (device,) = engine["meter"], engine["meter"]["devices"]
    assert meter["alive"] is True
    assert 0 < meter["thread_ratio"] < 1
    assert f"{device['name']}|{device['uuid']}" == H100
    assert (device["source"], device["basis"], device["scope"]) == ("counter", "counter", "gpu")
    assert device["tick_seconds"] == approx(0.1, rel=0.1)
    assert device["reads_per_second"] <= 50
    assert engine["metered"]["recent_ratio"] > 0


def test_the_log_says_once_at_the_start_what_meters(server: VllmServer, clients: Clients) -> None:
    lines = [line for line in server.log_tail(WHOLE_LOG).splitlines() if "llmco2: predictor" in line]
    assert len(lines) == 1
    assert lines[0].endswith("device h100-sxm, meter nvml")


def test_samples_are_the_windows_and_hold_no_text_of_a_request(clients: Clients, device: Device, samples: Path) -> None:
    prompt = "Quagmire xylophone zeppelin"
    with device.drawing():
        answer = clients.post(COMPLETIONS, prompt=prompt, max_tokens=48, ignore_eos=True)
    clients.final(answer["id"])
    metered = clients.engine()["metered"]
    windows = metered["windows"] - metered["unmetered_windows"]
    clients.wait_until(lambda: clients.engine()["samples"]["samples"] >= windows, "the windows are in the store")
    found = list(stored_samples(samples))[:windows]
    assert sum(sample.energy_joules for sample in found) == approx(metered["metered_joules"], rel=1e-9)
    assert sum(len(sample.steps) for sample in found) > 0
    assert {(sample.device, sample.meter, sample.scope) for sample in found} == {("h100-sxm", "nvml", "gpu")}
    kept = b"".join(path.read_bytes() for path in samples.iterdir())
    for text in (*prompt.split(), answer["id"], *answer["choices"][0]["text"].split("\n")):
        assert len(text) < 4 or text.encode() not in kept


def test_idle_windows_hold_what_the_counter_counted_in_their_span(clients: Clients, samples: Path) -> None:
    clients.wait_trusted(10)
    stored = clients.engine()["samples"]["samples"]
    clients.wait_until(lambda: clients.engine()["samples"]["samples"] >= stored + 5, "windows of an idle device")
    for sample in list(stored_samples(samples, trusted_only=True))[-5:]:
        assert sample.energy_joules == approx(
            IDLE_WATTS * sample.duration_seconds, rel=0.1, abs=6 * sample.sigma_joules
        )
        assert (sample.idle_joules, len(sample.steps)) == (sample.energy_joules, 0)


def test_the_command_lists_the_samples_of_a_running_server(clients: Clients, samples: Path) -> None:
    clients.wait_until(lambda: clients.engine()["samples"]["samples"] > 0, "there are samples")
    answer = CliRunner().invoke(main, ["samples", "list", "--folder", str(samples), "--last", "3", "--json"])
    assert answer.exit_code == 0, answer.output
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert 0 < len(lines) <= 3
    assert all(line["energy_joules"] > 0 and line["meter"] == "nvml" for line in lines)


def test_counters_of_a_server_at_rest_are_the_ledger(clients: Clients, device: Device) -> None:
    before = clients.settled()
    with device.drawing():
        answer = clients.post(COMPLETIONS, prompt="Once upon a time", max_tokens=48, ignore_eos=True)
    final = clients.final(answer["id"])
    begin, after, end = clients.engine()["metered"], clients.settled(), clients.engine()["metered"]
    assert metered_joules(final) == approx(after.total(MEASURED) - before.total(MEASURED), rel=SIX_DIGITS)
    for phase in ("prefill", "decode"):
        assert after.total(MEASURED, phase=phase) == approx(end[f"{phase}_joules"], rel=ADDED_UP)
    for name in ("estimated", "aborted"):
        assert after.total(f"llmco2_{name}_energy_joules_total") == approx(end[f"{name}_joules"], rel=ADDED_UP)
    unattributed = after.total("llmco2_unattributed_energy_joules")
    assert unattributed == approx(end["unattributed_joules"], rel=ADDED_UP, abs=1e-9)
    # Idleness goes on.
    idle = after.total("llmco2_idle_energy_joules_total", state="awake")
    assert begin["idle_joules"] * (1 - ADDED_UP) <= idle <= end["idle_joules"] * (1 + ADDED_UP)
    parts = idle + unattributed + after.total(MEASURED)
    assert after.total("llmco2_metered_energy_joules_total") == approx(parts, rel=ADDED_UP)
    assert after.total("llmco2_meter_up") == 1


def test_errors_of_the_prediction_are_shown_by_the_mix_of_phases(clients: Clients, device: Device) -> None:
    def reports() -> int:
        return len(clients.engine()["metered"]["reports"])

    told = reports()

    def one_more() -> bool:
        clients.post(COMPLETIONS, prompt="Once upon a time", max_tokens=48, ignore_eos=True)
        return reports() > told

    with device.drawing():
        clients.wait_until(one_more, "5 s of windows are compared")
    metered, shown = clients.engine()["metered"], clients.settled()
    assert shown.total("llmco2_window_error_ratio_count") == len(metered["reports"])
    for mix, ratio in metered["bias_ratio"].items():
        assert shown.total("llmco2_prediction_bias_ratio", phase_mix=mix) == approx(ratio, rel=ADDED_UP)
    assert metered["bias_ratio"]
