"""``GET /carbon/live`` of a real server in a real browser: it loads, follows the load, and outlives a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from tests.chromium import PICTURES, chromium
from tests.nvml_shim import shim
from tests.nvml_shim.fixtures import shim_folder
from tests.server.clients import MODEL, Clients
from tests.server.metered.device import IDLE_WATTS, Device

__all__ = ["shim_folder"]

pytestmark = pytest.mark.server

KEY = "sesame"
ARGUMENTS = (
    *("--served-model-name", MODEL, "--api-key", KEY, "--carbon", "--carbon-config.live", "true"),
    *("--carbon-config.meter", "nvml", "--carbon-config.device", "h100-sxm"),
    *("--carbon-config.intensity", "56", "--carbon-config.zone", "FR"),
)
PAINT_SECONDS = 1.0
PATIENCE_MILLISECONDS = 120_000
PAGE = "/carbon/live"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with shim.Control(tmp_path_factory.mktemp("device") / "control") as control:
        yield Device(control)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(browser: Any, model_dir: Path, shim_folder: Path, device: Device) -> Iterator[VllmServer]:
    environment = shim.environment(shim_folder, shim.Settings(devices=(shim.H100,)), control=device.control)
    with VllmServer(model_dir, ARGUMENTS, environment, choose_port(None)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def clients(server: VllmServer) -> Iterator[Clients]:
    with Clients(server.url, KEY) as clients:
        yield clients


@pytest.fixture
def tab(browser: Any, server: VllmServer) -> Iterator[Any]:
    """The page after the key was given; nothing may go wrong in it but answers the server did not give."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.goto(server.url + PAGE)
    field = page.get_by_role("textbox", name="API key")
    field.fill(KEY)
    field.press("Enter")
    page.locator("#figures").wait_for()
    yield page
    page.context.close()
    assert [text for text in errors if not text.startswith("Failed to load resource")] == []


def says(tab: Any, name: str, pattern: str) -> str:
    """The text of an element once it matches."""
    from playwright.sync_api import expect

    found = tab.locator(f"#{name}")
    expect(found).to_have_text(re.compile(pattern), timeout=PATIENCE_MILLISECONDS)
    return str(found.inner_text())


def under_load(clients: Clients, device: Device, calls: int) -> None:
    def call(number: int) -> None:
        clients.post("/v1/completions", prompt=f"Story {number}: once upon a time", max_tokens=64, ignore_eos=True)

    with device.drawing(), ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(calls)))


def test_the_page_is_open_and_its_figures_are_behind_the_key(server: VllmServer, clients: Clients) -> None:
    page = httpx.get(server.url + PAGE, trust_env=False)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert len(page.content) < 150_000
    assert MODEL.encode() not in page.content
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.get(f"{server.url}{PAGE}.json", headers=headers, trust_env=False).status_code == 401
    figures = clients.http.get(f"{PAGE}.json").raise_for_status()
    assert figures.json()["schema"] == "llmco2-live/1"
    assert len(figures.content) < 10_000


def test_the_first_paint_comes_within_a_second(tab: Any) -> None:
    tab.reload()
    tab.locator("#figures").wait_for()
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
    assert 0 < paint < PAINT_SECONDS
    print(f"first contentful paint {paint:.3f} s")


def test_figures_follow_the_load_and_are_those_of_the_server(tab: Any, clients: Clients, device: Device) -> None:
    says(tab, "power", rf"^{IDLE_WATTS:.1f} W$")
    under_load(clients, device, 24)
    says(tab, "chart-words", r"predicted .* W, measured .* W")
    rows = tab.locator("#requests tr")
    rows.nth(19).wait_for()
    assert rows.count() == 20
    assert tab.locator("#chart path.measured").count() >= 1
    clients.settled()
    says(tab, "running", "^0$")
    figures = clients.http.get(f"{PAGE}.json").json()
    engine = clients.engine()
    for phase in ("prefill", "decode"):
        assert figures["predicted"][f"{phase}_joules"] == pytest.approx(engine[f"{phase}_joules"], rel=1e-9)
        assert figures["tokens"][phase] == engine[f"{phase}_tokens"]
    assert len(figures["requests"]) == 20
    assert all("id" not in request and request["predicted_joules"] > 0 for request in figures["requests"])
    assert sorted(r["time_epoch_seconds"] for r in figures["requests"])[::-1] == [
        r["time_epoch_seconds"] for r in figures["requests"]
    ]
    PICTURES.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.screenshot(path=str(PICTURES / f"live-{scheme}.png"), full_page=True)


def test_the_page_outlives_a_restart_of_the_server(tab: Any, server: VllmServer, clients: Clients) -> None:
    server.stop()
    says(tab, "state", r"^Server not reachable, last figures of \d\d:\d\d:\d\d; asking again$")
    assert tab.locator("#figures").is_visible()
    server.start()
    server.wait_ready()
    says(tab, "state", "^Live")
    says(tab, "requests", "^None yet$")
    clients.post("/v1/completions", prompt="Once upon a time", max_tokens=8)
    says(tab, "requests", r"^\d\d:\d\d:\d\d")
