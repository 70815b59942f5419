"""Measured energy of real requests: final figures, power that rises, idleness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest import approx

from tests.server.clients import SIX_DIGITS, Clients, assert_tokens, checked_metered, metered_joules
from tests.server.metered.device import BUSY_WATTS, IDLE_WATTS, Device

pytestmark = pytest.mark.server

COMPLETIONS = "/v1/completions"
# Long enough for many windows of 0.1 s on any CPU.
STORY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 96, "ignore_eos": True}
# The edges of a request lie inside windows, whose rest is put down to idleness as far as that is known.
EDGES = 0.1


def as_json(clients: Clients) -> dict[str, Any]:
    return clients.post(COMPLETIONS, **STORY)


def as_stream(clients: Clients) -> dict[str, Any]:
    *_, last, done = clients.events(COMPLETIONS, **STORY, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert isinstance(last, dict)
    return last


@pytest.mark.parametrize("ask_for", [as_json, as_stream])
def test_a_response_says_how_much_of_it_is_measured_and_its_final_figure_is_measured_wholly(
    clients: Clients, device: Device, ask_for: Callable[[Clients], dict[str, Any]]
) -> None:
    with device.drawing():
        answer = ask_for(clients)
    carbon = checked_metered(answer["carbon"])
    assert carbon["basis"] in ("mixed", "measured")
    final = clients.final(answer["id"])
    assert final["coverage_ratio"] == 1
    open_parts = dict.fromkeys(("basis", "coverage_ratio", "energy_joules", "carbon_grams", "sci"))
    assert {**final, **open_parts} == {**carbon, **open_parts}, "only what is measured was still open"
    assert_tokens(final, answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])


def test_the_final_figure_of_a_request_alone_is_what_the_engine_measured_meanwhile(
    clients: Clients, device: Device
) -> None:
    before = clients.engine()["metered"]
    with device.drawing():
        answer = as_json(clients)
    final, after = clients.final(answer["id"]), clients.engine()["metered"]
    for phase in ("prefill", "decode"):
        grown = after[f"{phase}_joules"] - before[f"{phase}_joules"]
        assert final["energy_joules"][phase] == approx(grown, rel=SIX_DIGITS)
    assert metered_joules(final) == approx(after["attributed_joules"] - before["attributed_joules"], rel=SIX_DIGITS)


def test_a_request_carries_the_hardware_for_the_time_it_held_it(clients: Clients, device: Device) -> None:
    before = clients.settled()
    with device.drawing():
        answer = as_json(clients)
    final = clients.final(answer["id"])
    hardware = clients.http.get("/carbon").raise_for_status().json()["embodied"]
    grams, held = final["carbon_grams"], final["embodied"]["held_seconds"]
    assert grams["embodied"] == approx(held * hardware["rate_grams_per_second"], rel=SIX_DIGITS)
    assert grams["total"] == approx(grams["operational"] + grams["embodied"], rel=SIX_DIGITS)
    assert final["sci"]["per_request"] == grams["total"]
    after = clients.settled()
    name, rate = "llmco2_embodied_carbon_grams_total", hardware["rate_grams_per_second"]
    busy = after.total("llmco2_step_duration_seconds_total") - before.total("llmco2_step_duration_seconds_total")
    assert after.total(name, state="busy") - before.total(name, state="busy") == approx(rate * busy, rel=1e-6)
    assert after.total(name, state="idle") > before.total(name, state="idle"), "idle time is a line of its own"


def test_measured_energy_follows_the_power_of_the_device_while_the_estimate_stays(
    clients: Clients, device: Device
) -> None:
    watts, estimates = [], []
    for factor in (1, 2):
        seconds = clients.engine_total("step_seconds")
        with device.drawing(factor * BUSY_WATTS):
            answer = as_json(clients)
        seconds = clients.engine_total("step_seconds") - seconds
        final = clients.final(answer["id"])
        # Per second of its steps: how fast this machine decodes is no matter.
        watts.append(metered_joules(final) / seconds)
        estimates.append(final["estimate"])
    assert watts[0] == approx(BUSY_WATTS, rel=EDGES)
    assert watts[1] / watts[0] == approx(2.0, rel=EDGES)
    assert estimates[0] == estimates[1]


def test_the_energy_of_an_idle_server_is_idle_energy_and_teaches_its_idle_power(
    clients: Clients, device: Device
) -> None:
    more = 1.5 * IDLE_WATTS
    clients.wait_trusted()
    before = clients.engine()["metered"]
    learned = before["idle_power_watts"]["awake"]
    assert IDLE_WATTS * 0.98 <= learned <= more, "what it has drawn without work since it started"
    with device.drawing(more):
        clients.wait_until(
            lambda: clients.engine()["metered"]["idle_power_watts"]["awake"] > learned + 0.5, "idle power is learned"
        )
        after = clients.engine()["metered"]
    assert after["idle_power_watts"]["awake"] <= more * 1.02
    grown = {key: after[key] - before[key] for key in before if key.endswith("_joules")}
    assert grown["idle_joules"] > 0
    assert grown["idle_joules"] == approx(grown["metered_joules"])
    for key in ("attributed_joules", "prefill_joules", "decode_joules", "sleeping_joules", "estimated_joules"):
        assert grown[key] == 0
