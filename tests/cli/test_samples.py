"""``llmco2 samples``: what it lists and shows, and that samples survive the way to another host."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from pyarrow import parquet

from benchmarks.store_kill import made_sample
from llmco2_vllm.cli import progress
from llmco2_vllm.cli.main import main
from llmco2_vllm.store.database import FILE_NAME, MIGRATIONS, connect, insert
from llmco2_vllm.store.reading import samples
from llmco2_vllm.store.sample import COLUMNS, STEP_COLUMNS
from tests.store.made import same

TEN = [
    *(made_sample(number) for number in range(8)),
    replace(made_sample(8), doubt="device lost"),
    replace(made_sample(9), idle_joules=None, predicted_joules=None),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ten samples."""
    path = tmp_path / "samples"
    path.mkdir()
    with closing(connect(path / FILE_NAME)) as connection:
        insert(connection, TEN)
    return path


def run(folder: Path | None, *arguments: Any) -> Result:
    name, *rest = map(str, arguments)
    where = ["--folder", str(folder)] if folder else []
    return CliRunner().invoke(main, ["samples", name, *where, *rest], env={"COLUMNS": "160", "LLMCO2_SAMPLES": ""})


def test_help_names_all_that_can_be_done_with_samples() -> None:
    answer = CliRunner().invoke(main, ["samples", "--help"])
    assert answer.exit_code == 0
    assert all(f"\n  {name} " in answer.output for name in ("export", "import", "list", "show"))
    assert "samples" in CliRunner().invoke(main, ["--help"]).output


def test_the_list_shows_the_last_samples_and_how_many_there_are(folder: Path) -> None:
    answer = run(folder, "list", "--last", 3)
    assert answer.exit_code == 0, answer.output
    assert "device lost" in answer.output and "3 of 10 samples" in answer.output
    assert "2023-11-14 22:13:29" in answer.output  # 1.7e9 + 9 seconds


def test_json_has_a_line_per_sample_and_leaves_out_what_is_unknown(folder: Path) -> None:
    lines = [json.loads(line) for line in run(folder, "list", "--json").stdout.splitlines()]
    assert [line["number"] for line in lines] == list(range(1, 11))
    assert "predicted_joules" not in lines[9] and lines[0]["predicted_joules"] == TEN[0].predicted_joules
    assert lines[4]["steps"] == len(TEN[4].steps)
    assert lines[0].keys() - {"number", "steps"} <= {column.name for column in COLUMNS}


def test_one_sample_is_shown_with_its_steps(folder: Path) -> None:
    answer = run(folder, "show", 3)
    assert answer.exit_code == 0 and "model_fingerprint" in answer.output and "window" in answer.output
    document = json.loads(run(folder, "show", 3, "--json").stdout)
    assert document["energy_joules"] == TEN[2].energy_joules
    assert [list(step) for step in document["steps"][:1]] == [list(STEP_COLUMNS)]
    assert [step["duration_seconds"] for step in document["steps"]] == TEN[2].steps[:, 1].tolist()


def test_samples_survive_the_way_to_another_host_and_come_once(folder: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "samples.parquet", tmp_path / "other" / "host"
    exported = run(folder, "export", "--parquet", file)
    assert exported.exit_code == 0 and "10 samples" in exported.stderr
    assert "10 samples added, 0 skipped" in " ".join(run(other, "import", file).stderr.split())
    assert "0 samples added, 10 skipped" in " ".join(run(other, "import", file).stderr.split())
    assert all(map(same, samples(other), TEN)) and len(list(samples(other))) == 10
    assert "0 samples added" in " ".join(run(folder, "import", file).stderr.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone_and_only_when_it_takes_long(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    quick = run(folder, "export", "--parquet", tmp_path / "a.parquet")
    monkeypatch.setattr(progress, "SHOWN_AFTER_SECONDS", -1.0)
    slow = run(folder, "export", "--parquet", tmp_path / "a.parquet")
    assert "exporting" not in quick.stderr and ("exporting" in slow.stderr) == terminal
    assert quick.exit_code == slow.exit_code == 0 and "10 samples" in slow.stderr


def test_an_export_may_leave_out_what_is_in_doubt(folder: Path, tmp_path: Path) -> None:
    run(folder, "export", "--parquet", tmp_path / "a.parquet", "--trusted")
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 9


def test_a_table_that_another_tool_wrote_again_is_read(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    run(folder, "export", "--parquet", file)
    table = parquet.read_table(file)
    table = table.set_column(table.schema.get_field_index("engine"), "engine", table["engine"].cast(pa.int64()))
    step = pa.struct([pa.field(name, pa.float64()) for name in STEP_COLUMNS])
    table = table.set_column(table.schema.get_field_index("steps"), "steps", table["steps"].cast(pa.large_list(step)))
    table = table.append_column("remark", pa.array(["mine"] * 10)).select([*reversed(table.schema.names), "remark"])
    parquet.write_table(table.cast(table.schema.remove_metadata()), file)
    assert run(tmp_path / "other", "import", file).exit_code == 0
    assert all(map(same, samples(tmp_path / "other"), TEN))


def faulty(table: Any, fault: str) -> Any:
    """An exported table with one thing wrong."""
    if fault == "column":
        return table.drop_columns(["sigma_joules"])
    if fault == "type":
        return table.set_column(2, "energy_joules", pa.array(["much"] * 10))
    values = table["energy_joules"].to_pylist()
    values[6] = None if fault == "nothing" else float("nan")
    return table.set_column(2, pa.field("energy_joules", pa.float64()), pa.array(values, pa.float64()))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("column", "column sigma_joules is missing; expected a file of llmco2 samples export"),
        ("type", "much"),
        ("nothing", "row 7: energy_joules=NoneType is not possible; allowed: a finite number, 0 or more"),
        ("number", "row 7: energy_joules=nan is not possible; allowed: a finite number, 0 or more"),
        ("bytes", "Parquet magic bytes not found"),
        ("empty", "Parquet file size is 0 bytes"),
    ],
)
def test_a_faulty_file_is_named_in_one_line_and_adds_nothing(
    folder: Path, tmp_path: Path, fault: str, message: str
) -> None:
    file = tmp_path / "a.parquet"
    if fault in ("bytes", "empty"):
        file.write_bytes(b"text, and no table" * 20 if fault == "bytes" else b"")
    else:
        run(folder, "export", "--parquet", file)
        parquet.write_table(faulty(parquet.read_table(file), fault), file)
    answer = run(tmp_path / "other", "import", file)
    assert answer.exit_code == 1 and answer.stderr.startswith(f"Error: {file}: ") and message in answer.stderr
    assert answer.stderr.count("\n") == 1 and not (tmp_path / "other").exists()


@pytest.mark.parametrize("arguments", [("list",), ("show", 1), ("export", "--parquet", "unwritten.parquet")])
def test_a_folder_without_samples_is_named_in_one_line(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    answer = run(tmp_path, *arguments)
    assert answer.exit_code == 1 and "no such file; samples are stored there" in answer.stderr
    assert answer.stderr.count("\n") == 1 and not Path("unwritten.parquet").exists()
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    answer = run(tmp_path, *arguments)
    assert answer.exit_code == 1 and "not readable as samples" in answer.stderr and answer.stderr.count("\n") == 1


def test_a_file_of_a_newer_version_takes_no_import(folder: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "a.parquet", tmp_path / "other"
    run(folder, "export", "--parquet", file)
    other.mkdir()
    connect(other / FILE_NAME, (*MIGRATIONS, ())).close()
    answer = run(other, "import", file)
    assert answer.exit_code == 1 and "version 2, this package reads up to 1" in answer.stderr
    (other / FILE_NAME).write_bytes(b"no database" * 100)
    answer = run(other, "import", file)
    assert answer.exit_code == 1 and "file is not a database" in answer.stderr and answer.stderr.count("\n") == 1


def test_a_number_that_is_not_there_and_a_folder_not_given_are_named(folder: Path) -> None:
    answer = run(folder, "show", 99)
    assert answer.exit_code == 1 and "NUMBER: no sample 99 in" in answer.stderr
    answer = run(None, "list")
    assert answer.exit_code == 2 and "--folder" in answer.stderr


def test_an_export_that_cannot_be_written_is_named_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    answer = run(folder, "export", "--parquet", tmp_path / "missing" / "a.parquet")
    assert answer.exit_code == 1 and answer.stderr.startswith("Error: ") and answer.stderr.count("\n") == 1
    with closing(connect(folder / FILE_NAME)) as connection:
        connection.execute("UPDATE samples SET steps = x'00' WHERE id = 5")
    answer = run(folder, "export", "--parquet", tmp_path / "a.parquet")
    assert answer.exit_code == 1 and "sample 5: steps are not readable" in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples"]
