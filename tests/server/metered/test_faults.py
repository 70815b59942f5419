"""The meter fails while requests run: serving goes on, every answer has its annotation, nothing false is measured.

The device is mended at the end of each test, and its windows are trusted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from tests.nvml_shim.shim import ENERGY_FIELD, LOST, NOT_SUPPORTED
from tests.server.clients import MODEL, Clients, checked_metered
from tests.server.metered.device import Device

pytestmark = pytest.mark.server

COMPLETIONS = "/v1/completions"
STORY_TOKENS = 160
SHORT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}


def metered_device(clients: Clients) -> dict[str, Any]:
    (found,) = clients.engine()["meter"]["devices"]
    assert isinstance(found, dict)
    return found


def faults(clients: Clients, kind: str) -> int:
    return int(metered_device(clients)["faults"].get(kind, 0))


def wait_source(clients: Clients, source: str) -> None:
    clients.wait_until(lambda: metered_device(clients)["source"] == source, f"the meter reads: {source}")


def short_answer(clients: Clients, device: Device) -> Any:
    with device.drawing():
        return clients.post(COMPLETIONS, **SHORT)


def during_a_story(clients: Clients, device: Device, fault: Callable[[], None]) -> tuple[str, dict[str, Any]]:
    """Response id and annotation of a streamed answer in the midst of which ``fault`` is called."""
    stream = clients.openai.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=STORY_TOKENS, stream=True, extra_body={"ignore_eos": True}
    )
    with device.drawing(), stream:
        assert len(list(islice(stream, 24))) == 24
        fault()
        *_, last = stream
    assert last.choices[0].finish_reason == "length"
    return last.id, checked_metered((last.model_extra or {})["carbon"])


@pytest.fixture(autouse=True)
def well_before_and_after(clients: Clients, device: Device) -> Iterator[None]:
    """A fault leaves nothing behind: afterwards a request is measured by the counter, and no hook has failed."""
    wait_source(clients, "counter")
    clients.wait_trusted()
    yield
    device.control.mend()
    wait_source(clients, "counter")
    clients.wait_trusted()
    clients.final(short_answer(clients, device)["id"])
    status = clients.http.get("/carbon").raise_for_status().json()
    assert status["front_end"] == {"active": True, "failures": {}}
    assert status["engines"][0]["failures"] == {}
    assert status["engines"][0]["active"] is True
    metered = status["engines"][0]["metered"]
    assert abs(metered["residual_joules"]) <= 1e-9 * metered["metered_joules"]


def test_a_counter_that_is_reset_costs_a_request_one_window(clients: Clients, device: Device) -> None:
    known = faults(clients, "counter decreased")
    response_id, _ = during_a_story(clients, device, device.control.reset)
    clients.wait_trusted()
    final = checked_metered(clients.found(response_id))
    assert final["basis"] == "mixed"
    assert final["coverage_ratio"] < 1
    assert faults(clients, "counter decreased") == known + 1
    assert metered_device(clients)["source"] == "counter"


def test_without_a_counter_power_is_integrated_and_the_meter_says_so(clients: Clients, device: Device) -> None:
    known = faults(clients, "not supported")

    def refuse() -> None:
        device.control.fail(NOT_SUPPORTED, ENERGY_FIELD)
        wait_source(clients, "power")

    before = clients.engine()["metered"]
    response_id, _ = during_a_story(clients, device, refuse)
    assert faults(clients, "not supported") > known
    assert metered_device(clients)["basis"] == "instant power"
    answer = short_answer(clients, device)
    checked_metered(answer["carbon"])
    clients.final(answer["id"])
    assert checked_metered(clients.found(response_id))["basis"] in ("mixed", "measured")
    after = clients.engine()["metered"]
    assert after["metered_joules"] > before["metered_joules"]
    assert after["doubtful_windows"] > before["doubtful_windows"], "integrated power teaches nothing"


def test_while_the_device_is_lost_requests_are_predicted_and_never_called_measured(
    clients: Clients, device: Device
) -> None:
    known, before = faults(clients, "device lost"), clients.engine()["metered"]

    def lose() -> None:
        device.control.fail(LOST)
        wait_source(clients, "none")

    response_id, carbon = during_a_story(clients, device, lose)
    assert carbon["basis"] != "measured"
    assert faults(clients, "device lost") == known + 1
    assert clients.metrics().total("llmco2_meter_up") == 0
    dark = short_answer(clients, device)
    assert checked_metered(dark["carbon"])["basis"] == "predicted"
    assert "device lost" in dark["carbon"]["meter_reason"]
    device.control.mend()
    wait_source(clients, "counter")
    clients.wait_trusted()
    assert clients.metrics().total("llmco2_meter_up") == 1
    cut, lost = (checked_metered(clients.found(found)) for found in (response_id, dark["id"]))
    assert (cut["basis"], cut["coverage_ratio"] < 1) == ("mixed", True)
    assert (lost["basis"], "coverage_ratio" in lost) == ("predicted", False)
    after = clients.engine()["metered"]
    assert after["unmetered_seconds"] > before["unmetered_seconds"]
    assert after["estimated_joules"] > before["estimated_joules"], "what no window covers is estimated, and said so"


def test_a_counter_that_stands_still_under_work_is_not_believed(clients: Clients, device: Device) -> None:
    known = faults(clients, "counter frozen while busy")

    def freeze() -> None:
        device.control.freeze()
        clients.wait_until(
            lambda: faults(clients, "counter frozen while busy") == known + 1, "the counter is seen to stand still"
        )

    response_id, _ = during_a_story(clients, device, freeze)
    assert metered_device(clients)["source"] == "power"
    answer = short_answer(clients, device)
    clients.final(answer["id"])
    final = checked_metered(clients.found(response_id))
    assert final["basis"] == "mixed"
    assert final["coverage_ratio"] < 1
    device.control.mend()
    device.control.fail(LOST)
    wait_source(clients, "none")
