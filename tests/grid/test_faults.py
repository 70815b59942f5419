"""Whatever a provider does, there is a figure with its true name, a reason to read, and a time to ask again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.live import Patience
from llmco2_vllm.grid.server import LONGEST_WAIT_SECONDS, FeedError, Question, Server, retry_after_seconds
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import HOUR, NOW, electricity_maps, uk, watttime
from tests.grid.conftest import ENVIRONMENT, PASSWORD, SECRET, Opener
from tests.grid.server import Answer, Remote, remote_server

LATEST = "/v3/carbon-intensity/latest"


def first(chain: Chain) -> Mapping[str, Any]:
    link: Mapping[str, Any] = chain.state()["links"][0]
    return link


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer({}, 401), "127.0.0.1 answered 401: the key is not accepted for this"),
        (Answer({}, 403), "127.0.0.1 answered 403: the key is not accepted for this"),
        (Answer({}, 429), "127.0.0.1 answered 429: asked too often"),
        (Answer({}, 500), "127.0.0.1 answered 500"),
        (Answer({}, 302, {"Location": "http://127.0.0.1:9/"}), "127.0.0.1 answered 302"),
        (Answer(b'{"zone": "DE", '), "something that is not JSON"),
        (Answer(b"\xff\xfe"), "something that is not JSON"),
        (Answer(b"[" * 100_000), "something that is not JSON"),
        (Answer([]), "the answer has no 'zone' as expected"),
        (Answer(b'"' + b"x" * 5_000_000 + b'"'), "more than 4194304 bytes"),
    ],
)
async def test_a_failure_has_a_reason_and_a_stand_in(
    answer: Answer, reason: str, remote: Remote, opened: Opener
) -> None:
    remote.on(LATEST, answer)
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.source == "static:2023"
    assert reason in first(chain)["reason"] and first(chain)["failures"] == 1
    assert chain.state()["answers"] == "static"


async def test_a_server_that_never_answers_is_left_after_its_time(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, Answer(silent=True))
    chain = opened("electricity-maps", timeout_seconds=0.2)
    await chain.refresh()
    assert "did not answer within 0.2 s" in first(chain)["reason"]


async def test_a_server_that_answers_drop_by_drop_is_left_after_its_time(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, Answer(b" " * 1_000_000, dripping=True))
    chain = opened("electricity-maps", timeout_seconds=0.3)
    await chain.refresh()
    assert "did not answer within 0.3 s" in first(chain)["reason"]


async def test_a_server_that_is_not_there_is_named_without_what_was_sent(opened: Opener) -> None:
    with remote_server() as gone:
        address = gone.base_url
    chain = opened("electricity-maps", provider_url=address)
    await chain.refresh()
    assert first(chain)["failure"] == "127.0.0.1 could not be asked (ConnectError)"


async def test_the_last_figure_is_held_for_a_while_then_the_stand_in_answers(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on(LATEST, electricity_maps(), Answer({}, 500))
    chain = opened("electricity-maps")
    sources = []
    for hours in (0, 1, 5, 2):
        clock.advance(hours * 3600)
        await chain.refresh()
        assert chain.current is not None
        sources.append((chain.current.source, chain.current.estimated, chain.current.age_seconds(clock())))
    assert sources[:3] == [
        ("electricity-maps", True, 0.0),
        ("electricity-maps:held", True, 3600.0),
        ("electricity-maps:held", True, 6 * 3600.0),
    ]
    assert sources[3][0] == "static:2023"
    # The past does not change when the present is lost.
    past = chain.at(NOW)
    assert past is not None and past.source == "electricity-maps"


async def test_failures_are_spaced_further_and_further_apart(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, Answer({}, 500))
    chain = opened("electricity-maps")
    waits = []
    for _ in range(9):
        await chain.refresh()
        waits.append(first(chain)["next_seconds"])
        clock.advance(waits[-1])
    assert waits == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert len(remote.asked) == 9


async def test_a_key_that_is_not_accepted_is_not_tried_every_minute(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, Answer({}, 401))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert first(chain)["next_seconds"] == 3600


async def test_nobody_is_asked_before_it_is_due(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    for _ in range(10):
        await chain.refresh()
        clock.advance(60)
    assert remote.paths().count(LATEST) == 1


async def test_a_clock_that_is_set_back_does_not_silence_us(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    await chain.refresh()
    clock.advance(-86400)
    await chain.refresh()
    assert remote.paths().count(LATEST) == 2


@pytest.mark.parametrize(
    ("value", "seconds"), [("120", 120.0), ("7200", 7200.0), ("Sat, 14 Mar 2026 16:10:00 GMT", 3600.0), ("soon", 30.0)]
)
async def test_retry_after_is_kept_to(
    value: str, seconds: float, remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on(LATEST, Answer({}, 429, {"Retry-After": value}))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert first(chain)["next_seconds"] == seconds
    clock.advance(seconds - 1)
    await chain.refresh()
    assert remote.paths().count(LATEST) == 1
    clock.advance(1)
    await chain.refresh()
    assert remote.paths().count(LATEST) == 2


@given(st.text(max_size=40) | st.floats().map(str), st.floats(0, 4e9))
def test_retry_after_is_nothing_or_a_wait_of_at_most_a_day(text: str, now: float) -> None:
    wait = retry_after_seconds({"retry-after": text}, now)
    assert wait is None or 0 <= wait <= LONGEST_WAIT_SECONDS


async def test_a_retry_after_date_is_counted_by_the_servers_own_clock(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    clock.advance(-7200)
    remote.on(LATEST, Answer({}, 429, {"Retry-After": "Sat, 14 Mar 2026 15:20:00 GMT"}))
    chain = opened("electricity-maps")
    await chain.refresh()
    assert first(chain)["next_seconds"] == 600


async def test_a_clock_that_is_late_is_seen_and_no_figure_of_later_is_used(
    remote: Remote, opened: Opener, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.advance(-7200)
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    for _ in range(3):
        await chain.refresh()
        clock.advance(1000)
    assert chain.current is not None and chain.current.source == "static:2023"
    assert first(chain)["clock_skew_seconds"] == pytest.approx(-7200 + 2000, abs=1)
    assert "its figures begin more than a period ahead" in first(chain)["reason"]
    said = [record.getMessage() for record in caplog.records if "clock" in record.getMessage()]
    assert said == ["llmco2: carbon intensity, electricity-maps: this host's clock is -7200 s ahead of the server's"]


async def test_a_clock_that_is_ahead_gets_a_held_figure_with_its_age(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    clock.advance(7200)
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    await chain.refresh()
    assert chain.current is not None and chain.current.source == "electricity-maps:held"
    assert chain.current.age_seconds(clock()) == NOW + 7200 - (HOUR + 3600)


async def test_a_failure_that_goes_on_is_logged_once(
    remote: Remote, opened: Opener, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    remote.on(LATEST, Answer({}, 500))
    chain = opened("electricity-maps")
    for _ in range(20):
        remote.now_epoch_seconds = clock()
        await chain.refresh()
        clock.advance(4000)
    ours = [record.getMessage() for record in caplog.records if record.name == "vllm.llmco2"]
    assert len(ours) == 2 and all("500" in line for line in ours)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["zone", "data", "datetime", "carbonIntensity", "history", "intensity", "from", "to", "meta"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("provider", ["electricity-maps", "watttime", "uk-carbon-intensity"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=JSON, key=st.sampled_from(["carbonIntensity", "datetime", "isEstimated", "temporalGranularity", ""]))
def test_no_answer_whatever_breaks_anything_or_is_taken_for_a_figure_out_of_bounds(
    provider: str, answer: Any, key: str, remote: Remote, tmp_path: Path
) -> None:
    content = {**electricity_maps(), key: answer} if key else answer
    remote.on("/login", {"token": "token-1"})
    for path in (
        LATEST,
        "/v3/carbon-intensity/history",
        "/v3/forecast",
        "/v3/historical",
        "/intensity",
        "/intensity/*",
    ):
        remote.on(path, content)
    zone = {"electricity-maps": "DE", "watttime": "CAISO_NORTH", "uk-carbon-intensity": "GB"}[provider]
    # A folder for each example: nobody takes over what another one was told.
    with TemporaryDirectory(dir=tmp_path) as folder:
        choice = GridChoice(provider, zone, provider_url=remote.base_url, cache=Path(folder))
        chain = open_chain(choice, ENVIRONMENT, FakeClock(NOW))
        asyncio.run(chain.refresh())
    assert chain.state()["failures"] == 0
    assert "failed (" not in str(first(chain)["failure"])
    assert chain.current is None or 0 <= chain.current.grams_per_kwh <= 3000


async def test_keys_are_in_no_log_no_text_and_no_state(
    remote: Remote, opened: Opener, clock: FakeClock, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    remote.on("/login", {"token": "token-42424242"}, Answer({"error": PASSWORD}, 401))
    remote.on(
        LATEST, electricity_maps(), Answer(SECRET.encode(), 401), electricity_maps(value=SECRET), {"zone": SECRET}
    )
    remote.on("/v3/forecast", watttime([(NOW, 1000)]), Answer({}, 401))
    chains = [opened("electricity-maps"), opened("watttime")]
    seen = ""
    for _ in range(4):
        for chain in chains:
            await chain.refresh()
            links = [vars(link) for link in chain._links]
            feed = links[0]["_feed"]
            seen += f"{chain!r} {vars(chain)} {chain.state()} {links} {vars(feed)} {vars(feed.server)}"
        clock.advance(4000)
    seen += caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert len(remote.asked) > 6 and "httpcore" in {record.name.split(".")[0] for record in caplog.records}
    for secret in (SECRET[:12], PASSWORD[:12]):
        assert secret not in seen


async def test_a_question_does_not_show_its_headers() -> None:
    question = Question("/login", headers={"auth-token": SECRET}, credentials=("somebody", PASSWORD))
    assert SECRET not in repr(question) and PASSWORD not in repr(question)


async def test_what_cannot_be_sent_is_not_quoted(remote: Remote, clock: FakeClock) -> None:
    server = Server(remote.base_url, clock)
    with pytest.raises(FeedError) as caught:
        await server.get(Question("/", headers={"auth-token": f"{SECRET}\r\nx: y"}))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n", "two words", "a\nb", "schlüssel", "a\x00b"])
def test_a_key_that_is_none_is_refused_without_being_shown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^key: ") as caught:
        open_chain(GridChoice("electricity-maps", "DE", key_file=path), {})
    assert not text.strip() or text.strip() not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^key_file='.*none' cannot be read \(No such file"):
        open_chain(GridChoice("electricity-maps", "DE", key_file=tmp_path / "none"), {})


async def test_a_key_file_that_is_replaced_is_read_again(
    remote: Remote, opened: Opener, clock: FakeClock, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text("old\n")
    remote.on(LATEST, Answer({}, 401), electricity_maps())
    chain = opened("electricity-maps", key_file=path)
    await chain.refresh()
    path.write_text("new\n")
    clock.advance(3600)
    await chain.refresh()
    assert [asked.headers["auth-token"] for asked in remote.asked if asked.path == LATEST] == ["old", "new"]
    assert first(chain)["failures"] == 0


async def test_a_key_file_that_goes_away_is_a_failure_of_that_link_alone(
    remote: Remote, opened: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text("old\n")
    chain = opened("electricity-maps", key_file=path)
    path.unlink()
    await chain.refresh()
    assert "cannot be read" in first(chain)["reason"] and remote.asked == []


@pytest.mark.parametrize(
    "change", [{"hold_seconds": -1}, {"retry_seconds": 0}, {"longest_retry_seconds": float("inf")}]
)
def test_patience_names_the_key_that_is_wrong(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}="):
        Patience(**change)


async def test_another_address_of_the_same_api_may_have_a_path(remote: Remote, opened: Opener) -> None:
    remote.on("/proxy/intensity", {"data": [uk(HOUR, 100, 99)]})
    chain = opened("uk-carbon-intensity", provider_url=remote.base_url + "/proxy/")
    await chain.refresh()
    assert chain.current is not None and chain.current.grams_per_kwh == 99


@pytest.mark.parametrize(
    "url", ["", "ftp://host", "https://", "https://user:word@host", "https://host?key=1", "http://[", "host"]
)
def test_an_address_that_cannot_be_asked_is_refused_without_being_shown(url: str, clock: FakeClock) -> None:
    with pytest.raises(ValueError, match=r"^provider_url is not possible; allowed: https://host"):
        Server(url, clock)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_to_wait_is_more_than_nothing_and_ends(seconds: float, clock: FakeClock) -> None:
    with pytest.raises(ValueError, match=r"^timeout_seconds="):
        Server("https://host", clock, seconds)


def test_a_proxy_that_cannot_be_used_is_one_line_at_start(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://nobody:secret@host")
    with pytest.raises(ValueError, match="named by the environment cannot be used") as caught:
        Server("https://host", clock)
    assert "secret" not in str(caught.value)
