"""Trained: network and residuals together, as a predictor of observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llmco2_vllm.predictor.offsets import Offsets
from llmco2_vllm.training.fit import Mean, Model, Recipe, Table, devices_of, fit
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.residuals import learn, rows_of

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A fitted model, and the residuals it left on its own rows."""

    model: Model
    residuals: Offsets
    observations: tuple[Observation, ...] = ()

    def predict(self, observations: Sequence[Observation], calibrated: bool = True) -> Mean:
        """Mean steps. calibrated: with the residuals of deployments seen in training."""
        table = Table(observations, self.model.network.devices)
        with torch.no_grad():
            mean: Mean = self.model(table)
        if not calibrated:
            return mean
        time, power = torch.from_numpy(np.exp(self.residuals.at(rows_of(observations)))).T
        seconds = (mean.step_seconds * time, mean.decode_seconds * time, mean.prefill_seconds * time)
        return Mean(*seconds, mean.power_watts * power)


def train(observations: Sequence[Observation], recipe: Recipe, tick: Callable[[], None] = lambda: None) -> Trained:
    """Fit the network on all ``observations``, then learn what it leaves of them."""
    return train_on(Table(observations, devices_of(observations)), [True] * len(observations), recipe, tick)


def train_on(table: Table, chosen: Sequence[bool], recipe: Recipe, tick: Callable[[], None] = lambda: None) -> Trained:
    """As :func:`train` on the ``chosen`` rows of a table, whose graphs are built once for all folds."""
    model = fit(table, chosen, recipe, tick)
    with torch.no_grad():
        mean = model(table)
    kept = np.flatnonzero(np.array(chosen))
    time = torch.where(
        table.step_seconds.isnan(), table.decode_seconds / mean.decode_seconds, table.step_seconds / mean.step_seconds
    )
    left = torch.stack([torch.log(time), torch.log(table.power_watts / mean.power_watts)], dim=1)
    used = tuple(table.observations[i] for i in kept)
    return Trained(model, learn(used, left.numpy()[kept]), used)
