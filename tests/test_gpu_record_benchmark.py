"""Recording a GPU: the scripts run end to end against the shim, and never let a simulation pass for a GPU.

What needs no engine is tested without one; the recording itself is one run of two minutes, looked at from all sides.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import gpu_figures, gpu_findings, gpu_record
from benchmarks.gpu_edges import EdgeRecorder, compress
from benchmarks.gpu_findings import Edges, MissingError, Recorded
from benchmarks.gpu_points import POINTS, Plan, Point
from benchmarks.gpu_provenance import (
    FILE,
    SIMULATED,
    SIMULATED_TITLE,
    RefusedError,
    check_folder,
    digest_of,
    read_provenance,
    write_provenance,
)
from benchmarks.gpu_record import METER_EDGES, PARQUET_FILE, SERVING_EDGES, SQLITE_FILE, copy_store
from benchmarks.meter_resolution import shim_environment
from llmco2_vllm.cli.main import main as llmco2
from llmco2_vllm.meters.replay import ReplayMeter
from llmco2_vllm.store.file import StoreFile
from llmco2_vllm.store.parquet import read_parquet
from llmco2_vllm.testing import FakeClock
from tests.gpu_recording import ROOT, recording, refused, run
from tests.meters.virtual import Bench, tiled
from tests.nvml_shim import shim

RESULTS = ROOT / "benchmarks" / "results"
ASKED = (Point(1, 64, 1), Point(4, 16, 24))
# Of the shim as --shim sets it.
TICK_SECONDS, LAG_SECONDS, IDLE_WATTS, BUSY_WATTS = 0.1, 0.03, 75.0, 500.0


# -- what a failure leaves ----------------------------------------------------------------


def test_a_part_that_fails_says_why_and_leaves_the_others(tmp_path: Path) -> None:
    found = recording(tmp_path)

    def fail() -> None:
        (tmp_path / gpu_record.METER_FILE).write_text("{}")
        raise RuntimeError("the driver\nis gone")

    found.part("meter", fail)
    found.part("serving", lambda: None)
    provenance = read_provenance(tmp_path)
    assert provenance["parts"] == {"meter": "failed: RuntimeError: the driver is gone", "serving": "done"}
    assert list(provenance["files"]) == [gpu_record.METER_FILE]
    assert (provenance["weights"], provenance["device"]["name"]) == ("random", "NVIDIA H200")
    with pytest.raises(MissingError, match="the driver is gone"):
        Recorded.open(tmp_path).path(METER_EDGES)


@pytest.mark.engine
def test_an_engine_that_does_not_start_costs_its_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATED, str(tmp_path / "control"))
    found = recording(tmp_path, model=tmp_path / "absent", engine={"no_such_option": 1})
    monkeypatch.setattr(EdgeRecorder, "mark", lambda self, phase: None)
    found.part("serving", found.serving)
    assert found.parts["serving"].startswith("failed: RuntimeError: exit status 1, see engine.log: ")
    assert (tmp_path / gpu_record.LOG_FILE).is_file()


def test_edges_that_were_cut_short_are_kept_with_their_phases(tmp_path: Path) -> None:
    plain, packed = tmp_path / "edges.csv", tmp_path / "edges.csv.gz"
    plain.write_text("time_seconds,energy_joules\n1.0,10\n2.0,20\n3.0,30\n4.")
    compress(plain, packed, [(1.5, "idle"), (2.5, "wave, fast")])
    again = packed.read_bytes()
    assert [row["phase"] for row in gpu_findings.read_table(packed)] == ["", "idle", "wave, fast"]
    assert not plain.exists()
    plain.write_text("time_seconds,energy_joules\n1.0,10\n2.0,20\n3.0,30\n")
    compress(plain, packed, [(1.5, "idle"), (2.5, "wave, fast")])
    assert packed.read_bytes() == again, "the same rows are the same bytes"


def test_a_recording_that_is_stopped_keeps_what_there_is(tmp_path: Path) -> None:
    if shim.compiler() is None:
        pytest.skip("no C compiler to build the NVML shim with")
    folder = tmp_path / "stopped"
    command = [sys.executable, "-m", "benchmarks.gpu_record", "--write", str(folder), "--seconds", "60"]
    with shim_environment() as environ:
        child = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert any("windows, idle" in line for line in child.stderr)
        time.sleep(3.0)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    found = Recorded.open(folder)
    assert found.provenance["parts"] == {"meter": "stopped before its end"}
    assert len(found.edges.counted.time) > 10
    assert found.meter["call_microseconds"]["p50"] > 0


# -- figures of edges -------------------------------------------------------------------


def made_edges(counter: Callable[[float], float], phases: list[tuple[float, str]], end: float = 20.0) -> Edges:
    """A counter that ticks each 100 ms, power that says the same, and looks 2 ms before each change."""
    time_seconds = np.array([0.1 * tick for tick in range(round(10 * end))])
    energy = np.array([counter(t) for t in time_seconds.tolist()])
    watts = np.diff(energy, append=2 * energy[-1] - energy[-2]) / 0.1
    phase = np.array([[name for begin, name in phases if begin <= t + 1e-9][-1] for t in time_seconds])
    return Edges(time_seconds, energy, watts, np.subtract(time_seconds, 0.002), phase)


def test_periods_seen_late_are_left_out() -> None:
    edges = made_edges(lambda t: 50 * t, [(0.0, "idle")])
    assert gpu_findings.periods(edges, "energy") == pytest.approx(np.full(198, 0.1))
    edges.looked[50] -= 0.05
    assert len(gpu_findings.periods(edges, "energy")) == 196


def test_power_by_phase_is_that_of_both_readings() -> None:
    edges = made_edges(lambda t: 50 * t + 300 * max(0.0, t - 10), [(0.0, "idle"), (10.0, "steady")])
    found = gpu_findings.mean_watts(edges)
    assert found["idle"] == pytest.approx({"counter_watts": 50, "integrated_watts": 50, "ratio": 1})
    assert found["steady"] == pytest.approx({"counter_watts": 350, "integrated_watts": 350, "ratio": 1})
    half = gpu_findings.mean_watts(edges._replace(power=edges.power / 2))
    assert half["steady"]["ratio"] == pytest.approx(2)


def test_spans_between_edges_err_less_than_those_between_readings() -> None:
    rows = gpu_findings.spread(made_edges(lambda t: 50 * t, [(0.0, "idle")]), "idle")
    assert [row["length_seconds"] for row in rows] == [0.2, 0.5, 1.0, 2.0, 5.0]
    for row in rows[1:]:
        assert row["edge_percent"] < 1e-6
        assert row["raw_percent"] == pytest.approx(row["raw_theory_percent"], rel=0.3)


def test_a_plan_goes_to_the_child_and_comes_back() -> None:
    plan = Plan(Path("a"), None, ASKED, 2.0, {"enforce_eager": True}, {"zone": "FR"}, "NVIDIA H200")
    assert Plan.parse(plan.json()) == plan
    assert Plan.parse(Plan(Path("a"), Path("b")).json()).points == POINTS
    options = plan.options(Path("b"))
    assert options["load_format"] == "dummy" and options["skip_tokenizer_init"] and options["max_model_len"] >= 65
    assert options["additional_config"]["carbon"] == {
        "meter": "nvml", "samples": "a", "device": "NVIDIA H200", "zone": "FR"
    }  # fmt: skip


# -- the whole of it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A recording of the shim with two points, made by the command."""
    if shim.compiler() is None:
        pytest.skip("no C compiler to build the NVML shim with")
    folder = tmp_path_factory.mktemp("recording") / "simulated"
    points = [",".join(map(str, point)) for point in ASKED]
    options = ("--seconds", "3", "--point-seconds", "1", "--json", "--points", *points)
    answer = run("gpu_record", "--write", str(folder), "--shim", *options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    parts = json.loads(answer.stdout.splitlines()[-1])
    assert parts["meter"] == parts["serving"] == "done" and parts["samples"].startswith("done: ")
    return Recorded.open(folder)


@pytest.fixture(scope="module")
def facts(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the figures show, and where they are."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("figures")
    answer = run("gpu_figures", str(recorded.folder), "--write", str(folder), "--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    document = json.loads(answer.stdout)
    assert (document["device"], document["weights"], document["absent"]) == (SIMULATED_TITLE, "random", {})
    return document["figures"], folder


@pytest.mark.engine
def test_the_provenance_says_whose_figures_they_are_and_that_weights_are_random(recorded: Recorded) -> None:
    said = recorded.provenance
    assert said["simulated"] is True
    assert [sign.split(",")[0] for sign in said["signs"]][:2] == [
        "--shim was given", "the library that answers is the shim of our tests"
    ]  # fmt: skip
    assert f"{said['device']['name']}|{said['device']['uuid']}" == shim.H200
    assert (said["weights"], said["engine"]["platform"]) == ("random", "cpu")
    assert said["predictor"].endswith("-h200-sxm") and said["engine"]["meter"] == "nvml"
    assert said["engine"]["vllm"] and said["versions"]["llmco2_vllm"] and "--shim" in said["command"]
    assert sorted(path.name for path in recorded.folder.iterdir()) == sorted([*said["files"], FILE])


def followed_tick(recorded: Recorded, name: str) -> float:
    """The tick that the product's sampler finds in a trace, whose windows hold what its counter counted."""
    bench = Bench()
    meter = bench.add(ReplayMeter(recorded.folder / name, bench.clock))
    edges = recorded.edges if name == METER_EDGES else recorded.serving
    windows = bench.run(meter.end_seconds - bench.clock())
    assert tiled(windows) and bench.state["basis"] == "counter"
    joules = sum(window.energy_joules or 0.0 for window in windows)
    assert joules == pytest.approx(edges.energy[-1] - edges.energy[0], rel=0.05)
    return float(bench.state["tick_seconds"])


@pytest.mark.engine
@pytest.mark.parametrize("name", [METER_EDGES, SERVING_EDGES])
def test_the_edges_are_a_trace_in_which_the_sampler_finds_the_tick(recorded: Recorded, name: str) -> None:
    assert followed_tick(recorded, name) == pytest.approx(TICK_SECONDS, rel=0.02)
    vitals = ReplayMeter(recorded.folder / name, FakeClock()).vitals()
    assert vitals == (45.0, 1980.0)


def test_the_sampler_follows_every_trace_that_a_gpu_left_in_the_results() -> None:
    found = [Recorded.open(file.parent) for file in sorted(RESULTS.rglob(FILE))]
    traces = [(one, name) for one in found for name in (METER_EDGES, SERVING_EDGES) if name in one.provenance["files"]]
    if not traces:
        pytest.skip("no GPU was recorded yet, see docs/h200.md")
    for one, name in traces:
        check_folder(one.folder, one.provenance["simulated"], one.provenance["device"]["name"])
        edges = one.edges if name == METER_EDGES else one.serving
        own = float(np.median(np.diff(edges.counted.time)))
        assert followed_tick(one, name) == pytest.approx(own, rel=0.05), one.folder


@pytest.mark.engine
def test_every_phase_is_marked_in_the_edges(recorded: Recorded) -> None:
    meter = {phase for phase, _, _ in recorded.edges.spans()}
    assert {"windows, idle", "windows, busy", "idle", "steady", "rise", "fall", "wave 0.02 s", "wave 0.4 s"} <= meter
    serving = {phase for phase, _, _ in recorded.serving.spans()}
    assert {"start", "between", *(point.name for point in ASKED)} <= serving


@pytest.mark.engine
def test_the_samples_can_be_imported_again_in_either_form(recorded: Recorded, tmp_path: Path) -> None:
    found = list(read_parquet(recorded.folder / PARQUET_FILE))
    assert found and {(s.device, s.meter) for s in found} == {("h200-sxm", "nvml")}
    assert sum(len(s.steps) for s in found) > len(ASKED)
    store = tmp_path / "store"
    store.mkdir()
    command = ["samples", "import", "--folder", str(store), str(recorded.folder / PARQUET_FILE)]
    assert CliRunner().invoke(llmco2, command).exit_code == 0
    packed = tmp_path / "packed"
    packed.mkdir()
    assert copy_store(store, packed / SQLITE_FILE) == len(found)
    write_provenance(packed, {k: v for k, v in recorded.provenance.items() if k != "digest"}, [SQLITE_FILE])
    again = Recorded.open(packed).samples
    assert {sample.content_key for sample in again} == {sample.content_key for sample in found}


@pytest.mark.engine
def test_without_pyarrow_the_store_is_copied_and_the_recording_says_so(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = StoreFile(tmp_path / "samples.sqlite", 1 << 30)
    target.write(recorded.samples)
    target.close()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = recording(tmp_path).samples()
    assert told == f"done: {len(recorded.samples)} windows as {SQLITE_FILE}, pyarrow is missing"
    assert [path.name for path in tmp_path.iterdir()] == [SQLITE_FILE]


@pytest.mark.engine
def test_requests_are_predicted_at_their_response_and_measured_when_they_are_final(recorded: Recorded) -> None:
    final = [row for row in recorded.requests if row["moment"] == "final"]
    assert len(recorded.requests) == 2 * len(final) >= 2 * sum(point.batch for point in ASKED)
    for row in final:
        assert (row["basis"], float(row["coverage_ratio"])) == ("measured", 1.0)
        assert float(row["measured_joules"]) > 0 and float(row["predicted_joules"]) > 0
    assert {row["basis"] for row in recorded.requests if row["moment"] == "response"} <= {"predicted", "mixed"}


@pytest.mark.engine
def test_the_figures_say_of_the_counter_what_the_shim_was_told_to_do(
    facts: tuple[dict[str, Any], Path], recorded: Recorded
) -> None:
    found, _ = facts
    assert found["periods"]["counter"]["p50_ms"] == pytest.approx(1e3 * TICK_SECONDS, rel=0.03)
    watts = {phase: row["counter_watts"] for phase, row in found["power"].items()}
    assert watts["windows, idle"] == pytest.approx(IDLE_WATTS, rel=0.03)
    assert watts["windows, busy"] == pytest.approx(BUSY_WATTS, rel=0.03)
    assert [row["ratio"] for row in found["waves"]] == pytest.approx([1.0] * len(found["waves"]), abs=0.1)
    lags = [row["lag_seconds"] for row in found["rises"]["rises"]]
    assert np.median(lags) == pytest.approx(LAG_SECONDS, abs=0.01)
    for row in found["windows"]["windows, idle"]:
        assert row["edge_percent"] < row["raw_percent"]
    assert found["calls"]["idle"]["p50"] > 0 and found["calls"]["busy"]["count"] >= 50
    assert set(found["request_parity"]["requests"]) == {point.name for point in ASKED}
    assert sum(row["count"] for row in found["window_parity"].values()) > 0
    assert [row["batch"] for row in found["request_parity"]["points"]] == [point.batch for point in ASKED]


@pytest.mark.engine
@pytest.mark.parametrize("name", gpu_figures.FIGURES)
def test_every_figure_is_drawn_and_says_that_it_is_simulated(facts: tuple[dict[str, Any], Path], name: str) -> None:
    from PIL import Image

    with Image.open(facts[1] / f"{name}.png") as picture:
        assert SIMULATED_TITLE in picture.info["Title"] and "H200" not in picture.info["Title"]
        assert ("random weights" in picture.info["Title"]) == name.endswith("parity")
        pixels = np.asarray(picture.convert("L"))
    for half in np.array_split(pixels, 2):
        assert (half < 128).sum() > 200, "something is drawn"


def forged(folder: Path, recorded: Recorded, **changes: Any) -> Path:
    """A copy of a recording whose provenance says otherwise, with a digest that fits."""
    shutil.copytree(recorded.folder, folder)
    document = {**json.loads((folder / FILE).read_text()), **changes}
    document["digest"] = digest_of(document)
    (folder / FILE).write_text(json.dumps(document))
    return folder


@pytest.mark.engine
def test_a_simulation_is_not_drawn_under_the_name_of_a_gpu(recorded: Recorded, tmp_path: Path) -> None:
    moved = shutil.copytree(recorded.folder, tmp_path / "h200")
    for arguments in ([str(moved), "--write", str(tmp_path / "x")], [str(recorded.folder), "--write", str(moved)]):
        assert "names the H200, what answers is simulated" in refused(run("gpu_figures", *arguments))
    assert not (tmp_path / "x").exists() and not list(moved.glob("*.png"))


@pytest.mark.engine
def test_a_provenance_that_was_changed_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    folder = shutil.copytree(recorded.folder, tmp_path / "copy")
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text.replace('"simulated": true', '"simulated": false'))
    assert "was changed after it was written" in refused(run("gpu_figures", str(folder)))


@pytest.mark.engine
def test_a_provenance_that_contradicts_itself_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    device = recorded.provenance["device"]
    claims: list[tuple[str, dict[str, Any]]] = [
        ("contradicts signs=", {"simulated": False}),
        ("is one of the shim's", {"simulated": False, "signs": []}),
        ("the engine ran on a CPU", {"simulated": False, "signs": [], "device": {**device, "uuid": "GPU-1f2e"}}),
        ("names no library", {"simulated": False, "signs": [], "device": {"name": "NVIDIA H200", "uuid": "GPU-1f2e"}}),
    ]
    for number, (reason, changes) in enumerate(claims):
        with pytest.raises(RefusedError, match=reason):
            Recorded.open(forged(tmp_path / str(number), recorded, **changes))


@pytest.mark.engine
def test_a_file_that_is_not_the_recorded_one_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    folder = shutil.copytree(recorded.folder, tmp_path / "copy")
    (folder / METER_EDGES).write_bytes((folder / SERVING_EDGES).read_bytes())
    with pytest.raises(RefusedError, match=r"edges-meter\.csv\.gz: is not the file that was recorded"):
        Recorded.open(folder)
    (folder / METER_EDGES).unlink()
    with pytest.raises(RefusedError, match=r"edges-meter\.csv\.gz: is not"):
        Recorded.open(folder)
