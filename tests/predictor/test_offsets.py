"""Residuals of deployments that were measured: shared with what is alike, with nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.offsets import Offsets, Rows, architecture_key, deployment_key

MODEL = ModelSpec(32, 4096, 32, 8, 128, 14336, 128256)
OTHER = replace(MODEL, layers=40)
ALONE = Topology()


def learned(residual: float = 0.3, batches: tuple[int, ...] = (8, 64)) -> Offsets:
    count = len(batches)
    rows = Rows(
        [architecture_key(MODEL)] * count,
        [deployment_key(MODEL, "h100-sxm", ALONE)] * count,
        ["chat"] * count,
        np.log(batches),
    )
    return Offsets.learn(rows, np.full((count, 2), [residual, -residual]))


def test_a_measured_point_takes_most_of_its_residual() -> None:
    offset = learned().bound(MODEL, "h100-sxm", ALONE)
    assert offset is not None
    for batch in (8, 64):
        time, power = offset(batch)
        assert 0.2 < time < 0.3 and power == pytest.approx(-time)


def test_another_architecture_takes_nothing() -> None:
    assert learned().bound(OTHER, "h100-sxm", ALONE) is None


@pytest.mark.parametrize(
    ("device", "topology"),
    [("b200", ALONE), ("h100-sxm", Topology(tensor_parallel=2)), ("h100-sxm", Topology(expert_parallel=True))],
)
def test_another_deployment_of_the_architecture_takes_a_part(device: str, topology: Topology) -> None:
    there, here = learned().bound(MODEL, device, topology), learned().bound(MODEL, "h100-sxm", ALONE)
    assert there is not None and here is not None
    assert 0 < there(8)[0] < 0.7 * here(8)[0]


def test_beyond_the_measured_batches_the_nearest_holds() -> None:
    offset = learned(batches=(8, 64, 256)).bound(MODEL, "h100-sxm", ALONE)
    assert offset is not None
    assert offset(1) == offset(0) == pytest.approx(offset(8))
    assert offset(100_000) == pytest.approx(offset(256))


def test_the_table_of_a_deployment_is_the_process_itself() -> None:
    offsets = learned(batches=(8, 16, 64, 256))
    offset = offsets.bound(MODEL, "h100-sxm", ALONE)
    assert offset is not None
    for batch in (8, 11, 40, 200, 256):
        rows = Rows(
            [architecture_key(MODEL)], [deployment_key(MODEL, "h100-sxm", ALONE)], [""], np.array([math.log(batch)])
        )
        assert offset(batch) == pytest.approx(tuple(offsets.at(rows)[0]), rel=2e-3)


def test_one_measured_batch_is_enough() -> None:
    offset = learned(batches=(32,)).bound(MODEL, "h100-sxm", ALONE)
    assert offset is not None
    assert offset(1) == pytest.approx(offset(32))
    assert offset(999) == pytest.approx(offset(32))


def test_what_was_not_measured_counts_as_no_residual() -> None:
    known = learned()
    unknown = Offsets.learn(known.rows, np.full((2, 2), math.nan))
    assert not unknown.weights.any()
