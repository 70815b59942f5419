"""Observations as rows of the Gaussian process over what the network leaves unexplained (``predictor/offsets.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.predictor.offsets import Offsets, Rows, architecture_key, deployment_key
from llmco2_vllm.training.observation import Observation

FloatArray = NDArray[np.float64]


def rows_of(observations: Sequence[Observation]) -> Rows:
    """Keys and log batch of observations; sources do not share residuals."""
    return Rows(
        [
            f"{o.source}:{architecture_key(o.model)}" if o.source != SHIPPED else architecture_key(o.model)
            for o in observations
        ],
        [_deployment(o) for o in observations],
        [o.workload for o in observations],
        np.array([math.log(max(_requests(o), 1.0)) for o in observations]),
    )


def learn(observations: Sequence[Observation], residuals: FloatArray) -> Offsets:
    """Condition on ``residuals``, log(measured / predicted), shape (observations, 2): step time, power."""
    return Offsets.learn(rows_of(observations), residuals)


# Only the source with the engine of today speaks for deployments outside of it.
SHIPPED = "mlenergy-v3"


def _deployment(o: Observation) -> str:
    key = deployment_key(o.model, o.device.name, o.topology)
    return key if o.source == SHIPPED else f"{o.source}:{key}"


def _requests(o: Observation) -> float:
    return max(float(batch.decode.sequences + batch.prefill.sequences) for _, batch in o.step_mix)
