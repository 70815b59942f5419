"""What ``/carbon/live`` shows: the document states what is known and no more, and a browser draws the page."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.config import Settings
from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.vllm_plugin import live
from llmco2_vllm.vllm_plugin.frontend import CarbonFrontEnd
from tests.chromium import PICTURES, chromium
from tests.vllm_plugin.live_pages import (
    ACCOUNTING,
    HARDWARE,
    NOON,
    STARTED,
    Site,
    Watched,
    annotation,
    engine,
    finished,
    site,
    status,
    unmetered,
)

BIGGEST_DOCUMENT_BYTES = 10_000
BIGGEST_PAGE_BYTES = 150_000


def made(*engines: dict[str, Any], accounting: Accounting = ACCOUNTING, **changes: Any) -> dict[str, Any]:
    return live.document(status(*engines, **changes), accounting, finished(3), NOON)


# ------------------------------------------------------------------------------------------------------ the document


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=4))
def test_energies_are_the_sums_over_the_engines(seconds: list[float]) -> None:
    engines = [engine(s) for s in seconds]
    found = made(*engines)
    for phase in ("prefill", "decode"):
        name = f"{phase}_joules"
        assert found["predicted"][name] == pytest.approx(sum(e[name] for e in engines), rel=1e-11)
        assert found["measured"][name] == pytest.approx(sum(e["metered"][name] for e in engines), rel=1e-11)
        assert found["tokens"][phase] == sum(e[f"{phase}_tokens"] for e in engines)
    assert found["power"]["measured_watts"] == pytest.approx(312.5 * len(engines))
    assert found["running_requests"] == 3 * len(engines)
    assert found["trust"]["coverage_ratio"] == pytest.approx(1 / 1.01)


def test_grams_of_a_joule_are_those_of_the_accounting() -> None:
    assert made(engine())["grams_per_joule"] == pytest.approx(56 * 1.2 / 3.6e6)


@pytest.mark.parametrize("policy", ["line", "busy"])
def test_embodied_carbon_is_that_of_the_time_since_the_start_whoever_carries_idle_time(policy: Any) -> None:
    hardware = type(HARDWARE)("product", 0.002, idle=policy)
    found = made(engine(), accounting=ACCOUNTING._replace(hardware=hardware))["embodied"]
    assert found["busy_grams"] + found["idle_grams"] == pytest.approx(0.002 * (NOON - STARTED))
    assert found["idle_grams"] == pytest.approx(0.002 * 1400.0)
    assert found["grams_per_hour"] == pytest.approx(7.2)


@pytest.mark.parametrize("engines", [(), (unmetered(),), (engine(), unmetered())])
def test_what_one_engine_does_not_measure_is_not_measured(engines: tuple[dict[str, Any], ...]) -> None:
    found = made(*engines)
    assert found["measured"] is None
    assert found["power"] == {"measured_watts": None, "idle_watts": None}
    assert [found["trust"][key] for key in ("coverage_ratio", "residual_joules", "faults")] == [None] * 3
    assert found["trust"]["bias_ratio"] == {}


def test_without_an_engine_nothing_is_known_and_nothing_is_zero() -> None:
    found = made()
    values = (*found["predicted"].values(), *found["tokens"].values(), found["running_requests"], found["embodied"])
    assert set(values) == {None}
    assert found["trust"]["hook_active"] is None


def test_a_device_that_is_lost_has_no_power_and_takes_the_sum_with_it() -> None:
    lost = {"source": "none", "power_watts": None, "faults": {"device lost": 2}}
    devices = engine()["meter"]["devices"]
    found = made(engine(meter={"devices": [*devices, lost]}))
    assert found["power"]["measured_watts"] is None
    assert found["trust"]["sources"] == ["counter", "none"]
    assert found["trust"]["faults"] == {"device lost": 2}


def test_without_an_intensity_or_a_hardware_grams_are_not_known() -> None:
    found = made(engine(), accounting=Accounting(None), intensity=None)
    assert (found["grams_per_joule"], found["embodied"], found["intensity"]) == (None, None, None)


def test_signs_do_not_cancel_between_engines() -> None:
    parts = [engine(), engine()]
    for part, sign in zip(parts, (1, -1), strict=True):
        part["metered"] |= {"residual_joules": sign * 5.0, "bias_ratio": {"decode": sign * 0.2}}
    parts[1]["metered"]["bias_ratio"]["decode"] = -0.3
    trust = made(*parts)["trust"]
    assert (abs(trust["residual_joules"]), trust["bias_ratio"]) == (5.0, {"decode": -0.3})


@pytest.mark.parametrize("off", ["engine", "front end"])
def test_a_hook_that_is_off_anywhere_is_off(off: str) -> None:
    front = {"active": off != "front end", "failures": {"receive": 1}}
    trust = made(engine(active=off != "engine", failures={"end": 2}), engine(), front_end=front)["trust"]
    assert (trust["hook_active"], trust["failures"]) == (False, 3)


def test_requests_are_shown_by_their_values_alone() -> None:
    [first, *_, last] = made(engine(), intensity=None)["requests"]
    assert first == {
        "time_epoch_seconds": NOON,
        "prefill_tokens": 512,
        "cached_tokens": 0,
        "decode_tokens": 128,
        "predicted_joules": 40.0,
        "joules": 41.2,
        "coverage_ratio": 0.97,
        "grams": pytest.approx(41.2 * 56 * 1.2 / 3.6e6),
        "embodied_grams": 0.0011,
        "basis": "mixed",
        "in_distribution": True,
    }
    assert last["basis"] == "measured"
    predicted = live.document(status(engine()), ACCOUNTING, [(NOON, annotation(0, "predicted"))], NOON)["requests"][0]
    assert (predicted["joules"], predicted["coverage_ratio"]) == (None, None)


def test_a_list_that_cannot_be_read_is_not_an_empty_one() -> None:
    assert live.document(status(engine()), ACCOUNTING, None, NOON)["requests"] is None
    assert live.document(status(engine()), ACCOUNTING, [], NOON)["requests"] == []


def test_a_full_document_of_many_engines_is_small() -> None:
    faults = {f"fault of kind {number}": number for number in range(30)}
    engines = [engine(1e6 / 3, engine=n) for n in range(8)]
    for item in engines:
        item["meter"] = {"devices": [{"source": "counter", "power_watts": 1000 / 3, "faults": faults}] * 8}
    found = live.document(status(*engines), ACCOUNTING, finished(live.REQUESTS_SHOWN), NOON + 1 / 3)
    assert len(json.dumps(found)) < BIGGEST_DOCUMENT_BYTES


async def test_a_log_that_cannot_be_read_costs_the_list_alone(
    front_end: CarbonFrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(most: int) -> list[tuple[float, str]]:
        raise sqlite3.OperationalError("database is locked")

    front_end.settings = Settings(live=True)
    monkeypatch.setattr(front_end.log, "last", locked)
    found = await front_end.live()
    assert found is not None
    assert (found["requests"], found["engines"]) == (None, 0)
    assert front_end.guard.failures == {"last": 1}
    assert front_end.guard.active


async def test_without_the_setting_there_is_nothing(front_end: CarbonFrontEnd) -> None:
    assert (front_end.live_page(), await front_end.live()) == (None, None)


# ---------------------------------------------------------------------------------------------------- the page's text


def test_the_page_is_one_small_file_that_fetches_nothing_from_elsewhere() -> None:
    body, headers = live.page()
    text = body.decode()
    assert len(body) < BIGGEST_PAGE_BYTES
    named = set(re.findall(r"https?://[^\"' )]+", text))
    assert named == {"http://www.w3.org/2000/svg"}, "a name space, not an address"
    assert not re.findall(r"""\b(?:src|srcset|@import|integrity)\b\s*[=(]""", text)
    policy = dict(headers)[b"content-security-policy"].decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == text.count("<script>") + text.count("<style>") == 2


def test_the_page_writes_what_it_is_told_as_text() -> None:
    text = live.page().body.decode()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


# ------------------------------------------------------------------------------------------------------- in a browser


class Tab:
    """The page in a browser whose clock stands still until it is told to go on; what went wrong is in ``errors``."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._noted)
        self.page.clock.install()

    def _noted(self, message: Any) -> None:
        # The browser itself notes every answer that is no success, and every server that is away.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").inner_text()).replace("\n", "")

    def until(self, name: str, pattern: str, seconds: float = 2.0) -> str:
        """Let time pass in steps until the text of an element matches."""
        for _ in range(60):
            if re.search(pattern, self.text(name)):
                return self.text(name)
            self.page.clock.run_for(1000 * seconds)
            self.page.wait_for_timeout(20)
        raise AssertionError(f"#{name} says {self.text(name)!r}, never {pattern!r}")

    def show(self, served: Site) -> None:
        self.page.goto(served.url)
        self.page.wait_for_selector("#state:not([data-state=wait])")

    def looks(self, front_end: Watched, count: int) -> None:
        """Let the page ask so many more times."""
        goal = front_end.looks + count
        for _ in range(100 * count):
            if front_end.looks >= goal:
                break
            self.page.clock.run_for(2000)
            self.page.wait_for_timeout(20)
        assert front_end.looks >= goal
        self.page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    opened = Tab(browser)
    yield opened
    opened.page.context.close()
    assert opened.errors == []


def cells(tab: Tab, body: str) -> list[list[str]]:
    rows = tab.page.locator(f"#{body} tr").all()
    return [[cell.strip() for cell in row.locator("th,td").all_inner_texts()] for row in rows]


def test_measured_figures_are_shown_with_their_units_and_basis(tab: Tab) -> None:
    with site(front_end := Watched()) as served:
        tab.show(served)
        tab.looks(front_end, 5)
        assert tab.text("power") == "313 W"
        assert tab.text("power-basis") == "Measured, all devices; 75.0 W when idle"
        assert tab.text("grams") == "21.0 g/h"
        assert tab.text("tokens") == "524 J"
        assert re.search(r"predicted 210 W, measured 220 W, the prediction 4\.5 % too low", tab.text("chart-words"))
        totals = {row[0]: row[1:] for row in cells(tab, "totals")}
        assert totals["Idle"] == ["\u2013", "300 kJ", "5.60 g"]
        assert totals["Embodied, busy time"][2] == "8.00 g"
        rows = cells(tab, "requests")
        assert len(rows) == 20
        assert rows[3][1:] == ["predicted", "623", "0", "128", "73.0 J", "Not measured", "1.36 mg"]
        assert tab.page.locator("#trusted .look:visible").count() == 0
        assert (
            tab.page.locator("#chart path.measured").count() == tab.page.locator("#chart path.predicted").count() == 1
        )


def test_without_a_meter_figures_are_called_predicted_and_the_rest_not_measured(tab: Tab) -> None:
    with site(front_end := Watched(metered=False, requests=0)) as served:
        tab.show(served)
        tab.looks(front_end, 3)
        assert tab.text("power") == "210 W"
        assert tab.text("power-basis").startswith("Predicted, requests alone")
        assert tab.text("tokens-basis").startswith("Predicted")
        assert "not measured" in tab.text("chart-words")
        totals = {row[0]: row[1:] for row in cells(tab, "totals")}
        assert totals["Idle"] == ["\u2013", "Not measured", "Not measured"]
        assert totals["Decode"][1] == "Not measured"
        assert cells(tab, "requests") == [["None yet"]]
        assert "Not measured: no NVIDIA driver" in tab.text("trusted")
        assert tab.page.locator("#chart path.measured").count() == 0


def test_grams_without_an_intensity_are_not_known_and_never_zero(tab: Tab) -> None:
    front_end = Watched()
    front_end.accounting, front_end.changes = Accounting(None), {"intensity": None}
    with site(front_end) as served:
        tab.show(served)
        tab.looks(front_end, 2)
        assert tab.text("grams") == "Not known"
        assert tab.text("grams-basis") == "no carbon intensity is known"
        assert {row[3] for row in cells(tab, "totals")} == {"Not known"}


def test_doubtful_figures_are_marked_in_words(tab: Tab) -> None:
    front_end = Watched()
    stale = {"grams_per_kwh": 300.0, "source": "cache", "method": "average", "estimated": True, "age_seconds": 9e4}
    front_end.changes = {"intensity": stale, "front_end": {"active": False, "failures": {"receive": 1}}}
    with site(front_end) as served:
        tab.show(served)
        marked = [text.replace("\n", " ") for text in tab.page.locator("#trusted > div:has(.look)").all_inner_texts()]
        assert [text.split()[0] for text in marked] == ["Hook", "Failures", "Intensity"]
        assert "estimated, 25 h old" in marked[2]


def test_a_server_that_is_away_is_said_and_its_return_is_seen(tab: Tab) -> None:
    front_end = Watched()
    with site(front_end) as served:
        tab.show(served)
        tab.looks(front_end, 2)
        shown = tab.text("grams")
        served.stop()
        said = tab.until("state", "not reachable")
        assert re.fullmatch(r"Server not reachable, last figures of \d\d:\d\d:\d\d; asking again", said)
        assert tab.text("grams") == shown, "the last figures stay, and are said to be the last"
        front_end.looks, front_end.begin = 0, NOON + 600.0
        served.start()
        tab.until("state", "^Live", seconds=30.0)
        tab.looks(front_end, 3)
        assert tab.text("tokens") == "524 J", "a server that counts anew is not taken for the old one"


def test_the_page_asks_ever_less_often_while_the_server_is_away(tab: Tab) -> None:
    with site(Watched()) as served:
        tab.show(served)
        served.stop()
        tab.until("state", "not reachable")
        asked: list[str] = []
        tab.page.on("requestfailed", lambda request: asked.append(request.url))
        for _ in range(60):
            tab.page.clock.run_for(2000)
            tab.page.wait_for_timeout(10)
        assert 4 <= len(asked) <= 10, "not the sixty of a server that answers"


@pytest.mark.parametrize(("failing", "said"), [(True, "The server answers with 500"), (False, "switched off")])
def test_other_answers_are_said(tab: Tab, failing: bool, said: str) -> None:
    class Off(Watched):
        async def live(self) -> dict[str, Any] | None:
            self._enter("live")
            return None

    front_end = Off()
    front_end.failing = frozenset({"live"} if failing else ())
    with site(front_end) as served:
        tab.page.goto(served.url)
        tab.until("state", said)


def test_a_paused_page_asks_nothing_until_it_goes_on(tab: Tab) -> None:
    with site(front_end := Watched()) as served:
        tab.show(served)
        tab.page.get_by_role("button", name="Pause").click()
        assert re.match(r"Paused at \d\d:\d\d:\d\d", tab.text("state"))
        before = front_end.looks
        for _ in range(5):
            tab.page.clock.run_for(2000)
            tab.page.wait_for_timeout(20)
        assert front_end.looks == before
        tab.page.get_by_role("button", name="Go on").click()
        tab.looks(front_end, 2)
        assert tab.text("state").startswith("Live")


def test_with_a_key_the_page_asks_for_it_and_keeps_it_for_the_tab_alone(tab: Tab) -> None:
    with site(Watched(), "sesame") as served:
        tab.page.goto(served.url)
        field = tab.page.get_by_role("textbox", name="API key")
        field.wait_for()
        assert tab.page.evaluate("document.activeElement.id") == "secret"
        assert not tab.page.locator("#figures").is_visible()
        field.fill("wrong")
        field.press("Enter")
        tab.until("wrong", "refused")
        field.fill("not ascii €")
        field.press("Enter")
        tab.until("wrong", "refused")
        field.fill("sesame")
        field.press("Enter")
        tab.until("state", "^Live")
        tab.page.reload()
        tab.until("state", "^Live")
        assert not tab.page.locator("#key").is_visible()
        other = tab.page.context.new_page()
        other.goto(served.url)
        other.get_by_role("textbox", name="API key").wait_for()
        assert other.evaluate("localStorage.length + document.cookie.length") == 0


def test_everything_is_reached_by_the_keyboard_in_the_order_of_the_page(tab: Tab) -> None:
    with site(Watched()) as served:
        tab.show(served)
        reached = []
        for _ in range(4):
            tab.page.keyboard.press("Tab")
            reached.append(tab.page.evaluate("document.activeElement.textContent.trim().slice(0, 5)"))
            assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert reached == ["Skip ", "Pause", "Since", "Newes"]
        tab.page.keyboard.press("Shift+Tab")
        tab.page.keyboard.press("Shift+Tab")
        tab.page.keyboard.press("Space")
        assert tab.text("state").startswith("Paused")


def test_a_screen_reader_finds_landmarks_headings_names_and_calm_words(tab: Tab) -> None:
    with site(front_end := Watched()) as served:
        tab.show(served)
        tree = tab.page.locator("body").aria_snapshot()
        for line in ("- banner:", "- main:", "- contentinfo:", '- heading "Carbon, live" [level=1]', "- status:"):
            assert line in tree
        for name in ("Now", "Since the start", "How far to trust it", "Last requests"):
            assert f'- heading "{name}" [level=2]' in tree
        assert re.search(r'- img "Power of requests, predicted against measured .*mean of 10 s', tree)
        assert tree.count("- caption") == 2
        spoken = tab.text("spoken")
        assert spoken == "Measured power 313 W, 21.0 g/h, 3 requests running."
        front_end.changes = {"front_end": {"active": True, "failures": {}}}
        tab.page.evaluate("at('spoken').textContent = 'unchanged'")
        tab.looks(front_end, 3)
        assert tab.text("spoken") == "unchanged"
        tab.looks(front_end, 15)
        assert tab.text("spoken") == spoken


# WCAG 2.2, 1.4.3: relative luminance of the two colours; the elements stand on opaque ones.
CONTRASTS = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return /rgba?\\(.*, 0\\)/.test(colour) ? ground(element.parentElement) : colour;
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("svg")) continue;
    const a = luminance(getComputedStyle(element).color), b = luminance(ground(element));
    found[`${element.tagName}.${element.className}#${element.id}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_light_and_dark(browser: Any, scheme: str) -> None:
    tab, front_end = Tab(browser, color_scheme=scheme), Watched()
    front_end.changes = {"front_end": {"active": False, "failures": {"receive": 1}}}
    with site(front_end) as served:
        tab.show(served)
        tab.looks(front_end, 3)
        PICTURES.mkdir(parents=True, exist_ok=True)
        tab.page.screenshot(path=str(PICTURES / f"live-made-{scheme}.png"), full_page=True)
        contrasts = tab.page.evaluate(CONTRASTS)
        served.stop()
        tab.until("state", "not reachable")
        contrasts |= {f"away {name}": ratio for name, ratio in tab.page.evaluate(CONTRASTS).items()}
        assert len(contrasts) > 30
        assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
        ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 384) is (scheme == "dark")
    tab.page.context.close()
    assert tab.errors == []
