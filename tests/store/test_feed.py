"""Between the scheduler's thread and the store a bounded number of windows waits, and what is left out is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmco2_vllm import samples
from llmco2_vllm.samples import SampleFeed
from llmco2_vllm.store.reading import samples as stored
from llmco2_vllm.store.reading import store_path
from llmco2_vllm.store.writer import SampleStore
from tests.test_samples import ORIGIN, account


@pytest.mark.parametrize("queue_samples", [1024, 3])
def test_a_window_that_finds_no_room_is_counted_wherever_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue_samples: int
) -> None:
    monkeypatch.setattr(samples, "PERIOD_SECONDS", 3600.0)
    monkeypatch.setattr(samples, "MOST_WAITING", 5)
    feed = SampleFeed(SampleStore(tmp_path, queue_samples=queue_samples), ORIGIN, lambda: {"devices": []})
    for second in range(8):
        feed.take(account(float(second), None))  # nothing that a sample could be made of, hence nothing that is lost
        feed.take(account(float(second), 10.0 + second))
    assert (feed.state()["waiting"], feed.state()["dropped"]) == (5, 3)
    feed.close()
    kept = [sample.energy_joules for sample in stored(store_path(tmp_path))]
    assert kept == [10.0, 11.0, 12.0, 13.0, 14.0][:queue_samples]
    assert (feed.state()["waiting"], feed.state()["dropped"]) == (0, 8 - len(kept))
