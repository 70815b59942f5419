"""Samples: every metered window reaches the store, and a window that cannot be stored harms nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.core.attribution import Activity, WindowAccount
from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.metering import Doubt, MeterWindow
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.core.steps import Step, StepShare
from llmco2_vllm.samples import Origin, SampleFeed, fingerprint
from llmco2_vllm.store.reading import samples, store_path
from llmco2_vllm.store.writer import SampleStore
from llmco2_vllm.testing import ConstantPredictor

MODEL = ModelSpec(32, 4096, 32, 8, 128, 14336, 128256)
ORIGIN = Origin("h100-sxm", "nvml", "gnn/2-h100", Topology(2), fingerprint(MODEL), 0, "vllm 0.32.0")
BATCH = BatchShape(PhaseShape(1, 100, 5050, 100, 1), PhaseShape(8, 8, 8000, 8000, 8))


def account(begin: float, joules: float | None, doubt: Doubt = Doubt.NONE, trusted: bool = True) -> WindowAccount:
    step = Step(begin, ConstantPredictor().estimate(BATCH), BATCH)
    step.close(begin, begin + 0.1)
    parts = (StepShare(step, 0.5),)
    window = MeterWindow(0, begin, begin + 0.2, joules, 0.3, doubt)
    predicted = step.predicted_joules / 4
    return WindowAccount(window, parts, Activity.AWAKE, 0.05, predicted, 9.0, 1.0, 0.0, 1.1, trusted, 0.0)


def feed(folder: Path) -> SampleFeed:
    return SampleFeed(SampleStore(folder), ORIGIN, lambda: {"devices": [{"scope": "gpu", "sm_clock_mhz": 1980.0}]})


def test_windows_are_stored_with_their_steps_and_what_makes_them_doubtful(tmp_path: Path) -> None:
    subject = feed(tmp_path)
    subject.take(account(1.0, 10.0))
    subject.take(account(2.0, 11.0, Doubt.FROZEN))
    subject.take(account(3.0, 12.0, trusted=False))
    subject.take(account(4.0, None, Doubt.LOST))
    subject.close()
    first, second, third = samples(store_path(tmp_path))
    assert (first.energy_joules, first.doubt, first.devices, first.sm_clock_mhz) == (10.0, "", 1, 1980.0)
    assert first.duration_seconds == pytest.approx(0.2) and first.idle_seconds == pytest.approx(0.15)
    assert first.temperature_celsius is None and first.topology == Topology(2)
    share, duration, predicted, *counts = first.steps[0].tolist()
    assert (share, duration) == (0.5, pytest.approx(0.1))
    # The window is that of one of two devices, and so is the prediction.
    step = account(1.0, 1.0).parts[0].step
    assert predicted == pytest.approx(step.predicted_joules / 2)
    assert counts == [*BATCH.prefill, *BATCH.decode, 0]
    assert (second.doubt, third.doubt) == ("counter frozen while busy", "energy far from the recent ratio")


def test_a_window_that_makes_no_sample_is_counted_and_the_next_ones_are_kept(tmp_path: Path) -> None:
    subject = feed(tmp_path)
    subject.take(account(1.0, float("nan")))
    subject.take(account(2.0, 10.0))
    subject.close()
    assert subject.state()["build_failures"] == 1
    assert [sample.energy_joules for sample in samples(store_path(tmp_path))] == [10.0]


def test_a_sample_has_the_scope_that_its_device_has_by_then(tmp_path: Path) -> None:
    state: dict[str, Any] = {"devices": []}  # the driver is silent as yet
    subject = SampleFeed(SampleStore(tmp_path), ORIGIN, lambda: state)
    state["devices"] = [{"scope": "module"}, {"scope": "gpu"}]
    subject.take(account(1.0, 10.0))
    subject.close()
    assert [sample.scope for sample in samples(store_path(tmp_path))] == ["module"]


def test_a_wall_clock_that_is_set_while_serving_dates_the_samples_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = feed(tmp_path)
    monkeypatch.setattr(time, "time", lambda: time.monotonic() + 1e6)
    subject.take(account(1.0, 10.0))
    subject.close()
    assert [s.began_epoch_seconds for s in samples(store_path(tmp_path))] == [pytest.approx(1e6, abs=1e3)]


def test_a_model_has_one_fingerprint_and_another_size_another() -> None:
    assert fingerprint(MODEL) == fingerprint(ModelSpec(32, 4096, 32, 8, 128, 14336, 128256))
    assert fingerprint(MODEL) != fingerprint(ModelSpec(33, 4096, 32, 8, 128, 14336, 128256))
