"""What the network leaves unexplained of deployments like those it was trained on: a Gaussian process, bound to one.

A shipped prediction is a prior; rows of a deployment that were measured set its level. A new batch shares the residual
of a measured one as far as they share architecture, deployment, workload and batch size; an unseen architecture gets
none. Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006, eq. 2.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.hardware import Topology
from llmco2_vllm.core.model import ModelSpec

FloatArray = NDArray[np.float64]

# Standard deviations of the log residual shared by: an architecture, a deployment, neighbouring batches of a
# deployment, a workload on a deployment; of what is shared by nothing (a repeat differs by 4 to 5 %, docs/data.md);
# and the distance in log batch over which neighbours are alike.
ARCHITECTURE, DEPLOYMENT, BATCH, WORKLOAD, NOISE = 0.10, 0.08, 0.12, 0.08, 0.04
BATCH_SCALE = 0.7


def architecture_key(model: ModelSpec) -> str:
    """Names the sizes checkpoints of one architecture share, whatever their weights and precision."""
    width = model.moe_intermediate if model.experts else model.intermediate
    return f"{model.layers}x{model.hidden}-h{model.heads}.{model.kv_heads}-w{width}-e{model.experts}"


def deployment_key(model: ModelSpec, device: str, topology: Topology) -> str:
    """Names an architecture at a precision on so many devices."""
    layout = f"tp{topology.tensor_parallel}-pp{topology.pipeline_parallel}-dp{topology.data_parallel}"
    if topology.expert_parallel:
        layout += "-ep"
    return f"{architecture_key(model)}-b{model.weight_bytes:g}-{device}-{layout}"


class Rows:
    """Operating points as columns: keys of architecture, deployment and workload, and log batch."""

    def __init__(
        self, architecture: Sequence[str], deployment: Sequence[str], workload: Sequence[str], log_batch: FloatArray
    ) -> None:
        self.architecture = np.array(architecture, dtype=str)
        self.deployment = np.array(deployment, dtype=str)
        self.workload = np.array(workload, dtype=str)
        self.log_batch = np.asarray(log_batch, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.log_batch)


def covariance(left: Rows, right: Rows) -> FloatArray:
    """Prior covariance of the residuals, shape (left, right). An empty workload is like no other."""
    near = np.exp(-0.5 * ((left.log_batch[:, None] - right.log_batch[None]) / BATCH_SCALE) ** 2)
    architecture = left.architecture[:, None] == right.architecture[None]
    deployment = left.deployment[:, None] == right.deployment[None]
    workload = deployment & (left.workload[:, None] == right.workload[None]) & (left.workload != "")[:, None]
    shared: FloatArray = ARCHITECTURE**2 * architecture + DEPLOYMENT**2 * deployment
    shared += BATCH**2 * deployment * near + WORKLOAD**2 * workload * (1 + near) / 2
    return shared


@dataclass(frozen=True, eq=False)
class Offsets:
    """Measured rows and the weights of their residuals, shape (rows, 2): log step time, log power."""

    rows: Rows
    weights: FloatArray

    @classmethod
    def learn(cls, rows: Rows, residuals: FloatArray) -> Offsets:
        """Condition on ``residuals``, log(measured / predicted), shape (rows, 2); those not known (nan) count as 0."""
        within = covariance(rows, rows) + NOISE**2 * np.eye(len(rows))
        weights: FloatArray = np.linalg.solve(within, np.nan_to_num(residuals)).astype(np.float64)
        return cls(rows, weights)

    def at(self, rows: Rows) -> FloatArray:
        """Expected log residuals (step time, power), shape (rows, 2)."""
        found: FloatArray = covariance(rows, self.rows) @ self.weights
        return found

    def bound(self, model: ModelSpec, device: str, topology: Topology) -> Callable[[float], tuple[float, float]] | None:
        """(log step time, log power) to add, as a function of requests, for one deployment; None when none is known."""
        key, architecture = deployment_key(model, device, topology), architecture_key(model)
        alike = self.rows.architecture == architecture
        if not alike.any():
            return None
        same = self.rows.deployment == key
        base = ARCHITECTURE**2 * self.weights[alike].sum(axis=0) + DEPLOYMENT**2 * self.weights[same].sum(axis=0)
        places, weights = self.rows.log_batch[same], BATCH**2 * self.weights[same]
        if not len(places):
            return lambda requests: (float(base[0]), float(base[1]))
        # Between grid points a straight line: an exponential for each row would be the slowest part of a step. Beyond
        # the batches that were measured, the offset of the nearest: it says nothing on how the trend goes on.
        grid = np.linspace(places.min(), max(places.max(), places.min() + 1e-6), 64)
        near = np.exp(-0.5 * ((grid[:, None] - places[None]) / BATCH_SCALE) ** 2)
        table = (base + near @ weights).tolist()
        first, per_unit = float(grid[0]), (len(grid) - 1) / float(grid[-1] - grid[0])
        return lambda requests: _interpolated(table, (math.log(max(requests, 1.0)) - first) * per_unit)


def _interpolated(table: list[list[float]], place: float) -> tuple[float, float]:
    place = min(max(place, 0.0), len(table) - 1.0)
    index = min(int(place), len(table) - 2)
    share = place - index
    (time, power), (next_time, next_power) = table[index], table[index + 1]
    return time + share * (next_time - time), power + share * (next_power - power)
