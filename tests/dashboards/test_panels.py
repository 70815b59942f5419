"""What ``make panels`` draws: answers of Prometheus become frames, frames become pictures with units and colours."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llmco2_vllm.dashboards.panels import Json, heatmap, lines, stat, states, table
from tests import chromium

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "dev" / "panels"
INSTALLED = ROOT / ".cache" / "panels" / "installed"
SECONDS = 180.0
METRIC = "llmco2_power_watts"
# Grafana's green and blue on dark.
GREEN, BLUE = (115, 191, 105), (87, 148, 242)
RED = (242, 73, 92)
JUDGED = (("red", None), ("green", 3.0))
GROUPS = (("red", None), ("green", -0.01), ("red", 0.01))

node = pytest.mark.skipif(shutil.which("node") is None, reason="no Node (apt install nodejs npm)")


def series(values: Sequence[float], **labels: str) -> Json:
    """A series as Prometheus answers it, one value a second."""
    return {"metric": labels, "values": [[1.7e9 + at, repr(float(value))] for at, value in enumerate(values)]}


def instant(value: float, **labels: str) -> Json:
    return {"metric": labels, "value": [1.7e9, repr(float(value))]}


def answered(panel: Json, *answers: list[Json]) -> Json:
    """A panel with what its targets were answered, as tests/observability keeps it."""
    results = [
        {
            **{key: target[key] for key in ("refId", "legendFormat") if key in target},
            "query": target["expr"],
            "result": a,
        }
        for target, a in zip(panel["targets"], answers, strict=True)
    ]
    return {**panel, "results": results}


def buckets(counts: Sequence[Sequence[float]]) -> list[Json]:
    """Cumulative buckets of le 1, 2, … and +Inf from counts[column][row]."""
    rows = [[float(sum(column[: row + 1])) for column in counts] for row in range(len(counts[0]))]
    bounds = [*(str(float(row + 1)) for row in range(len(rows) - 1)), "+Inf"]
    return [series(values, le=bound) for values, bound in zip(rows, bounds, strict=True)]


def framed(function: str, *arguments: Any) -> Any:
    """What a function of frames.mjs returns; numbers that JSON has not are null."""
    script = (
        f"import {{ {function} as f }} from {json.dumps((SOURCES / 'frames.mjs').as_uri())};"
        f"console.log(JSON.stringify(f(...{json.dumps(arguments)})))"
    )
    command = ["node", "--input-type=module", "--eval", script]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return json.loads(answer.stdout)


@node
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda rows: st.lists(st.lists(st.integers(0, 9), min_size=rows, max_size=rows), min_size=1, max_size=4)
    )
)
def test_a_heatmaps_rows_are_the_counts_that_were_accumulated(counts: list[list[int]]) -> None:
    shuffled = {"results": [{"result": buckets(counts)[::-1]}]}
    found = framed("heatmapRows", shuffled)
    assert found["problems"] == []
    assert [list(column) for column in zip(*found["counts"], strict=True)] == counts


@node
@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([series([3, 3], le="1"), series([2, 4], le="+Inf")], "cumulative buckets that fall"),
        ([series([1], le="1")], "no bucket +Inf"),
        ([series([1], le="1"), series([1], le="1.0"), series([1], le="+Inf")], "two series of one le"),
        ([series([1]), series([1], le="+Inf")], "a series without le"),
        ([series([1, 1], le="1"), series([1], le="+Inf")], "buckets of unequal times"),
    ],
)
def test_buckets_that_would_be_drawn_wrong_are_a_problem(answer: list[Json], problem: str) -> None:
    assert problem in framed("heatmapRows", {"results": [{"result": answer}]})["problems"]


@node
def test_a_series_is_named_as_its_target_says() -> None:
    labels = {"__name__": "x", "phase": "decode"}
    assert framed("nameOf", labels, {"legendFormat": "in {{phase}}", "query": "x"}) == "in decode"
    assert framed("nameOf", labels, {"legendFormat": "__auto", "query": "x"}) == 'x{phase="decode"}'
    assert framed("nameOf", {}, {"legendFormat": "__auto", "query": "sum(x)"}) == "sum(x)"


@node
def test_a_stretch_ends_where_the_value_changes_or_is_missing() -> None:
    found = framed("stretches", [0, 1, 2, 5, 6], [1, 1, 0, 0, 0], 1)
    assert [(one["begin"], one["end"], one["value"]) for one in found] == [(0, 2, 1), (2, 3, 0), (5, 7, 0)]


Draw = Callable[[Mapping[str, Json], Path], "subprocess.CompletedProcess[str]"]


def draw(panels: Mapping[str, Json], folder: Path) -> subprocess.CompletedProcess[str]:
    """Draw panels side by side in the dashboard's first row; skips where a browser or the packages are not there."""
    asked = "".join((SOURCES / name).read_text() for name in ("package.json", ".npmrc"))
    chromium.executable()
    if not INSTALLED.is_file() or INSTALLED.read_text() != asked:
        pytest.skip("Grafana's UI library is not installed: make panels")
    for place, (name, panel) in enumerate(panels.items()):
        at = {"h": 4, "w": 4, "x": 4 * (place % 6), "y": 1 + 4 * (place // 6)}
        (folder / f"{place:02d}-{name}.json").write_text(json.dumps({**panel, "gridPos": at}))
    command = ["node", str(SOURCES / "draw.mjs"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one picture of each kind."""
    if shutil.which("node") is None:
        pytest.skip("no Node (apt install nodejs npm)")
    folder = tmp_path_factory.mktemp("panels")
    columns = [("Energy", METRIC, "joule"), ("Tokens", METRIC, "short")]
    rows = table("By model", "", {"model_name": "Model"}, columns)
    found = {
        "watts": answered(stat("Watts", "", METRIC, "watt"), [series([1400, 1500])]),
        "empty": answered(stat("Empty", "", METRIC, "watt"), []),
        "still": answered(stat("Still", "", METRIC, "joule", JUDGED), [series([1, 2, math.nan])]),
        "blind": answered(stat("Blind", "", METRIC, "joule", JUDGED), []),
        "small": answered(stat("Small", "", METRIC, "joule", GROUPS), [series([0.0, -2e-12])]),
        "lines": answered(lines("Lines", "", [(METRIC, "measured")], "watt"), [series([1, math.nan, 2, 3])]),
        "absent": answered(lines("Absent", "", [(METRIC, "measured")], "watt"), []),
        "table": answered(rows, [instant(1500, model_name="m")], [instant(2e6, model_name="m")]),
        "states": answered(
            states("States", "", [(METRIC, "meter")], {"0": ("off", "red"), "1": ("on", "green")}), [series([1, 1, 0])]
        ),
        "unsure": answered(states("Unsure", "", [(METRIC, "meter")], {"0": ("off", "red")}), [series([0, math.nan])]),
        "map": answered(heatmap("Map", "", METRIC, "joule"), buckets([[1, 2, 0], [0, 3, 1]])),
    }
    answer = draw(found, folder)
    assert (answer.returncode, answer.stderr) == (0, "")
    return folder


def reads(pictures: Path, name: str) -> list[str]:
    listed = json.loads((pictures / "panels" / "pictures.json").read_text())
    (found,) = [one["reads"] for one in listed if one["file"].endswith(name)]
    return [str(text) for text in found]


def colours(pictures: Path, name: str) -> set[tuple[int, ...]]:
    (path,) = (pictures / "panels").glob(f"*-{name}.png")
    with Image.open(path) as picture:
        found = picture.convert("RGB").getcolors(picture.width * picture.height)
    return {colour for _, colour in found or () if isinstance(colour, tuple)}


def test_a_tile_has_its_value_in_grafanas_unit(pictures: Path) -> None:
    assert reads(pictures, "watts") == ["Watts", "now", "1.50 kW"]


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_panel_without_data_reads_not_measured(pictures: Path, name: str) -> None:
    assert reads(pictures, name)[-1] == "Not measured"


def test_a_value_has_the_colour_of_its_threshold_below_zero_too(pictures: Path) -> None:
    assert reads(pictures, "small")[-1] == "-2 pJ"
    assert GREEN in colours(pictures, "small")


@pytest.mark.parametrize(("name", "text"), [("still", "No traffic"), ("blind", "Not measured")])
def test_a_judged_tile_without_a_number_says_why_and_does_not_judge(pictures: Path, name: str, text: str) -> None:
    assert reads(pictures, name)[-1] == text
    assert RED not in colours(pictures, name)


def test_a_line_has_the_colour_that_the_panel_gives_it(pictures: Path) -> None:
    assert BLUE in colours(pictures, "lines")


def test_a_table_has_the_columns_that_its_transformations_make(pictures: Path) -> None:
    assert reads(pictures, "table") == ["By model", "Model", "Energy", "Tokens", "m", "1.50 kJ", "2 Mil"]


@pytest.mark.parametrize(("name", "text"), [("states", "off"), ("unsure", "unknown"), ("map", "≤ 1 J")])
def test_a_sketch_says_that_it_is_one(pictures: Path, name: str, text: str) -> None:
    assert "sketched, not drawn by Grafana" in reads(pictures, name)
    assert text in reads(pictures, name)


def test_every_panel_has_a_picture_for_each_theme_and_a_line_in_the_list(pictures: Path) -> None:
    panels = {path.stem for path in pictures.glob("*-*.json")}
    drawn = {path.name for path in (pictures / "panels").glob("*.png")}
    assert drawn == {f"{name}{theme}.png" for name in panels for theme in ("", "-light")}
    listed = (pictures / "panels" / "pictures.md").read_text()
    assert all(f"| {name}.png |" in listed for name in panels)


@node
def test_what_cannot_be_drawn_is_named_and_the_run_fails(tmp_path: Path) -> None:
    good = answered(stat("Good", "", METRIC, "watt"), [series([1])])
    broken = {
        "unknown": {**good, "title": "Unknown", "type": "geomap"},
        "falling": answered(heatmap("Falling", "", METRIC, "joule"), [series([2], le="1"), series([1], le="+Inf")]),
        "good": good,
    }
    answer = draw(broken, tmp_path)
    assert answer.returncode == 1
    assert {line.split(":")[0] for line in answer.stderr.splitlines()} == {"Unknown", "Falling"}
    assert (tmp_path / "panels" / "02-good.png").is_file()


@node
def test_a_folder_without_answers_is_one_line(tmp_path: Path) -> None:
    answer = draw({}, tmp_path)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (1, 1)
    assert "make observability" in answer.stderr
