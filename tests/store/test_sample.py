"""A sample: what is possible, what it says of itself, and that nothing of a request is in it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.store_kill import made_sample
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.store.sample import COLUMNS, STEP_COLUMNS, Sample, pack_steps, unpack_steps
from llmco2_vllm.training.traffic import Candidate
from tests.store.made import SAMPLES, same

SAMPLE = made_sample(1)
# Names of devices, programs and versions, and digests: all known before the first request.
TEXTS = {
    "device", "scope", "meter", "predictor", "model_fingerprint", "engine_version", "package_version", "doubt",
    "feature_version",
}  # fmt: skip


def row(batch: BatchShape, share: float = 1.0) -> list[float]:
    return [share, 0.01, 3.0, *batch.prefill, *batch.decode, batch.encoder_tokens]


def test_a_sample_holds_no_text_of_a_request() -> None:
    assert {column.name for column in COLUMNS if column.kind is str} == TEXTS
    named = {field.name for field in fields(Sample)} | set(STEP_COLUMNS)
    assert not [name for name in named if "request" in name or "prompt" in name or "text" in name or "ids" in name]
    assert {str(field.type) for field in fields(Sample)} == {
        "float", "float | None", "int", "str", "Topology", "FloatArray",
    }  # fmt: skip


@given(SAMPLES)
def test_steps_survive_packing_to_the_last_bit(sample: Sample) -> None:
    assert unpack_steps(pack_steps(sample.steps)).tobytes() == sample.steps.tobytes()
    assert same(Sample.from_values(sample.values, unpack_steps(pack_steps(sample.steps))), sample)


@given(SAMPLES, SAMPLES)
def test_samples_share_a_key_just_when_all_they_hold_is_the_same(one: Sample, other: Sample) -> None:
    assert replace(one).content_key == one.content_key and len(one.content_key) == 16
    assert (one.content_key == other.content_key) == same(one, other)
    assert replace(one, engine=(one.engine + 1) % 2**31).content_key != one.content_key


def test_zeros_and_unknown_predictions_of_another_form_are_the_same_sample() -> None:
    plain = np.array([row(BatchShape(decode=PhaseShape(1, 1, 9, 9, 1)))])
    plain[0, 2] = np.nan
    other = plain.copy()
    other[0, STEP_COLUMNS.index("encoder_tokens")] = -0.0
    other.view(np.uint64)[0, 2] ^= 1  # another of the many NaN
    one, two = replace(SAMPLE, steps=plain), replace(SAMPLE, steps=other, energy_joules=-0.0 + SAMPLE.energy_joules)
    assert one.content_key == two.content_key


def test_a_sample_is_a_snapshot() -> None:
    steps = np.array(SAMPLE.steps)
    sample = replace(SAMPLE, steps=steps)
    steps[:] = 7
    assert same(sample, SAMPLE)
    with pytest.raises(ValueError, match="read-only"):
        sample.steps[0, 0] = 0.5


def test_numbers_of_numpy_become_plain_ones() -> None:
    sample = replace(
        SAMPLE,
        energy_joules=np.float32(2.5),
        engine=np.int64(3),
        topology=Topology(np.int32(2), 1, 1, np.bool_(True)),  # type: ignore[arg-type]
    )
    assert [type(value) for value in (sample.energy_joules, sample.engine)] == [float, int]
    assert sample.topology == Topology(2, 1, 1, True) and type(sample.topology.expert_parallel) is bool


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("energy_joules", float("nan"), "energy_joules=nan is not possible; allowed: a finite number, 0 or more"),
        ("energy_joules", None, "energy_joules=NoneType is not possible"),
        ("duration_seconds", "3", "duration_seconds=str is not possible"),
        ("sm_clock_mhz", -1, "sm_clock_mhz=-1 is not possible; allowed: a finite number, 0 or more, or nothing"),
        ("engine", 0.5, "engine=0.5 is not possible; allowed: a whole number, 0 to 2147483647"),
        ("devices", 2**31, "devices=2147483648 is not possible"),
        ("device", "x" * 121, "device=str is not possible; allowed: at most 120 printable characters"),
        ("meter", "two\nlines", "meter=str is not possible"),
        ("doubt", None, "doubt=NoneType is not possible"),
        ("topology", (1, 1, 1, False), "topology=tuple is not possible; allowed: a Topology"),
        ("steps", np.zeros((2, 3)), "steps of shape \\(2, 3\\) are not possible; allowed: \\(n, 14\\)"),
        ("steps", [[2.0] + [0.0] * 13], "steps: window_share=2.0 is not possible; allowed: 0 to 1"),
        ("steps", [[1.0, float("nan")] + [0.0] * 12], "steps: duration_seconds=nan is not possible"),
        ("steps", [[1.0] * 13 + [-1.0]], "steps: encoder_tokens=-1.0 is not possible"),
    ],
)
def test_what_is_not_possible_is_named_with_what_is_allowed(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SAMPLE, **{field: value})


@pytest.mark.parametrize(
    "packed", [b"", b"text", b"x\x9c\x03\x00\x00\x00\x00\x01" + b"!", None, pack_steps(SAMPLE.steps)[:-9]]
)
def test_bytes_that_are_no_steps_are_refused(packed: Any) -> None:
    if packed is not None and packed.startswith(b"x\x9c"):
        packed = packed[:-1]
        assert unpack_steps(packed).shape == (0, len(STEP_COLUMNS))
        packed = packed[:-1]
    with pytest.raises(ValueError):
        unpack_steps(packed)


@given(st.integers(0, 64), st.integers(1, 2000), st.integers(0, 64), st.integers(1, 5000), st.integers(1, 5))
def test_the_regime_of_like_steps_is_the_step_itself(
    prefills: int, each: int, decodes: int, context: int, number: int
) -> None:
    step = Candidate(prefills, each if prefills else 0, decodes, context if decodes or prefills else 0)
    sample = replace(SAMPLE, steps=np.array([row(step.batch, 0.25)] * number))
    wanted = list(step)
    if decodes:
        wanted[3] += 1  # the cache read by attention holds the new token too
    assert sample.regime == pytest.approx(tuple(wanted))


def test_the_regime_weighs_steps_by_their_share_of_the_window() -> None:
    whole, part = Candidate(0, 0, 10, 99).batch, Candidate(0, 0, 40, 99).batch
    sample = replace(SAMPLE, steps=np.array([row(whole), row(part, 0.5)]))
    assert sample.regime == pytest.approx((0, 0, 20, 100))
    assert replace(SAMPLE, steps=np.zeros((0, 14))).regime == (0, 0, 0, 0)


def test_the_error_is_of_the_steps_alone_and_unknown_when_a_part_of_it_is() -> None:
    sample = replace(SAMPLE, energy_joules=110.0, idle_joules=10.0, predicted_joules=90.0)
    assert sample.relative_error == pytest.approx(-0.1)
    for unknown in ({"idle_joules": None}, {"predicted_joules": None}, {"energy_joules": 10.0}):
        assert replace(sample, **unknown).relative_error is None  # type: ignore[arg-type]
