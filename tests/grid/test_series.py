"""A file of the user: each row is the figure of its own stretch, and of nothing else."""

from __future__ import annotations

import csv
import gzip
import os
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmco2_vllm.core.carbon import operational_grams
from llmco2_vllm.core.intensity import Kind
from llmco2_vllm.grid.chain import Chain
from llmco2_vllm.grid.choice import GridChoice, open_chain
from llmco2_vllm.grid.series import SeriesProvider, read_series
from llmco2_vllm.testing import FakeClock

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
START = BEGIN.timestamp()
KIND = Kind("DE-LU", factors="lifecycle")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def hours(values: list[Any], **others: Any) -> list[dict[str, Any]]:
    return [
        {"datetime_utc": str((BEGIN + timedelta(hours=n)).replace(tzinfo=None)), "DE-LU": value, **others}
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize("name", ["series.csv", "series.csv.gz", "series.parquet"])
def test_csv_and_parquet_say_the_same(name: str, tmp_path: Path) -> None:
    rows = hours([300, 200.5, None, 250], FR=50)
    path = tmp_path / name
    if name.endswith("parquet"):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    provider = SeriesProvider(path, KIND)
    found = [provider.at(START + 3600 * n + 1) for n in range(-1, 5)]
    assert [one and one.grams_per_kwh for one in found] == [None, 300, 200.5, None, 250, None]
    assert found[1] is not None and (found[1].source, found[1].factors) == (f"file:{name}", "lifecycle")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=st.lists(st.floats(0, 1000), min_size=2, max_size=24), data=st.data())
def test_energy_is_multiplied_by_the_intensity_of_the_hour_in_which_it_was_used(
    values: list[float], data: st.DataObject, tmp_path: Path
) -> None:
    chain = Chain([SeriesProvider(write(tmp_path / "s.csv", hours(values)), KIND)], FakeClock(START))
    used = data.draw(st.lists(st.tuples(st.integers(0, len(values) * 3600 - 1), st.floats(0, 1e6)), max_size=5))
    total = 0.0
    for moment, joules in used:
        figure = chain.at(START + moment)
        assert figure is not None
        total += operational_grams(joules, figure.grams_per_kwh)
    assert total == pytest.approx(sum(joules / 3.6e6 * values[moment // 3600] for moment, joules in used))


def test_a_gap_is_not_filled_and_the_last_row_does_not_go_on(tmp_path: Path) -> None:
    rows = hours([100, 110, 120, 130, 140, 150])
    del rows[3]
    provider = SeriesProvider(write(tmp_path / "s.csv", rows), KIND)
    known = [provider.at(START + 3600 * n + 1800) is not None for n in range(7)]
    assert known == [True, True, True, False, True, True, False]
    assert "has no row of that time" in provider.reason(START + 3600 * 3)
    assert "begins later" in provider.reason(START - 1)


def test_times_with_a_zone_and_seconds_are_understood(tmp_path: Path) -> None:
    berlin = timezone(timedelta(hours=1))
    times = [(BEGIN + timedelta(minutes=30 * n)).astimezone(berlin).isoformat() for n in range(3)]
    local = write(tmp_path / "a.csv", [{"datetime": at, "grams_per_kwh": 5} for at in times])
    seconds = write(tmp_path / "b.csv", [{"epoch_seconds": START + 1800 * n, "grams_per_kwh": 5} for n in range(3)])
    begins = [[one.valid_from_epoch_seconds for one in read_series(path, KIND)] for path in (local, seconds)]
    assert begins[0] == begins[1] == [START, START + 1800, START + 3600]


def test_a_time_without_a_zone_is_utc_wherever_the_host_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.csv", hours([5]))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        begin = read_series(path, KIND)[0].valid_from_epoch_seconds
    time.tzset()
    assert begin == START


def test_what_the_file_marks_as_estimated_is(tmp_path: Path) -> None:
    rows = [{**row, "estimated": mark} for row, mark in zip(hours([1, 2]), ["true", "0"], strict=True)]
    assert [one.estimated for one in read_series(write(tmp_path / "s.csv", rows), KIND)] == [True, False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (hours([1, -2]), "row 2: DE-LU=-2.0 is not possible; allowed: 0 to 3000"),
        (hours([1, "much"]), "row 2: could not convert string to float"),
        (hours([1, "nan"]), "row 2: DE-LU=nan is not possible"),
        (list(reversed(hours([1, 2]))), "row 2: datetime_utc is not later than in the row before"),
        (hours([1]) * 2, "row 2: datetime_utc is not later"),
        (hours([1], estimated="perhaps"), "row 1: estimated is neither true nor false"),
        ([{"datetime_utc": "yesterday", "DE-LU": 1}], "row 1: Invalid isoformat string"),
        ([{"epoch_seconds": "1e300", "DE-LU": 1}], "row 1: epoch_seconds='1e300' is not possible"),
        (hours([None, ""]), "has no value in column 'DE-LU'"),
        ([{"when": "2024-01-01", "DE-LU": 1}], "has no column of time; allowed: datetime_utc, datetime, epoch_seconds"),
    ],
)
def test_a_slip_in_a_file_is_named_by_row_and_column(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", rows)
    with pytest.raises(ValueError) as caught:
        read_series(path, KIND)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_zone_that_is_no_column_is_answered_with_near_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", hours([1], FR=2))
    with pytest.raises(ValueError, match=r"^zone='DE-LX' is no column .* one of DE-LU, FR; near: DE-LU$"):
        read_series(path, Kind("DE-LX"))


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x01", b"\x1f\x8b\x08\x00" + b"x" * 50])
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        open_chain(GridChoice("file", "DE-LU", intensity_file=path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


async def test_a_file_that_is_replaced_is_read_again_and_a_broken_one_is_not_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", hours([1, 2]))
    chain = Chain([SeriesProvider(path, KIND)], FakeClock(START))
    seen = []
    for number, rows in enumerate((hours([1, 2]), hours([3, 4]), hours(["much"]), hours([5]))):
        write(path, rows)
        os.utime(path, ns=(number, number))
        await chain.refresh()
        assert chain.current is not None
        seen.append((chain.current.grams_per_kwh, chain.state()["links"][0]["failure"] is None))
    assert seen == [(1, True), (3, True), (3, False), (5, True)]


def test_past_the_files_end_the_yearly_average_of_the_zone_stands_in(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", hours([300]))
    chain = open_chain(GridChoice("file", "DE-LU", intensity_file=path), clock=FakeClock(START))
    later = chain.at(START + 7200)
    assert chain.current is not None and chain.current.source == "file:s.csv"
    assert later is not None and (later.zone, later.source) == ("DE", "static:2023")


@pytest.mark.parametrize("change", [{"method": "marginal"}, {"basis": "market"}])
def test_no_average_of_the_grid_stands_in_for_marginal_or_market_based_figures(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "s.csv", hours([300]))
    chain = open_chain(GridChoice("file", "DE-LU", intensity_file=path, **change), clock=FakeClock(START))
    assert chain.current is not None and chain.at(START + 7200) is None
