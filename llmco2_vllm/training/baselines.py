"""Baselines a network has to beat: each learns step energy from observations and predicts it for others.

All predict the energy of a mean step on all devices of an instance, in joules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.kernels import KernelKind
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.physics import KINDS, launches, mean_tokens, mean_work, physics_features

FloatArray = NDArray[np.float64]
Observations = Sequence[Observation]


class Baseline(Protocol):
    """Learns from observations that have a step energy."""

    name: str

    def fit(self, observations: Observations) -> Self:
        """Learn; returns itself. ValueError for an observation without step energy, or none at all."""
        ...

    def predict(self, observations: Observations) -> FloatArray:
        """Step energy in joules, shape (n,). Never looks at a target."""
        ...


def step_energies(observations: Observations) -> FloatArray:
    """Measured step energy in joules, shape (n,); ValueError that names a row without one."""
    found = [observation.step_energy_joules for observation in observations]
    if not found:
        raise ValueError("no observations to learn from")
    if None in found:
        row = observations[found.index(None)]
        raise ValueError(f"{row.source} line {row.line} has no step energy")
    return np.array(found, dtype=np.float64)


class LLMCarbon:
    """The operational equation of LLMCarbon (Faiz et al., arXiv:2309.14393): energy = P x eff x n x t.

    t = FLOPs / (n x peak x eff) with FLOPs = 2 x active parameters x tokens, so the hardware efficiency eff drops
    out and energy is P x FLOPs / peak, P the power limit. ``calibrated`` adds one factor on all predictions, the
    median ratio of what was measured; without it the equation is used as published.
    """

    def __init__(self, calibrated: bool = True) -> None:
        self.name = "LLMCarbon, one factor" if calibrated else "LLMCarbon"
        self.factor = 1.0
        self._calibrated = calibrated

    def fit(self, observations: Observations) -> Self:
        """Learn the factor."""
        measured = step_energies(observations)
        if self._calibrated:
            self.factor = float(np.median(measured / _llmcarbon_joules(observations)))
        return self

    def predict(self, observations: Observations) -> FloatArray:
        """Step energy in joules, shape (n,)."""
        return self.factor * _llmcarbon_joules(observations)


def _llmcarbon_joules(observations: Observations) -> FloatArray:
    joules = []
    for o in observations:
        flops = 2.0 * _active_parameters(o) * sum(mean_tokens(o)) * o.topology.data_parallel
        joules.append(o.device.power_limit_watts * flops / o.device.peak_flops(o.model.compute_dtype))
    return np.array(joules)


def _active_parameters(observation: Observation) -> float:
    """Parameters one token passes through: those of unused experts left out."""
    model = observation.model
    unused = (model.experts - model.experts_per_token) if model.moe_layers else 0
    return model.parameters - model.moe_layers * unused * model.mlp_matrices * model.hidden * model.moe_intermediate


class CalibratedRoofline:
    """Step energy as a sum of physical terms with factors of zero or more, found by non-negative least squares.

    Terms, each times devices and power limit: Roofline time by kernel kind, memory and compute time of all kernels,
    the step itself, its kernel launches, its collectives, and its requests. Rows are divided by what was measured,
    so relative errors are what is least.
    """

    name = "calibrated Roofline (NNLS)"

    def __init__(self) -> None:
        self.factors: FloatArray = np.zeros(0)

    def fit(self, observations: Observations) -> Self:
        """Learn the factors, shape (terms,)."""
        from scipy.optimize import nnls

        rows = _roofline_terms(observations) / step_energies(observations)[:, None]
        scale = np.maximum(rows.max(axis=0), 1e-30)
        self.factors = nnls(rows / scale, np.ones(len(rows)))[0] / scale
        return self

    def predict(self, observations: Observations) -> FloatArray:
        """Step energy in joules, shape (n,)."""
        predicted: FloatArray = _roofline_terms(observations) @ self.factors
        return predicted


def _roofline_terms(observations: Observations) -> FloatArray:
    """Terms in joules at full power, shape (n, terms)."""
    collective = KINDS.index(KernelKind.COLLECTIVE)
    rows = []
    for o in observations:
        work = mean_work(o)
        kernels, collectives = launches(o)
        bounds = (np.delete(work.memory, collective).sum(), work.compute.sum())
        terms = [*work.roofline, *bounds, 1.0, kernels, collectives, sum(mean_tokens(o)), float(o.devices > 1)]
        rows.append(np.array(terms) * o.devices * o.device.power_limit_watts / o.topology.pipeline_parallel)
    return np.array(rows)


class TreeBaseline:
    """Trees on physics features, once for step time over Roofline time and once for power over its limit.

    Energy is their product. Ratios are learned, as logarithms, since trees do not extrapolate: those of unseen
    models lie among known ones.
    """

    def __init__(self, name: str, regressor: Callable[[], Any]) -> None:
        self.name = name
        self._time, self._power = regressor(), regressor()

    def fit(self, observations: Observations) -> Self:
        """Learn; deterministic."""
        energy = step_energies(observations)
        power = np.array([o.power_watts / o.device.power_limit_watts for o in observations if o.power_watts])
        features = _features(observations)
        self._time.fit(features, np.log(energy / _peak_joules(observations) / power))
        self._power.fit(features, np.log(power))
        return self

    def predict(self, observations: Observations) -> FloatArray:
        """Step energy in joules, shape (n,)."""
        features = _features(observations)
        ratios: FloatArray = np.exp(self._time.predict(features) + self._power.predict(features))
        return ratios * _peak_joules(observations)


def random_forest(seed: int = 0) -> TreeBaseline:
    """A random forest of scikit-learn (Breiman, 2001)."""
    from sklearn.ensemble import RandomForestRegressor

    def regressor() -> Any:
        return RandomForestRegressor(300, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1)

    return TreeBaseline("random forest", regressor)


def light_gbm(seed: int = 0) -> TreeBaseline:
    """Gradient boosting of LightGBM (Ke et al., NIPS 2017), small trees that fit a few hundred rows."""
    from lightgbm import LGBMRegressor

    options = {
        "objective": "l1",
        "n_estimators": 400,
        "learning_rate": 0.05,
        "num_leaves": 15,
        "min_child_samples": 8,
        "colsample_bytree": 0.7,
        "subsample": 0.8,
        "subsample_freq": 1,
        "reg_lambda": 1.0,
        "deterministic": True,
        "force_row_wise": True,
        "n_jobs": 1,
        "verbose": -1,
    }
    return TreeBaseline("LightGBM", lambda: LGBMRegressor(random_state=seed, **options))


def all_baselines() -> list[Baseline]:
    """One of each, not yet fitted."""
    return [LLMCarbon(calibrated=False), LLMCarbon(), CalibratedRoofline(), random_forest(), light_gbm()]


def _features(observations: Observations) -> FloatArray:
    return np.array([physics_features(observation) for observation in observations])


def _peak_joules(observations: Observations) -> FloatArray:
    """Energy at the Roofline time and the power limit, shape (n,)."""
    joules: FloatArray = _roofline_terms(observations)[:, : len(KINDS)].sum(axis=1)
    return joules
