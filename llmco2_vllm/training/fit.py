"""Fits the network to observations: step times, decode step times, power, and step energy, all as log errors.

Kernel times of profiles are labels of single nodes beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llmco2_vllm.core.features import GraphFeatures
from llmco2_vllm.predictor.forward import DEFAULT_DEVICE
from llmco2_vllm.training.kernel_times import KernelTimes, Shape, without
from llmco2_vllm.training.network import Graphs, KernelGraphNetwork, Steps, collate
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.origin import ERA, campaign, features_of

DECODE_WEIGHT = 0.5
# Errors beyond this (15 %) count linearly: a few rows of every source are far off for reasons no feature tells.
HUBER_DELTA = 0.15
# How far a source's rows are off for reasons of their own: hours of steady state, minutes of an older engine, medians
# of few repeats read off a simulator's table.
SOURCE_WEIGHTS = {"mlenergy-v3": 1.0, "mlenergy-v2": 0.3, "splitwise": 0.3}
# Of all kernel times together, against the observations together.
KERNEL_WEIGHT = 0.5
CAMPAIGN_DEVIATION, CAMPAIGN_SECONDS = 1.0, 0.02


@dataclass(frozen=True)
class Recipe:
    """How a fit is done. prior, weight: strength of the penalties, per observation-equivalent."""

    steps: int = 120
    learning_rate: float = 0.05
    prior: float = 4e-4
    weight: float = 1e-2
    seed: int = 0


class Mean(NamedTuple):
    """Of each observation the mean step, a decode step and a step with prefill, in seconds, and the mean power of one
    device in watts; each shape (observations,)."""

    step_seconds: Tensor
    decode_seconds: Tensor
    prefill_seconds: Tensor
    power_watts: Tensor

    def energy_joules(self, observations: Sequence[Observation]) -> np.ndarray:
        """Energy of a mean step on all devices, shape (observations,)."""
        scale = np.array([o.devices / o.topology.pipeline_parallel for o in observations])
        joules: np.ndarray = (self.step_seconds * self.power_watts).detach().numpy() * scale
        return joules


def trainable(observations: Iterable[Observation]) -> list[Observation]:
    """Rows of text models with a time that are not stalled: what the network is fitted on."""
    timed = (o for o in observations if o.decode_step_seconds is not None and o.source in SOURCE_WEIGHTS)
    return [o for o in timed if not o.stalled and not o.multimodal]


class Labels:
    """Kernel times as tensors. nodes: positions in the nodes of ``graphs``; of: the item each belongs to."""

    def __init__(self, times: Sequence[KernelTimes], devices: Sequence[str]) -> None:
        self.times = list(times)
        self.graphs: Graphs = collate([(item.features, item.batch) for item in times], devices)
        nodes, seconds, owners, offset = [], [], [], 0
        for index, item in enumerate(times):
            for place, kernel in enumerate(item.features.graph.kernels):
                if kernel.name in item.seconds:
                    nodes.append(offset + place)
                    seconds.append(item.seconds[kernel.name])
                    owners.append(index)
            offset += len(item.features.graph.kernels)
        self.nodes, self.of = torch.tensor(nodes), torch.tensor(owners)
        self.seconds = torch.tensor(seconds, dtype=torch.float64)

    def errors(self, network: KernelGraphNetwork) -> Tensor:
        """log(predicted / measured) of each label, shape (labels,)."""
        predicted = network.kernel_seconds(self.graphs, network.outputs(self.graphs))
        return torch.log(predicted[self.nodes] / self.seconds)

    def chosen(self, observations: Sequence[Observation], use: Sequence[bool]) -> Tensor:
        """1 for labels that say nothing of a layer or a device that only unused observations have, else 0."""
        used = [o for o, yes in zip(observations, use, strict=True) if yes]
        shapes = {Shape.of(o.architecture) for o in observations} - {Shape.of(o.architecture) for o in used}
        devices = {o.device.name for o in observations} - {o.device.name for o in used}
        kept = torch.tensor(without(self.times, shapes, devices), dtype=torch.float64)
        return kept[self.of]


class Table:
    """Observations as tensors: a graph for each part of each step mix. labels: kernel times, None without any."""

    def __init__(
        self, observations: Sequence[Observation], devices: Sequence[str], kernel_times: Sequence[KernelTimes] = ()
    ) -> None:
        self.observations = list(observations)
        self.labels = Labels(kernel_times, devices) if kernel_times else None
        known: dict[Hashable, GraphFeatures] = {}
        items, owners, shares, pure = [], [], [], []
        for index, o in enumerate(self.observations):
            key = (o.model, o.block_quantised, o.device.name, o.topology, o.era)
            features = known[key] if key in known else known.setdefault(key, features_of(o))
            for share, batch in o.step_mix:
                items.append((features, batch))
                owners.append(index)
                shares.append(share)
                pure.append(not batch.prefill.tokens)
        self.graphs: Graphs = collate(items, devices)
        self.owner = torch.tensor(owners)
        self.share = torch.tensor(shares, dtype=torch.float64)
        self.pure = torch.tensor(pure, dtype=torch.float64)
        self.campaign = torch.tensor([float(campaign(o) is not None) for o in self.observations], dtype=torch.float64)
        self.idle = _column(self.observations, lambda o: o.device.idle_power_watts)
        self.span = _column(self.observations, lambda o: o.device.power_limit_watts) - self.idle
        self.step_seconds = _column(self.observations, lambda o: o.step_seconds)
        self.decode_seconds = _column(self.observations, lambda o: o.decode_step_seconds)
        self.prefill_seconds = _column(self.observations, lambda o: o.prefill_seconds)
        self.power_watts = _column(self.observations, lambda o: o.power_watts)

    def over(self, values: Tensor) -> Tensor:
        """Sum of a value per graph over each observation's mix."""
        return torch.zeros(len(self.observations), dtype=torch.float64).index_add(0, self.owner, self.share * values)


def mean_of(table: Table, steps: Steps) -> Mean:
    """Mean steps from the steps of the mixes. The median step is a pure decode step while most steps are."""
    total = table.over(steps.total)
    energy = table.over(steps.total * (table.idle[table.owner] + table.span[table.owner] * steps.power))
    decode_share = table.over(table.pure)
    decode = table.over(table.pure * steps.total) / torch.clamp(decode_share, min=1e-9)
    most = torch.sigmoid(12 * (decode_share - 0.5))
    decode = torch.where(decode_share > 0, most * decode + (1 - most) * total, total)
    prefill = table.over((1 - table.pure) * steps.total) / torch.clamp(1 - decode_share, min=1e-9)
    return Mean(total, decode, prefill, energy / total)


class Model(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The network and what belongs to the sources alone."""

    def __init__(self, devices: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        self.network = KernelGraphNetwork(devices, seed)
        self.log_campaign = nn.Parameter(torch.tensor(math.log(CAMPAIGN_SECONDS), dtype=torch.float64))

    def forward(self, table: Table) -> Mean:
        extra = torch.exp(self.log_campaign) * table.campaign[table.owner]
        return mean_of(table, self.network(table.graphs, extra))

    def penalty(self, recipe: Recipe) -> Tensor:
        """Deviation from the priors and size of the weights."""
        campaign_term = ((self.log_campaign - math.log(CAMPAIGN_SECONDS)) / CAMPAIGN_DEVIATION) ** 2
        priors = self.network.prior_penalty() + campaign_term
        return recipe.prior * priors + recipe.weight * self.network.weight_penalty()


def fit(table: Table, chosen: Sequence[bool], recipe: Recipe, tick: Callable[[], None] = lambda: None) -> Model:
    """Fit on the ``chosen`` observations of a table; ``tick`` is called after each step. Deterministic."""
    devices = devices_of(o for o, use in zip(table.observations, chosen, strict=True) if use)
    weights = _weights(table.observations) * torch.tensor(list(chosen))
    labels = table.labels
    kept = None if labels is None else labels.chosen(table.observations, chosen)
    model = Model(devices_of(table.observations), recipe.seed)
    unseen = [row for row, name in enumerate(model.network.devices) if name not in devices]
    optimizer = torch.optim.Adam(_groups(model, recipe))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        loss = (_errors(table, model(table)) * weights).sum() / weights.sum() + model.penalty(recipe)
        if labels is not None and kept is not None and kept.any():
            loss = loss + KERNEL_WEIGHT * (_huber(labels.errors(model.network)) * kept).sum() / kept.sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    model.network.forget(unseen)
    return model


def devices_of(observations: Iterable[Observation]) -> tuple[str, ...]:
    """The rows of a device table: the default and every device observed."""
    names = {o.device.name if o.era == ERA else f"{o.device.name}@{o.era}" for o in observations}
    return (DEFAULT_DEVICE, *sorted(names))


def _groups(model: Model, recipe: Recipe) -> list[dict[str, object]]:
    weights = list(model.network.weights.parameters())
    others = [*model.network.fitted.parameters(), model.log_campaign]
    return [{"params": others, "lr": recipe.learning_rate}, {"params": weights, "lr": recipe.learning_rate / 10}]


def _errors(table: Table, mean: Mean) -> Tensor:
    """Huber losses of the logs, summed over the targets an observation has, shape (observations,)."""
    time = _log_error(mean.step_seconds, table.step_seconds)
    decode = _log_error(mean.decode_seconds, table.decode_seconds)
    prefill = _log_error(mean.prefill_seconds, table.prefill_seconds)
    power = _log_error(mean.power_watts, table.power_watts)
    both = (time + power) * ~torch.isnan(table.step_seconds) * ~torch.isnan(table.power_watts)
    return _huber(time) + DECODE_WEIGHT * _huber(decode) + _huber(prefill) + _huber(power) + _huber(both)


def _log_error(predicted: Tensor, measured: Tensor) -> Tensor:
    """log(predicted / measured), 0 where nothing was measured."""
    known = ~torch.isnan(measured)
    return torch.log(predicted / torch.where(known, measured, predicted.detach())) * known


def _huber(errors: Tensor) -> Tensor:
    return nn.functional.huber_loss(errors, torch.zeros_like(errors), delta=HUBER_DELTA, reduction="none")


def _weights(observations: Sequence[Observation]) -> Tensor:
    """One over the root of the rows of an architecture: neither rows nor architectures count alone."""
    sizes: dict[Hashable, int] = {}
    for o in observations:
        sizes[o.source, o.architecture] = sizes.get((o.source, o.architecture), 0) + 1
    weights = [SOURCE_WEIGHTS[o.source] / math.sqrt(sizes[o.source, o.architecture]) for o in observations]
    return torch.tensor(weights, dtype=torch.float64)


def _column(observations: Sequence[Observation], value: Callable[[Observation], float | None]) -> Tensor:
    found = [value(o) for o in observations]
    return torch.tensor([math.nan if v is None else v for v in found], dtype=torch.float64)
