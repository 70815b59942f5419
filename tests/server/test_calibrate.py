"""A real server is calibrated, and one started with the calibration predicts its steps better.

The prediction it starts from is 20 times too slow on purpose, far more than the machine's load can blur.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmco2_vllm.cli.main import main
from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from llmco2_vllm.predictor.calibration import Coefficients, RooflineCalibration
from llmco2_vllm.predictor.deployment import Calibration, Point
from llmco2_vllm.training.driver import Driver, Driving, LiveServer
from llmco2_vllm.training.traffic import Candidate
from tests.server.clients import MODEL, Clients, checked

pytestmark = pytest.mark.server

TOO_SLOW = 20.0
LIMITS = ("--max-num-seqs", "4", "--max-num-batched-tokens", "128", "--max-model-len", "128")
DECODE_STEPS = 48
FEW = ("--rounds", "1", "--per-round", "6", "--decode-steps", str(DECODE_STEPS))
# A mix that was over before the client could look at it says nothing; on a busy machine that happens.
TRIES = 10
UNSEEN = (Candidate(1, 60, 0, 0), Candidate(0, 0, 3, 40))


def slowed(coefficients: Coefficients) -> Coefficients:
    """Every time but that of collectives, TOO_SLOW times as long."""
    changes = {}
    for item in fields(Coefficients):
        value = getattr(coefficients, item.name)
        if item.name in ("compute_efficiency", "bandwidth_efficiency"):
            changes[item.name] = value / TOO_SLOW
        elif item.name.endswith("_overhead_seconds"):
            changes[item.name] = value * TOO_SLOW
    return replace(coefficients, **changes)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the Roofline that predicts far too slow steps on CPUs."""
    shipped = RooflineCalibration.load()
    cpu = replace(shipped.kinds["cpu"], coefficients=slowed(shipped.kinds["cpu"].coefficients))
    path = tmp_path_factory.mktemp("predictor") / "slow.json"
    path.write_text(json.dumps(replace(shipped, version="slow/1", kinds={**shipped.kinds, "cpu": cpu}).to_dict()))
    return path


@contextmanager
def running(model: Path, *carbon: str) -> Iterator[str]:
    """The address of a server with these settings."""
    arguments = ("--served-model-name", MODEL, "--max-num-seqs", "4", *carbon)
    with VllmServer(model, arguments, None, choose_port(None)) as server:
        server.wait_ready()
        yield server.url


def log_ratios(url: str) -> list[float]:
    """Log of observed over predicted seconds of mixes that were not measured for the calibration."""
    with LiveServer(url) as server:
        server.card()
        driving = Driving(vocab=49152, max_model_len=2048, max_num_batched_tokens=2048, decode_steps=DECODE_STEPS)
        driver = Driver(server, driving)
        driver.warm_up()
        points = [measured(driver, candidate) for candidate in UNSEEN]
    return [
        math.log(point.observed_seconds / (point.predicted_prefill_seconds + point.predicted_decode_seconds))
        for point in points
    ]


def measured(driver: Driver, candidate: Candidate) -> Point:
    """The mix, driven until it could be looked at."""
    for _ in range(TRIES):
        if (point := driver.measure(candidate)) is not None:
            return point
    raise AssertionError(f"{candidate} could not be looked at in {TRIES} tries")


@pytest.fixture(scope="module")
def outcome(model_dir: Path, predictor: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Log ratios before and after, the calibration, and what the calibrated server says of itself."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    base = ("--carbon-config.predictor", str(predictor))
    with running(model_dir, *base) as url:
        before = log_ratios(url)
        result = CliRunner().invoke(main, ["calibrate", "--url", url, *LIMITS, *FEW, "-o", str(path), "--json"])
        assert result.exit_code == 0, result.output
    with running(model_dir, *base, "--carbon-config.calibration", str(path)) as url, Clients(url) as clients:
        after = log_ratios(url)
        status = clients.http.get("/carbon").raise_for_status().json()
        answer = clients.post("/v1/completions", prompt="Once upon a time", max_tokens=4)
        again = CliRunner().invoke(main, ["calibrate", "--url", url, *LIMITS, *FEW, "-o", str(path)])
    return {
        "before": before,
        "after": after,
        "calibration": Calibration.load(path),
        "scores": json.loads(result.stdout)["scores"],
        "status": status,
        "carbon": answer["carbon"],
        "again": again,
    }


def test_both_phases_of_a_calibrated_server_take_nearer_to_what_is_predicted(outcome: dict[str, Any]) -> None:
    for before, after in zip(outcome["before"], outcome["after"], strict=True):
        assert before < math.log(0.5), "far too slow, as made"
        assert abs(after) < abs(before)


def test_the_calibration_is_of_this_deployment_and_knows_no_energy(outcome: dict[str, Any]) -> None:
    found = outcome["calibration"]
    assert found.deployment.model_name == MODEL
    assert (found.deployment.device, found.deployment.dtype) == ("cpu", "bf16")
    assert found.predictor == "slow/1-cpu"
    assert found.energy.startswith("not measured: ")
    assert found.prefill.energy_ratio is None and found.decode.energy_ratio is None
    assert outcome["scores"]["time"]["after"]["mape"] < outcome["scores"]["time"]["before"]["mape"]


def test_a_calibrated_server_says_so_in_every_answer(outcome: dict[str, Any]) -> None:
    assert outcome["status"]["predictor"] == "slow/1-cpu+cal"
    assert all(engine["failures"] == {} for engine in outcome["status"]["engines"])
    assert checked(outcome["carbon"])["predictor"] == "slow/1-cpu+cal"


def test_a_calibrated_server_is_not_calibrated_again(outcome: dict[str, Any]) -> None:
    assert outcome["again"].exit_code == 1
    assert "is calibrated already" in outcome["again"].stderr
