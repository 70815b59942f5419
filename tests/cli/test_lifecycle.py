"""``llmco2 lifecycle``: the paper's rows from shipped files, every phase, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from llmco2_vllm.cli.main import main
from llmco2_vllm.core.embodied import MODELS, EmbodiedModel
from llmco2_vllm.core.units import convert
from llmco2_vllm.lifecycle.document import examples, read_lifecycle
from llmco2_vllm.lifecycle.figures import figures

DEVIATIONS = {"t5": -2.06, "gpt-3": 0.23, "gshard": 3.26, "switch": 7.92, "xlm": -3.54}
SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"parameters": 1e9},
    "hardware": {"device": "h100-sxm", "devices": 8, "power_watts": 600, "efficiency_ratio": 0.4},
    "site": {"pue": 1.2, "intensity_grams_per_kwh": 100},
    "training": {"tokens": 1e12},
}


def changed(**sections: Any) -> dict[str, Any]:
    """SMALL with keys of its sections replaced; a section of None is left out."""
    document = json.loads(json.dumps(SMALL))
    for name, value in sections.items():
        if value is None:
            document.pop(name)
        elif isinstance(value, dict) and isinstance(document.get(name), dict):
            document[name] |= value
        else:
            document[name] = value
    return document


def lifecycle(tmp_path: Path, document: Any, *options: str) -> Result:
    path = tmp_path / "life.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return run(str(path), *options)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["lifecycle", *arguments], env={"COLUMNS": "140"})


def read(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def phases(result: Result) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in read(result)["phases"]}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_the_papers_rows_are_shipped_and_deviate_from_it_as_published(name: str) -> None:
    found = read(run(name, "--json"))
    assert round(100 * found["deviation_ratio"]["operational"], 2) == DEVIATIONS[name]
    assert found["basis"] == "modelled" and found["schema"] == "llmco2-lifecycle/1"


def test_the_embodied_carbon_of_xlm_is_0_648_tonnes() -> None:
    found = read(run("xlm", "--json"))
    assert convert(found["total"]["embodied_grams"], "g", "t") == pytest.approx(0.6480, rel=1e-4)


@pytest.mark.parametrize("name", examples())
def test_no_figure_is_cut_on_a_narrow_screen(name: str) -> None:
    result = CliRunner().invoke(main, ["lifecycle", name], env={"COLUMNS": "80"})
    assert result.exit_code == 0 and "…" not in result.output


def test_help_names_the_shipped_files() -> None:
    help_text = " ".join(run("--help").output.split())
    assert all(name in help_text for name in examples())


@pytest.mark.parametrize("name", examples())
def test_every_shipped_file_is_read_and_shown_as_a_table(name: str) -> None:
    result = run(name)
    assert result.exit_code == 0, result.output
    assert "operational" in result.output and result.output.endswith("modelled, not measured\n")


def test_the_full_example_has_every_phase_with_operational_and_embodied_carbon() -> None:
    found = read(run("megatron-145b", "--json"))
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["training", "experimentation", "inference", "storage"]
    assert all(phase["operational_grams"] > 0 and phase["embodied_grams"] > 0 for phase in found["phases"])
    assert found["parameters"]["base"] == pytest.approx(145.6e9, rel=0.01)
    assert found["parallelism"] == {"tensor": 8, "pipeline": 8, "data": 22, "batch": 1827}
    assert "node 14nm taken as ACT's 14nm" in found["notes"]


def test_totals_are_the_sums_of_the_phases() -> None:
    found = read(run("megatron-145b", "--json"))
    keys = ("operational_grams", "embodied_grams", "embodied_idle_grams")
    assert found["total"] == pytest.approx({key: sum(row.get(key, 0) for row in found["phases"]) for key in keys})


def test_the_energy_of_a_phase_is_that_of_the_site_and_emits_the_intensity(tmp_path: Path) -> None:
    found = phases(lifecycle(tmp_path, changed(storage={"gigabytes": 1e6, "days": 365}), "--json"))
    for phase in found.values():
        assert phase["operational_grams"] == pytest.approx(convert(phase["energy_joules"], "J", "kWh") * 100)
    training = found["training"]
    assert training["energy_joules"] == pytest.approx(8 * 600 * training["duration_seconds"] * 1.2)


def test_experimentation_is_its_ratio_of_training_or_its_own_flops(tmp_path: Path) -> None:
    by_ratio = phases(lifecycle(tmp_path, changed(experimentation={"training_ratio": 0.25}), "--json"))
    by_flops = phases(lifecycle(tmp_path, changed(experimentation={"flops": 1.5e21}), "--json"))
    assert by_ratio["experimentation"] == pytest.approx(by_flops["experimentation"])
    assert by_ratio["experimentation"]["energy_joules"] == pytest.approx(by_ratio["training"]["energy_joules"] / 4)


def test_inference_may_have_hardware_and_a_site_of_its_own(tmp_path: Path) -> None:
    clean = {"intensity_grams_per_kwh": 10}
    slow = {"peak_teraflops": 100, "devices": 2, "power_watts": 50, "efficiency_ratio": 0.1}
    served = {"tokens": 1e12, "hardware": slow, "site": clean}
    found = phases(lifecycle(tmp_path, changed(inference=served), "--json"))["inference"]
    seconds = 2e21 / (2 * 100e12 * 0.1)
    assert found["duration_seconds"] == pytest.approx(seconds)
    assert found["operational_grams"] == pytest.approx(convert(2 * 50 * seconds, "J", "kWh") * 10)


def test_the_experts_of_a_mixture_weigh_on_its_size_and_not_on_its_flops(tmp_path: Path) -> None:
    sizes = {"layers": 24, "hidden": 2048, "vocabulary": 50000, "sequence": 2048}
    dense = changed(model={"parameters": None, "architecture": sizes})
    mixture = changed(model={"parameters": None, "architecture": {**sizes, "experts": 64, "moe_layer_ratio": 0.5}})
    first, second = (read(lifecycle(tmp_path, document, "--json")) for document in (dense, mixture))
    assert first["phases"] == second["phases"]
    assert second["parameters"]["total"] > 10 * second["parameters"]["base"]
    assert first["parameters"]["total"] == first["parameters"]["base"] == second["parameters"]["base"]


def test_storage_is_replicated_and_needs_no_device(tmp_path: Path) -> None:
    once = {"gigabytes": 1e6, "days": 365}
    found = [
        phases(lifecycle(tmp_path, changed(training=None, storage={**once, "replicas": count}), "--json"))["storage"]
        for count in (1, 3)
    ]
    assert found[1]["energy_joules"] == pytest.approx(3 * found[0]["energy_joules"])
    assert "devices" not in found[0] and "flops" not in found[0]


def test_drives_of_stored_data_are_counted_where_the_model_knows_them(tmp_path: Path) -> None:
    stored = {"gigabytes": 1000, "days": 365, "replicas": 3}
    found = phases(lifecycle(tmp_path, held() | {"storage": stored}, "--json"))["storage"]
    assert found["embodied_grams"] == pytest.approx(3 * 1000 * 18 / 5)
    on_disk = phases(lifecycle(tmp_path, held() | {"storage": stored | {"medium": "hdd"}}, "--json"))["storage"]
    assert "embodied_grams" not in on_disk


PARTS: dict[EmbodiedModel, list[dict[str, Any]]] = {
    "product": [{"part": "h100-sxm", "count": 8}, {"part": "host-p5", "lifetime_years": 5}],
    "components": [
        {"part": "h100-sxm", "count": 8},
        {"part": "ddr4", "gigabytes": 2048},
        {"part": "board", "square_centimetres": 1925},
    ],
    "llmcarbon": [{"part": "h100", "count": 8}, {"part": "dram", "gigabytes": 2048}, {"part": "other"}],
}


@pytest.mark.parametrize("model", MODELS)
def test_each_embodied_model_counts_its_own_parts_and_is_named(tmp_path: Path, model: EmbodiedModel) -> None:
    held = {"model": model, "lifetime_years": 4, "parts": PARTS[model]}
    found = read(lifecycle(tmp_path, changed(hardware={"embodied": held}), "--json"))
    assert found["total"]["embodied_grams"] > 0
    assert f"embodied carbon by model {model}" in found["notes"]


def test_a_part_may_outlive_the_others(tmp_path: Path) -> None:
    held = {"model": "product", "lifetime_years": 3, "parts": PARTS["product"]}
    found = phases(lifecycle(tmp_path, changed(hardware={"embodied": held}), "--json"))["training"]
    days = convert(found["duration_seconds"], "s", "day")
    assert found["embodied_grams"] == pytest.approx((8 * 164e3 / 3 + 5700e3 / 5) * days / 365)


@pytest.mark.parametrize(("policy", "busy", "idle"), [("line", 1, 1), ("busy", 2, None)])
def test_idle_time_is_carried_as_the_policy_says(tmp_path: Path, policy: str, busy: float, idle: float | None) -> None:
    held: dict[str, Any] = {"model": "product", "parts": PARTS["product"]}
    whole = phases(lifecycle(tmp_path, changed(hardware={"embodied": held}), "--json"))["training"]["embodied_grams"]
    half = held | {"utilisation_ratio": 0.5, "idle": policy}
    found = phases(lifecycle(tmp_path, changed(hardware={"embodied": half}), "--json"))["training"]
    assert found["embodied_grams"] == pytest.approx(busy * whole)
    assert found.get("embodied_idle_grams") == (None if idle is None else pytest.approx(idle * whole))


def test_embodied_carbon_that_is_not_known_is_left_out_and_said(tmp_path: Path) -> None:
    found = read(lifecycle(tmp_path, SMALL, "--json"))
    assert "embodied_grams" not in found["total"] and "embodied_grams" not in found["phases"][0]
    assert found["notes"] == ["embodied carbon not known: training"]


def test_the_chart_is_a_picture_of_the_phases(tmp_path: Path) -> None:
    chart = tmp_path / "life.png"
    assert run("megatron-145b", "--chart", str(chart)).exit_code == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_chart_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for target in (tmp_path / "life.abacus", tmp_path / "nowhere" / "life.png"):
        result = run("xlm", "--chart", str(target))
        assert result.exit_code == 1 and result.stderr.startswith("Error: --chart ")
        assert result.stderr.count("\n") == 1


def test_an_unknown_file_is_one_line_that_lists_the_examples() -> None:
    result = run("nothing.yaml")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr == (
        "Error: nothing.yaml: No such file or directory; "
        "expected a YAML file or one of gpt-3, gshard, megatron-145b, switch, t5, xlm\n"
    )


MEGATRON = {"device": "a100-80", "efficiency_ratio": None, "throughput": "megatron"}
SIZES = {"layers": 1, "hidden": 1, "vocabulary": 1, "sequence": 1}


def held(**keys: Any) -> dict[str, Any]:
    """SMALL on hardware with embodied parts, keys of that section replaced."""
    return changed(hardware={"embodied": {"model": "llmcarbon", "parts": [{"part": "v100"}]} | keys})


BAD: list[tuple[Any, str]] = [
    ("[]", "expected keys name, source, model, hardware"),
    ("a: [", "not YAML ("),
    ("", "expected keys name, source, model"),
    (changed(site={"pue": 0.9}), "site.pue=0.9 is not possible; allowed: greater than or equal to 1"),
    (changed(site={"intensity": 5}), "unknown key 'site.intensity' (did you mean 'intensity_grams_per_kwh'?)"),
    (changed(traning={}), "unknown key 'traning' (did you mean 'training'?); allowed: name, source, model"),
    (changed(site=None), "key 'site' is missing; allowed: name, source, model"),
    (changed(training={"tokens": "many"}), "training.tokens='many' is not possible; allowed: a valid number"),
    (changed(training={"tokens": float("inf")}), "training.tokens=inf is not possible; allowed: a finite number"),
    (changed(training=None), "file: expected at least one of training, experimentation, inference, storage"),
    (changed(training=None, inference={"tokens": 1}, experimentation={"training_ratio": 1}), "file: expected training"),
    (changed(experimentation={}), "experimentation: expected flops or training_ratio, one of the two"),
    (changed(model={"architecture": SIZES}), "model: expected parameters or architecture, one of the two"),
    (changed(hardware={"device": "abacus"}), "hardware: expected device to be one of v100-pcie, v100-sxm"),
    (changed(hardware={"device": None}), "hardware: expected peak_teraflops, or a device of the catalog"),
    (changed(hardware={"devices": None}), "hardware: expected devices, which only throughput: megatron"),
    (changed(hardware={"throughput": "megatron"}), "hardware: expected efficiency_ratio or throughput"),
    (changed(hardware=MEGATRON | {"device": "t4"}), "hardware: expected device a100-40 or a100-80 with throughput"),
    (changed(hardware=MEGATRON | {"peak_teraflops": 9}), "hardware: expected no peak_teraflops"),
    (changed(hardware=MEGATRON), "hardware.throughput: throughput of a tensor-parallel model is fitted on 1.7e+09 to"),
    (changed(hardware=MEGATRON, training=None, inference={"tokens": 1}), "inference.hardware: expected"),
    (held(lifetime_years=7), "hardware.embodied.lifetime_years=7 is not possible; allowed: less than or equal to 5"),
    (held(model="guess"), "hardware.embodied.model='guess' is not possible; allowed: 'product', 'components' or 'llm"),
    (held(idle="hidden"), "hardware.embodied.idle='hidden' is not possible; allowed: 'line' or 'busy'"),
    (held(parts=[]), "hardware.embodied.parts=[] is not possible"),
    (
        held(parts=[{"part": "ddr4", "gigabytes": 1}]),
        "hardware.embodied.parts.0.part='ddr4' is not possible with embodied model llmcarbon; allowed: cpu, tpu-v3",
    ),
    (
        held(parts=[{"part": "v100"}, {"part": "dram"}]),
        "hardware.embodied.parts.1: part 'dram' takes gigabytes, not none",
    ),
    (
        held(parts=[{"part": "v100", "watts": 3}]),
        "hardware.embodied.parts.0: part 'v100' takes no amount, not watts",
    ),
    (
        held(parts=[{"part": "v100", "cores": 3}]),
        "unknown key 'hardware.embodied.parts.0.cores'; allowed: part, count, gigabytes",
    ),
    (
        held(model="components", parts=[{"part": "die", "square_centimetres": 1, "node": "9nm"}]),
        "hardware.embodied.parts.0: node '9nm' is not known; allowed: 28nm",
    ),
    (
        held() | {"inference": {"tokens": 1, "hardware": held(model="product")["hardware"]}},
        "file: expected one embodied model for all hardware, not llmcarbon and product",
    ),
]


@pytest.mark.parametrize(("document", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_faulty_file_is_one_line_that_names_the_key_and_what_is_allowed(
    tmp_path: Path, document: Any, message: str
) -> None:
    result = lifecycle(tmp_path, document)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_a_model_that_was_not_fitted_is_refused_with_devices_of_the_fit_alone(tmp_path: Path) -> None:
    large = changed(model={"parameters": 30e9}, hardware=MEGATRON | {"devices": 512})
    assert "efficiency 43.9%" in " ".join(read(lifecycle(tmp_path, large, "--json"))["notes"])
    unknown = changed(model={"parameters": 30e9}, hardware=MEGATRON | {"devices": None})
    assert "number of devices is fitted on" in lifecycle(tmp_path, unknown).stderr


def test_the_library_gives_what_the_command_prints() -> None:
    assert figures(read_lifecycle(examples()["xlm"])).to_dict() == read(run("xlm", "--json"))
