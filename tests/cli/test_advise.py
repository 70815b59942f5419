"""``llmco2 advise`` as typed in a shell: table, JSON, plot, and errors of one line."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmco2_vllm.cli import advise
from llmco2_vllm.cli.main import main
from llmco2_vllm.grid.regions import region
from tests.advice.asked import LLAMA_8B, LLAMA_70B


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def run(model: Path, *options: object) -> Result:
    given = ["advise", "--model", model, "--workload", "azure-conv", "--devices", "h100-sxm,a100-80", *options]
    return CliRunner().invoke(main, [str(word) for word in given], env={"COLUMNS": "80"})


def document(model: Path, *options: object) -> dict[str, Any]:
    result = run(model, *options, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_table_has_the_best_of_every_device_and_zone_uncut(model: Path) -> None:
    result = run(model, "--zones", "FR,PL", "--slo", "tpot=50ms")
    assert result.exit_code == 0, result.output
    assert "FR, 56 g/kWh" in result.output and "PL, " in result.output and "…" not in result.output
    assert result.output.count("\nh100-sxm ") == result.output.count("\na100-80 ") == 2
    assert "predicted, not measured" in result.output
    assert "not possible: h100-sxm, TP 1, batch 256: slo, tpot" in result.output


def test_json_has_every_row_and_the_best_of_them(model: Path) -> None:
    found = document(model, "--zones", "FR,PL")
    assert found["basis"] == "predicted" and found["workload"]["name"] == "azure-conv"
    configurations = {(row["device"], row["tensor_parallel"], row["batch_limit"]) for row in found["rows"]}
    assert len(configurations) + len(found["infeasible"]) == 2 * 4 * 9
    assert len(found["rows"]) == 2 * len(configurations)
    for row in found["best"]:
        same = [r for r in found["rows"] if (r["device"], r["zone"]) == (row["device"], row["zone"])]
        assert row in same and row["total_grams"] == min(r["total_grams"] for r in same)
    by_zone = {row["zone"]: row for row in found["rows"] if row["tensor_parallel"] == 2 and row["batch_limit"] == 8}
    assert by_zone["FR"]["embodied_grams"] == by_zone["PL"]["embodied_grams"]
    ratio = by_zone["PL"]["grams_per_kwh"] / by_zone["FR"]["grams_per_kwh"]
    assert by_zone["PL"]["operational_grams"] == pytest.approx(ratio * by_zone["FR"]["operational_grams"])


def test_a_file_of_requests_is_a_workload_and_its_name_is_told(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt_tokens": 50, "output_tokens": 20}\n')
    result = run(model, "--workload", path, "--json")
    assert json.loads(result.stdout)["workload"]["prompt_tokens_mean"] == 50


def test_an_hourly_file_adds_the_best_and_worst_hour(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "fr.csv"
    lines = [f"2024-01-01 {hour:02}:00,{20 + abs(hour - 13)}" for hour in range(24)]
    path.write_text("\n".join(["datetime_utc,FR", *lines]) + "\n")
    result = run(model, "--zones", "FR", "--intensity-file", f"FR={path}")
    assert "operational g at the best hour, 13:00 UTC" in " ".join(result.output.split())
    hours = document(model, "--zones", "FR", "--intensity-file", f"FR={path}")["rows"][0]
    assert (hours["best_hour"]["hour_utc"], hours["worst_hour"]["hour_utc"]) == (13, 0)


@pytest.mark.parametrize("against", ["tpot", "throughput"])
def test_the_plot_is_an_image(model: Path, tmp_path: Path, against: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "front.png"
    result = run(model, "--zones", "FR,DE,PL,US", "--plot", path, "--plot-against", against)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_without_matplotlib_a_plot_is_refused_before_the_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = run(model, "--plot", "front.png", "--zones", "nowhere")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "matplotlib is not installed; pip install matplotlib" in result.stderr


def test_the_title_says_by_what_the_rows_are_the_best(model: Path) -> None:
    def title(*options: str) -> str:
        return " ".join(run(model, "--tp", "1", *options).output.split())

    assert "): least total device" in title()
    assert "least operational, as total needs an embodied figure that is not known" in title("--devices", "l4")
    assert "least total; least operational where no embodied" in title("--devices", "l4,h100-sxm")
    assert "): least energy device" in title("--devices", "l4", "--by", "energy")
    assert document(model, "--devices", "l4,h100-sxm", "--tp", "1")["best_by_operational"] == ["l4"]
    assert document(model)["best_by_operational"] == []


def test_json_says_what_kind_of_intensity_each_zone_has(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "fr.csv"
    lines = [f"2024-01-01 {hour:02}:00,{20 + hour},{int(hour == 3)}" for hour in range(24)]
    path.write_text("\n".join(["datetime_utc,FR,estimated", *lines]) + "\n")
    before = time.time()
    found = document(model, "--zones", "FR,PL,WORLD", "--tp", "1", "--intensity-file", f"FR={path}")
    after = time.time()
    file, table, world = found["zones"]
    assert {zone["method"] for zone in found["zones"]} == {"average"}
    assert file["year"] == 2024 and file["estimated"] is True and "factors" not in file
    end = datetime(2024, 1, 2, tzinfo=UTC).timestamp()
    assert before - end <= file["age_seconds"] <= after - end
    assert table["factors"] == "lifecycle" and table["estimated"] is True and "factors" not in world
    assert table["source"] == f"static:{table['year']}"
    begin_of_next = datetime(table["year"] + 1, 1, 1, tzinfo=UTC).timestamp()
    assert max(0.0, before - begin_of_next) <= table["age_seconds"] <= max(0.0, after - begin_of_next)


def test_the_lifetime_of_hosts_is_that_of_devices_unless_it_is_said(model: Path) -> None:
    years = [
        document(model, "--lifetime-years", "3", *more)["embodied"] for more in ((), ("--host-lifetime-years", "5"))
    ]
    assert [(one["lifetime_years"], one["host_lifetime_years"]) for one in years] == [(3.0, 3.0), (3.0, 5.0)]


def test_a_region_is_its_zone_and_its_pue_unless_one_is_given(model: Path) -> None:
    named = region("aws:eu-west-3")
    assert named.pue is not None
    asked = ("--region", "aws:eu-west-3", "--tp", "1")
    found, other = (document(model, *asked, *more) for more in ((), ("--pue", "1.5")))
    assert [zone["zone"] for zone in found["zones"]] == ["FR"]
    assert found["site"] == {"pue": named.pue, "pue_source": named.pue_source}
    assert other["site"] == {"pue": 1.5, "pue_source": "settings"}
    assert (named.pue_note in found["notes"], named.pue_note in other["notes"]) == (True, False)
    assert found["rows"] == document(model, "--zones", "FR", "--pue", named.pue, "--tp", "1")["rows"]
    assert f"PUE {named.pue:g} of aws:eu-west-3" in run(model, *asked).output


def test_without_a_published_pue_that_of_the_it_load_alone_is_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpublished = replace(region("aws:eu-west-3"), pue=None, pue_source=None, pue_year=None, pue_scope=None)
    monkeypatch.setattr(advise, "find_region", {"aws:eu-west-3": unpublished}.__getitem__)
    found, other = (document(model, "--tp", "1", *more) for more in (("--region", "aws:eu-west-3"), ("--zones", "FR")))
    assert found["site"] == other["site"] == {"pue": 1.0}
    assert (found["rows"], found["notes"]) == (other["rows"], other["notes"])


def test_what_the_node_and_the_site_add_is_counted_once(model: Path) -> None:
    def grams(*options: str) -> list[float]:
        return [row["operational_grams"] for row in document(model, "--tp", "1", *options)["rows"]]

    more = ("--pue", "1.5", "--node-overhead", "0.4", "--auxiliary", "0.1")
    assert grams(*more) == pytest.approx([1.5 * 1.4 * 1.1 * one for one in grams()])
    assert document(model, "--tp", "1", *more)["site"]["auxiliary_ratio"] == 0.1


@pytest.mark.parametrize(
    "option", ["--pue", "--node-overhead", "--auxiliary", "--lifetime-years", "--host-lifetime-years"]
)
def test_a_number_that_is_none_is_refused_by_the_name_of_its_option(model: Path, option: str) -> None:
    result = run(model, option, "nan")
    assert result.exit_code == 2 and f"Error: Invalid value for '{option}': nan is not possible" in result.stderr


def test_figures_outside_of_the_training_data_are_marked(model: Path) -> None:
    result = run(model, "--devices", "mi300x")
    assert "mi300x *" in result.output and "*: outside of what the predictor was trained on" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", "abacus"), "device 'abacus' is not in the catalog; allowed: cpu"),
        (("--devices", ","), "devices=',' is not possible"),
        (("--zones", "UK"), "zone='UK' is not known"),
        (("--zones", "fr"), "near: FR"),
        (("--region", "aws:mars"), "region='aws:mars' is not in the table"),
        (
            ("--region", "aws:eu-west-3", "--zones", "FR"),
            "region='aws:eu-west-3' and zones='FR' are both there; allowed: one of them",
        ),
        (("--workload", "no-trace"), "workload='no-trace' is not possible; allowed: azure-conv, azure-code"),
        (("--slo", "tpot=fast"), "slo: tpot='fast' is not possible; allowed: seconds above 0"),
        (("--slo", "p99=1"), "allowed: ttft=SECONDS, tpot=SECONDS, latency=SECONDS"),
        (("--slo", "tpot=1ms"), "no configuration is possible with the objectives; for example"),
        (("--tp", "0"), "tp='0' is not possible"),
        (("--intensity-file", "FR"), "intensity-file='FR' is not possible; allowed: ZONE=FILE"),
        (("--intensity-file", "WORLD=no/such.csv"), "no/such.csv"),
        (("--predictor", "no/such/file"), "no/such/file"),
        (("--plot", "front.abc"), "--plot front.abc: .abc is no image; allowed: "),
        (("--devices", "t4", "--tp", "1"), "no configuration is possible with this model and workload; for example t4"),
    ],
)
def test_a_wrong_option_is_one_clear_line(model: Path, options: tuple[str, ...], message: str) -> None:
    result = run(model, *options)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama"}'])
def test_a_file_that_is_no_model_config_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    result = run(model)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


def test_all_devices_are_those_of_the_catalog(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA_70B))
    found = document(model, "--devices", "all", "--tp", "8")
    named = {row["device"] for row in found["rows"]} | {one["device"] for one in found["infeasible"]}
    assert {"h100-sxm", "l4", "mi300x"} <= named
