"""From accounts of windows to samples in the store, on a thread of their own: no step waits for an array."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import llmco2_vllm
from llmco2_vllm.core.attribution import WindowAccount
from llmco2_vllm.core.features import FEATURES_VERSION
from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.core.steps import StepShare
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample
from llmco2_vllm.store.writer import SampleStore

logger = logging.getLogger("vllm.llmco2")
PERIOD_SECONDS = 0.5
MOST_WAITING = 1024


def fingerprint(model: ModelSpec) -> str:
    """Digest of a model's sizes: alike for all checkpoints of one architecture and precision."""
    return hashlib.blake2b(repr(model).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What all samples of an engine share; fields as of ``Sample``."""

    device: str
    meter: str
    predictor: str
    topology: Topology
    model_fingerprint: str
    engine: int
    engine_version: str


class SampleFeed:
    """Takes accounts from the scheduler thread and hands samples to the store.

    meter: state of the sampler, whose ``devices`` have ``scope``, ``sm_clock_mhz`` and ``temperature_celsius``.
    """

    def __init__(self, store: SampleStore, origin: Origin, meter: Callable[[], dict[str, Any]]) -> None:
        self.store, self.origin = store, origin
        self.failures = self.dropped = 0
        self._meter = meter
        self._waiting: deque[WindowAccount] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmco2-samples", daemon=True)
        self._thread.start()

    def take(self, account: WindowAccount) -> None:
        """Keep an account for the store, or count it where too many wait. For the scheduler thread: one append."""
        if account.window.energy_joules is None:
            return
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(account)
        else:
            self.dropped += 1

    def state(self) -> dict[str, Any]:
        """Plain values for ``GET /carbon``; waiting and dropped on the way to the store or in it."""
        stored = self.store.state()
        waiting, dropped = stored["waiting"] + len(self._waiting), stored["dropped"] + self.dropped
        return {**stored, "waiting": waiting, "dropped": dropped, "build_failures": self.failures}

    def close(self) -> None:
        """Store what waits."""
        self._stop.set()
        self._thread.join(2.0)
        self._drain()
        self.store.close()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            self._drain()

    def _drain(self) -> None:
        while self._waiting:
            try:
                self.store.append(self._sample(self._waiting.popleft()))
            except Exception as error:
                self.failures += 1
                if self.failures == 1:
                    logger.warning("llmco2: a window could not be kept as a sample (%s); serving goes on", error)

    def _sample(self, account: WindowAccount) -> Sample:
        window, origin = account.window, self.origin
        devices = self._meter()["devices"]
        device = devices[window.device] if window.device < len(devices) else {}
        doubt = str(window.doubt) or ("" if account.trusted else "energy far from the recent ratio")
        # Windows are on the monotonic clock, samples on that of the calendar, which may be set while we serve.
        epoch_seconds = time.time() - time.monotonic()
        return Sample(
            began_epoch_seconds=window.begin_seconds + epoch_seconds,
            duration_seconds=window.duration_seconds,
            energy_joules=window.energy_joules or 0.0,
            sigma_joules=window.sigma_joules,
            idle_seconds=max(0.0, window.duration_seconds - account.busy_seconds),
            idle_joules=account.idle_joules,
            predicted_joules=account.predicted_joules,
            devices=1,
            package_version=llmco2_vllm.__version__,
            # Asked for now: a driver that was silent at the start told it later, and one that was reloaded, anew.
            scope=device.get("scope", ""),
            sm_clock_mhz=device.get("sm_clock_mhz"),
            temperature_celsius=device.get("temperature_celsius"),
            doubt=doubt,
            feature_version=FEATURES_VERSION,
            steps=np.array([row for part in account.parts for row in _rows(part, origin.topology)]).reshape(
                -1, len(STEP_COLUMNS)
            ),
            **vars(origin),
        )


def _rows(part: StepShare, topology: Topology) -> Iterator[list[float]]:
    """Each execution in the order of ``STEP_COLUMNS``; the prediction is that of one device, as the energy is."""
    step, share = part
    for execution in range(step.executions):
        shape = step.shape(execution)
        yield [
            min(share, 1.0),
            step.busy_seconds / step.executions,
            step.joules(execution) / topology.engine_devices,
            *shape.prefill,
            *shape.decode,
            shape.encoder_tokens,
        ]
