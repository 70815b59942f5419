"""What a run keeps for drawing is its own."""

from __future__ import annotations

from pathlib import Path

from tests.observability import asking


def test_files_of_earlier_runs_go_and_those_of_this_run_stay(tmp_path: Path) -> None:
    picture, earlier = tmp_path / "dashboard-dark.png", tmp_path / "02-another-title.json"
    for path in (picture, earlier):
        path.write_text("{}")
    for number, title in ((1, "Power"), (2, "Carbon per hour")):
        asking.keep(tmp_path, {"id": number, "title": title}, [])
    assert {path.name for path in tmp_path.iterdir()} == {picture.name, "01-power.json", "02-carbon-per-hour.json"}
