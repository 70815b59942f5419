"""LLMCarbon: carbon of training, experimentation, inference and storage of a language model, before it exists.

One pure function per equation of Faiz et al., LLMCarbon, ICLR 2024 (https://arxiv.org/abs/2309.14393) and of the README
released with it (https://github.com/SotaroKaneda/MLCarbon). Not here: the paper's fall of efficiency away from the
best number of devices (its coefficients r0, r1, r2 are not published) and the ratio from A100 to other devices; for
those, efficiency is an input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmco2_vllm.core.embodied_catalog import constant

TRAINING_FLOPS_PER_PARAMETER = 6
INFERENCE_FLOPS_PER_PARAMETER = 2

# Parameters of the Megatron-LM runs that each polynomial stands for (Narayanan et al., SC 2021, table 1): models of
# one node of 80 GB devices, models over nodes; the one of devices is far off below 76e9, 968 for the run of 512.
TENSOR_PARAMETERS = (1.7e9, 19.2e9)
PIPELINE_PARAMETERS = (18.4e9, 1008e9)
DEVICES_PARAMETERS = (76.1e9, 1008e9)
_ONE_NODE_BATCH = 512


# -------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of ``layers`` equal layers of width ``hidden``; counts.

    experts, moe_layer_ratio: feed-forward networks of a mixture layer, and the share of layers that are mixtures.
    """

    layers: int
    hidden: int
    vocabulary: int
    sequence: int
    experts: int = 1
    moe_layer_ratio: float = 0.0


def base_parameters(model: Architecture) -> float:
    """Parameters of the dense model: 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)).

    Source: Narayanan et al., SC 2021, equation 2; LLMCarbon's README, step 1.
    """
    layers, hidden = model.layers, model.hidden
    extra = 13 / (12 * hidden) + (model.vocabulary + model.sequence) / (12 * layers * hidden)
    return 12 * layers * hidden**2 * (1 + extra)


def total_parameters(model: Architecture) -> float:
    """Parameters with every expert: base + rho * l * 8 h^2 * (N_e - 1).

    Source: the count of :func:`base_parameters`, whose feed-forward network has 8 of the 12 h^2; router and biases of
    experts left out. LLMCarbon takes FLOPs from the base model and storage from this.
    """
    return base_parameters(model) + model.moe_layer_ratio * model.layers * 8 * model.hidden**2 * (model.experts - 1)


def training_flops(parameters: float, tokens: float) -> float:
    """FLOPs of training on ``tokens``: 6 P D, P the base model of a mixture. Source: LLMCarbon, FLOP model."""
    return TRAINING_FLOPS_PER_PARAMETER * parameters * tokens


def inference_flops(parameters: float, tokens: float) -> float:
    """FLOPs of processing ``tokens``: 2 P D, P the base model of a mixture. Source: LLMCarbon, FLOP model."""
    return INFERENCE_FLOPS_PER_PARAMETER * parameters * tokens


# ------------------------------------------------------------------------------------------------------ the devices


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Ranks of each kind, and sequences of a batch. Devices: tensor * pipeline * data."""

    tensor: int
    pipeline: int
    data: int
    batch: int

    @property
    def devices(self) -> int:
        """Devices of all ranks."""
        return self.tensor * self.pipeline * self.data


def model_parallelism(parameters: float, memory_bytes: float, node_devices: int = 8) -> tuple[int, int]:
    """(tensor, pipeline) ranks: tensor inside a node while the model fits there, pipeline over nodes beyond.

    A device holds 0.03e9 parameters per GB of memory. Source: LLMCarbon's README, step 5.
    """
    held = memory_bytes * constant("megatron.parameters-per-memory").to("part/byte")
    if parameters < node_devices * held:
        return math.ceil(parameters / held), 1
    return node_devices, math.ceil(parameters / (node_devices * held))


def optimal_parallelism(parameters: float, memory_bytes: float, node_devices: int = 8) -> Parallelism:
    """Layout and batch of Megatron-LM's weak-scaling runs for a model of ``parameters``.

    Data ranks fill the fitted number of devices; the batch is fitted on the pipeline, 512 inside one node.
    Raises ValueError outside of the models that the number of devices was fitted on. Source: README, steps 2 to 5.
    """
    _check_fitted("number of devices", parameters, DEVICES_PARAMETERS, "devices")
    tensor, pipeline = model_parallelism(parameters, memory_bytes, node_devices)
    wanted = _polynomial("devices", "part", parameters)
    batch = _ONE_NODE_BATCH if pipeline == 1 else round(_polynomial("batch", "part", pipeline))
    return Parallelism(tensor, pipeline, max(1, round(wanted / (tensor * pipeline))), batch)


def throughput_flops_per_second(parameters: float, pipeline: int) -> float:
    """FLOP/s of one A100 80 GB training a model of ``parameters``: a P^2 + b P + c, by whether it fits one node.

    Raises ValueError outside of the models that were fitted. Source: LLMCarbon's README, regression coefficients.
    """
    name, fitted = ("tensor", TENSOR_PARAMETERS) if pipeline == 1 else ("pipeline", PIPELINE_PARAMETERS)
    _check_fitted(f"throughput of a {name}-parallel model", parameters, fitted, "efficiency_ratio")
    return _polynomial(f"{name}-throughput", "FLOP/s", parameters)


def efficiency_ratio(parameters: float, memory_bytes: float, node_devices: int = 8) -> float:
    """Share of an A100's peak reached in training: fitted throughput / 312 TFLOP/s. Source: README, step 6."""
    _, pipeline = model_parallelism(parameters, memory_bytes, node_devices)
    return throughput_flops_per_second(parameters, pipeline) / constant("megatron.peak").to("FLOP/s")


def _polynomial(name: str, unit: str, at: float) -> float:
    a, b, c = (constant(f"megatron.{name}.{letter}").to(unit) for letter in "abc")
    return a * at**2 + b * at + c


def _check_fitted(what: str, parameters: float, fitted: tuple[float, float], key: str) -> None:
    low, high = fitted
    if not low <= parameters <= high:
        span = f"{low:.4g} to {high:.4g}"
        raise ValueError(f"{what} is fitted on {span} parameters, this model has {parameters:.4g}; give {key}")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Equal devices that work together. power_watts: mean of one device; efficiency_ratio: of the dense peak."""

    devices: float
    power_watts: float
    peak_flops_per_second: float
    efficiency_ratio: float


def compute_seconds(flops: float, fleet: Fleet) -> float:
    """Seconds that ``fleet`` needs: t = FLOPs / (n * peak * eff). Source: LLMCarbon, equation of t_dev."""
    return flops / (fleet.devices * fleet.peak_flops_per_second * fleet.efficiency_ratio)


def fleet_joules(fleet: Fleet, seconds: float) -> float:
    """Joules of the devices alone: P * n * t, before PUE. Source: LLMCarbon, equation of energy_hard."""
    return fleet.power_watts * fleet.devices * seconds


def storage_joules(capacity_bytes: float, seconds: float, medium: str, replicas: float = 1.0) -> float:
    """Joules of keeping data on ``medium`` (ssd, hdd): bytes * W/TB * seconds * replicas.

    Raises ValueError that lists the media. Source: Cloud Carbon Footprint, methodology, storage.
    """
    return capacity_bytes * replicas * constant(f"storage.power.{medium}").to("W/byte") * seconds
