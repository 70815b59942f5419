"""The chain: who answers and why, one kind throughout, and nothing on the serving path but memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.intensity import Basis, Factors, Intensity, Kind, Method
from llmco2_vllm.grid.cache import Cache
from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.stated import ConstantProvider, TableProvider
from llmco2_vllm.testing import FakeClock
from tests.grid.answers import HOUR, NOW, electricity_maps
from tests.grid.conftest import Opener
from tests.grid.server import Answer, Remote

LATEST = "/v3/carbon-intensity/latest"


@dataclass
class Spoken:
    """A provider that knows what it is told to know. errors: to raise, one per refresh."""

    name: str
    known: bool = True
    kind: Kind = field(default_factory=Kind)
    errors: list[Exception] = field(default_factory=list)
    refreshed: int = 0

    def at(self, epoch_seconds: float) -> Intensity | None:
        kind = self.kind
        return Intensity(10, kind.zone, kind.method, kind.basis, self.name, False) if self.known else None

    def reason(self, epoch_seconds: float) -> str:
        return f"{self.name} is told to be silent"

    def state(self, now_epoch_seconds: float) -> Mapping[str, Any]:
        return {}

    async def refresh(self, now_epoch_seconds: float) -> float | None:
        self.refreshed += 1
        if self.errors:
            raise self.errors.pop(0)
        return 0.001


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_the_first_link_that_knows_answers_and_the_others_say_why_not(known: list[bool]) -> None:
    chain = Chain([Spoken(f"link {number}", one) for number, one in enumerate(known)], FakeClock(NOW))
    answering = known.index(True) if True in known else None
    state = chain.state()
    assert (chain.current and chain.current.source) == (None if answering is None else f"link {answering}")
    assert [link["answers"] for link in state["links"]] == [number == answering for number in range(len(known))]
    for number, link in enumerate(state["links"]):
        silent = answering is None or number < answering
        said = f"link {number} is told to be silent" if silent else f"link {answering} answers before it"
        assert link["reason"] == (None if number == answering else said)
    json.dumps(state)


methods = st.sampled_from(["average", "marginal"])
bases = st.sampled_from(["location", "market"])
kinds = st.tuples(methods, bases, st.sampled_from(["lifecycle", "direct", None]))


@given(st.lists(kinds, min_size=1, max_size=4))
def test_average_and_marginal_location_and_market_direct_and_lifecycle_are_never_mixed(
    drawn: list[tuple[Method, Basis, Factors | None]],
) -> None:
    links = [Spoken(f"link {n}", kind=Kind("FR", *one)) for n, one in enumerate(drawn)]
    stated = [{one[n] for one in drawn} - {None} for n in range(3)]
    if all(len(values) <= 1 for values in stated):
        assert Chain(links).current is not None
    else:
        with pytest.raises(ValueError, match=r"^chain: (method|basis|factors) must be one and the same in all links"):
            Chain(links)


def test_a_chain_that_would_mix_names_who_gives_what() -> None:
    links = [Spoken("watttime", kind=Kind("X", "marginal")), TableProvider("US")]
    with pytest.raises(ValueError, match=r"watttime gives marginal, static gives average"):
        Chain(links)


def test_a_chain_has_a_link() -> None:
    with pytest.raises(ValueError, match="no provider"):
        Chain([])


async def test_reading_needs_no_socket_and_no_file(
    remote: Remote, opened: Opener, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    await chain.refresh()

    def forbidden(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the serving path reached outside")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", forbidden)
        patched.setattr("builtins.open", forbidden)
        patched.setattr("io.open", forbidden)
        patched.setattr(asyncio.AbstractEventLoop, "run_in_executor", forbidden)
        figures = [chain.current, chain.at(NOW), chain.at(NOW + 7200), chain.at(NOW + 1e6), chain.at(0.0)]
        state = chain.state()
    assert "current" in vars(chain)
    assert [one and one.source for one in figures] == [
        "electricity-maps",
        "electricity-maps",
        "electricity-maps:held",
        "static:2023",
        None,
    ]
    assert state["figure"]["age_seconds"] == 0


async def test_the_loop_goes_on_serving_while_a_server_hangs(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, Answer(silent=True))
    chain = opened("electricity-maps")
    task = asyncio.create_task(chain.run())
    while not remote.asked:
        await asyncio.sleep(0)
    assert chain.current is not None and chain.current.source == "static:2023"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_new_hour_does_not_wait_for_a_server_that_hangs(
    remote: Remote, opened: Opener, clock: FakeClock
) -> None:
    remote.on(LATEST, electricity_maps(), Answer(silent=True))
    chain = opened("electricity-maps")
    await chain.refresh()
    clock.advance(3600)
    asked = len(remote.asked)
    round_of = asyncio.create_task(chain.refresh())
    while len(remote.asked) == asked:
        await asyncio.sleep(0)
    assert chain.current is not None and chain.current.source == "electricity-maps:held"
    round_of.cancel()


async def test_an_error_of_ours_is_counted_logged_once_and_does_not_end_the_rounds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Spoken("odd", errors=[RuntimeError("x"), RuntimeError("y")])
    chain = Chain([link], FakeClock(NOW))
    monkeypatch.setattr("llmco2_vllm.grid.chain.LONGEST_SLEEP_SECONDS", 0.0)
    monkeypatch.setattr("llmco2_vllm.grid.chain.SHORTEST_SLEEP_SECONDS", 0.0)
    task = asyncio.create_task(chain.run())
    while link.refreshed < 5:
        await asyncio.sleep(0)
    task.cancel()
    assert chain.state()["failures"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        "llmco2: carbon intensity is not refreshed (RuntimeError)"
    ]


async def test_a_new_hour_is_current_without_news(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps")
    assert 1 <= await chain.refresh() <= 60
    clock.now_seconds = HOUR + 3600 - 5
    assert await chain.refresh() <= 5
    clock.advance(5)
    await chain.refresh()
    assert chain.current is not None and chain.current.source == "electricity-maps:held"


async def test_a_stand_in_is_logged_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    chain = Chain([Spoken("first", False), Spoken("second")], FakeClock(NOW))
    for _ in range(3):
        await chain.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        "llmco2: carbon intensity from second now; first: first is told to be silent"
    ]


async def test_a_restart_knows_what_was_known(remote: Remote, opened: Opener, clock: FakeClock) -> None:
    remote.on(LATEST, electricity_maps(), Answer({}, 500))
    await opened("electricity-maps").refresh()
    clock.advance(1200)
    again = opened("electricity-maps")
    assert again.current is not None
    assert (again.current.grams_per_kwh, again.current.age_seconds(clock())) == (302, 1200)


async def test_a_second_front_end_takes_over_what_the_first_has_fetched(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps())
    chains = [opened("electricity-maps") for _ in range(4)]
    for chain in chains:
        await chain.refresh()
    assert remote.paths().count(LATEST) == 1
    assert {chain.current for chain in chains} == {chains[0].current}


async def test_what_was_fetched_for_another_zone_or_factors_is_not_taken(remote: Remote, opened: Opener) -> None:
    remote.on(LATEST, electricity_maps())
    await opened("electricity-maps").refresh()
    others = [opened("electricity-maps", zone="FR"), opened("electricity-maps", factors="direct")]
    assert [chain.current and chain.current.source for chain in others] == ["static:2023", None]


numbers = st.floats(0, 3000)
moments = st.integers(0, 4_000_000_000).map(float)
rows = st.lists(st.tuples(numbers, moments, moments, st.booleans()), max_size=8)


@given(rows)
def test_the_cache_gives_back_what_it_was_given(drawn: list[tuple[float, float, float, bool]]) -> None:
    kind = Kind("FR", "average", "location", "lifecycle")
    figures = [
        Intensity(value, "FR", "average", "location", "s", flag, begin, begin + 60, fetched, "lifecycle")
        for value, begin, fetched, flag in drawn
    ]
    with TemporaryDirectory() as folder:
        cache = Cache(Path(folder), "electricity-maps", kind)
        cache.write(figures)
        assert cache.read() == tuple(figures)
        assert Cache(Path(folder), "electricity-maps", Kind("FR")).read() == ()
        assert len(list(Path(folder).iterdir())) == 1


def test_two_zones_whose_files_have_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    figure = Intensity(5, "A_B", "marginal", "location", "s", False, 1, 2, 3, "direct")
    Cache(tmp_path, "watttime", figure.kind).write([figure])
    assert Cache(tmp_path, "watttime", figure.kind).read() == (figure,)
    assert Cache(tmp_path, "watttime", Kind("A-B", "marginal", "location", "direct")).read() == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 2}',
        "[" * 100_000,
        '{"schema": 1, "kind": ["FR", "average", "location", null], "figures": [[1, 2]]}',
        '{"schema": 1, "kind": ["FR", "average", "location", null], "figures": [[NaN, 1, 2, 3, true, "s"]]}',
        '{"schema": 1, "kind": ["FR", "average", "location", null], "figures": [[5, 2, 1, 3, true, "s"]]}',
        '{"schema": 1, "kind": ["FR", "average", "location", null], "figures": [[5, 1, 2, 3, "yes", "s"]]}',
        '{"schema": 1, "kind": ["FR", "average", "location", null], "figures": {"a": 1}}',
    ],
)
def test_a_damaged_cache_is_as_none(content: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, "p", Kind("FR"))
    cache.write([])
    next(tmp_path.iterdir()).write_text(content)
    assert cache.read() == ()


async def test_a_folder_that_cannot_be_written_costs_the_cache_alone(
    remote: Remote, opened: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    remote.on(LATEST, electricity_maps())
    chain = opened("electricity-maps", cache=blocked / "below")
    await chain.refresh()
    assert chain.current is not None and chain.current.grams_per_kwh == 302
    assert chain.state()["links"][0]["cache_failure"] == "Not a directory"
    assert [r.getMessage() for r in caplog.records if "disk" in r.getMessage()] == [
        "llmco2: carbon intensity, electricity-maps: is not kept on disk (Not a directory)"
    ]


def test_a_constant_needs_no_rounds() -> None:
    chain = Chain([ConstantProvider(56, Kind("FR"))], FakeClock(NOW))
    assert chain.state()["answers"] == "constant" and chain.at(0) == chain.current


@given(st.floats(0, 1e5), st.floats(0, 2e5))
def test_the_parts_of_a_span_tile_it_and_each_is_what_was_known_of_its_begin(begin: float, seconds: float) -> None:
    class Hourly(Spoken):
        """Knows two hours of three."""

        def at(self, epoch_seconds: float) -> Intensity | None:
            hour = epoch_seconds // HOUR
            ends = (hour * HOUR, (hour + 1) * HOUR)
            return None if hour % 3 == 2 else Intensity(hour, None, "average", "location", "hourly", False, *ends)

    chain = Chain([Hourly("hourly")], FakeClock(NOW))
    parts = chain.between(begin, begin + seconds)
    assert sum(length for _, length in parts) == pytest.approx(seconds, abs=1e-6)
    at = begin
    for figure, length in parts:
        assert figure == chain.at(at)
        if figure is not None and length > 0:
            assert at + length <= (figure.valid_to_epoch_seconds or 0.0) + 1e-6
        at += length


def test_a_figure_without_an_end_is_asked_for_once_however_long_the_span() -> None:
    chain = Chain([ConstantProvider(56.0)], FakeClock(NOW))
    assert [length for _, length in chain.between(0.0, 1e9)] == [1e9]


@pytest.mark.parametrize("ends", [True, False])
def test_a_stand_in_does_not_fill_a_span_in_which_the_first_link_knows_again(ends: bool) -> None:
    begin = NOW // 3600 * 3600

    class Gapped(Spoken):
        """Knows each hour but the second."""

        def at(self, epoch_seconds: float) -> Intensity | None:
            hour = begin + (epoch_seconds - begin) // 3600 * 3600
            known = Intensity(100, None, "average", "location", self.name, False, hour, hour + 3600)
            return None if hour == begin + 3600 else known

    chain = Chain([Gapped("first"), TableProvider("WORLD") if ends else ConstantProvider(7.0)], FakeClock(NOW))
    parts = chain.between(begin + 600, begin + 4 * 3600)
    stood_in = sum(length for figure, length in parts if figure is not None and figure.source != "first")
    assert stood_in == 3600
    assert sum(length for _, length in parts) == 4 * 3600 - 600
