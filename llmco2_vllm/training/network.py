"""The network in PyTorch Geometric: the function of ``predictor/forward.py``, differentiable and over many graphs.

Fitted parameters carry priors (mean, standard deviation in log space) from data sheets and profiles, so that with
few architectures to learn from, what the data does not say stays at physics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import SimpleConv

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.core.features import DYNAMIC_FEATURES, STATIC_FEATURES, GraphFeatures, NodeKind, NodePrecision
from llmco2_vllm.predictor.forward import BOUND, DEFAULT_DEVICE, ORDER

HIDDEN = 24
_BY_DEVICE = ("log_host", "log_per_request", "power")
_KINDS, _PRECISIONS = len(NodeKind), len(NodePrecision)


class Prior(NamedTuple):
    """Normal prior of a parameter: mean (any shape) and standard deviation."""

    mean: Tensor
    deviation: Tensor


@dataclass
class Graphs:
    """Many steps as one disconnected graph. Node tensors have shape (nodes, ...), graph tensors (graphs,).

    features, seconds (3 columns), imbalance, present, repeats, kinds, precisions, experts, owner; producers and
    consumers, sparse (nodes, nodes) matrices that take the mean over a node's neighbours; requests, prompts, device
    (row of the device table), stalls (1 with several data-parallel engines).
    """

    features: Tensor
    seconds: Tensor
    imbalance: Tensor
    present: Tensor
    repeats: Tensor
    kinds: Tensor
    precisions: Tensor
    experts: Tensor
    owner: Tensor
    producers: Tensor
    consumers: Tensor
    requests: Tensor
    prompts: Tensor
    device: Tensor
    stalls: Tensor

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self.requests)


class Steps(NamedTuple):
    """Per graph: device seconds, step seconds, share of the power span. kernels: seconds per node, one execution."""

    device: Tensor
    total: Tensor
    power: Tensor
    kernels: Tensor


def collate(items: Sequence[tuple[GraphFeatures, BatchShape]], devices: Sequence[str]) -> Graphs:
    """Steps of any deployments as one graph; ``devices`` names the rows of the device table."""
    columns: dict[str, list[np.ndarray]] = {}
    blocks, offset = [], 0
    for index, (features, batch) in enumerate(items):
        for key, value in _columns(features, batch, devices).items():
            columns.setdefault(key, []).append(value)
        columns.setdefault("owner", []).append(np.full(len(features.repeats), index))
        blocks.append((features, offset))
        offset += len(features.repeats)
    joined = {key: torch.from_numpy(np.concatenate(parts)) for key, parts in columns.items()}
    means = [_block_diagonal(blocks, side, offset) for side in (0, 1)]
    return Graphs(**joined, producers=means[0], consumers=means[1])


def _columns(features: GraphFeatures, batch: BatchShape, devices: Sequence[str]) -> dict[str, np.ndarray]:
    step = features.step(batch)
    name = features.host if features.host in devices else DEFAULT_DEVICE
    return {
        "features": np.hstack([features.static, features.dynamic(step)]),
        "seconds": step.seconds.T,
        "imbalance": step.imbalance * features.is_expert,
        "present": step.present,
        "repeats": features.repeats,
        "kinds": features.kinds,
        "precisions": features.precisions,
        "experts": features.local_experts,
        "requests": np.array([float(batch.prefill.sequences + batch.decode.sequences)]),
        "prompts": np.array([float(batch.prefill.sequences)]),
        "device": np.array([list(devices).index(name)]),
        "stalls": np.array([float(features.topology.data_parallel > 1)]),
    }


def _block_diagonal(blocks: Sequence[tuple[GraphFeatures, int]], side: int, size: int) -> Tensor:
    places, values = [], []
    for features, offset in blocks:
        rows, columns = np.nonzero(features.neighbours[side])
        places.append(np.stack([rows, columns]) + offset)
        values.append(features.neighbours[side][rows, columns])
    index, value = torch.from_numpy(np.hstack(places)), torch.from_numpy(np.concatenate(values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is called beta, and its indices unchecked; ours come in order
        return torch.sparse_coo_tensor(index, value, (size, size)).coalesce().to_sparse_csr()


class KernelGraphNetwork(nn.Module):  # type: ignore[misc]  # torch is not followed
    """Kernel times and step power from kernel graphs. ``devices``: rows of the device table, the first the default."""

    def __init__(self, devices: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        if not devices or devices[0] != DEFAULT_DEVICE:
            raise ValueError(f"devices={list(devices)!r} is not possible; the first must be {DEFAULT_DEVICE!r}")
        self.devices = tuple(devices)
        self.priors = _priors(len(devices))
        self.fitted = nn.ParameterDict({name: nn.Parameter(prior.mean.clone()) for name, prior in self.priors.items()})
        generator = torch.Generator().manual_seed(seed)
        inputs = len(STATIC_FEATURES) + len(DYNAMIC_FEATURES)
        self.weights = nn.ParameterDict(
            {
                "input": _glorot(inputs, HIDDEN, generator),
                "input_bias": nn.Parameter(torch.zeros(HIDDEN, dtype=torch.float64)),
                "first": _glorot(3 * HIDDEN, HIDDEN, generator),
                "first_bias": nn.Parameter(torch.zeros(HIDDEN, dtype=torch.float64)),
                "second": _glorot(3 * HIDDEN, HIDDEN, generator),
                "second_bias": nn.Parameter(torch.zeros(HIDDEN, dtype=torch.float64)),
                # Zero: the untrained network is the calibrated Roofline.
                "decode_readout": nn.Parameter(torch.zeros(HIDDEN, 3, dtype=torch.float64)),
                "prefill_readout": nn.Parameter(torch.zeros(HIDDEN, 3, dtype=torch.float64)),
            }
        )
        self.sum = SimpleConv(aggr="sum")

    def outputs(self, graphs: Graphs) -> Tensor:
        """Readouts per node, shape (nodes, 3)."""
        w = self.weights
        hidden = torch.relu(graphs.features @ w["input"] + w["input_bias"])
        for name in ("first", "second"):
            producers = self.sum(hidden, graphs.producers)
            consumers = self.sum(hidden, graphs.consumers)
            hidden = torch.relu(torch.cat([hidden, producers, consumers], 1) @ w[name] + w[f"{name}_bias"])
        share = graphs.features[:, len(STATIC_FEATURES) + 3 : len(STATIC_FEATURES) + 4]
        return (1 - share) * (hidden @ w["decode_readout"]) + share * (hidden @ w["prefill_readout"])

    def kernel_seconds(self, graphs: Graphs, outputs: Tensor) -> Tensor:
        """Seconds of one execution of each node, shape (nodes,)."""
        p, kinds, precisions = self.fitted, graphs.kinds, graphs.precisions
        compute, memory, network = graphs.seconds.T
        fullest = 1 + torch.exp(p["log_imbalance"]) * graphs.imbalance
        c = compute * torch.exp(-p["log_compute"][kinds, precisions]) * fullest + 1e-12
        m = memory * torch.exp(-p["log_memory"][kinds, precisions]) * fullest + 1e-12
        n = network * torch.exp(-p["log_link"]) + 1e-12
        roofline = (c**ORDER + m**ORDER + n**ORDER) ** (1 / ORDER)
        factors = torch.exp(BOUND * torch.tanh(outputs[:, :2]))
        latency = torch.exp(p["log_latency"][kinds, precisions]) * factors[:, 1]
        experts = graphs.experts * torch.exp(p["log_expert_latency"][precisions])
        return (roofline * factors[:, 0] + latency + experts) * graphs.present

    def forward(self, graphs: Graphs, extra_host: Tensor | float = 0.0) -> Steps:
        """Time and power of each step; ``extra_host``: known host time on top, seconds per graph."""
        p, row = self.fitted, graphs.device
        outputs = self.outputs(graphs)
        kernels = self.kernel_seconds(graphs, outputs)
        repeated = kernels * graphs.repeats
        device = _sum(repeated, graphs)
        fixed, per_request = torch.exp(self.by_device("log_host")), torch.exp(self.by_device("log_per_request"))
        work = fixed[row] + per_request[row] * graphs.requests ** p["growth"]
        work = work + extra_host
        hidden = (device**ORDER + work**ORDER) ** (1 / ORDER)
        total = hidden + torch.sigmoid(p["overlap"]) * (device + work - hidden)
        per_prefill = torch.exp(p["log_per_prefill"] + graphs.stalls * p["log_prefill_stall"])
        total = total + per_prefill * graphs.prompts
        power = self._power(graphs, outputs, (repeated, device, total))
        return Steps(device, total, power, kernels)

    def _power(self, graphs: Graphs, outputs: Tensor, times: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        repeated, device, total = times
        compute = _sum(graphs.seconds[:, 0] * graphs.repeats, graphs) / total
        memory = _sum(graphs.seconds[:, 1] * graphs.repeats, graphs) / total
        draw = self.fitted["draw"][graphs.kinds, graphs.precisions] + outputs[:, 2]
        own = _sum(repeated * draw, graphs) / total
        head = self.by_device("power")[graphs.device]
        gap = torch.clamp(1 - device / total, min=0.0)
        level = head[:, 0] + head[:, 1] * compute + head[:, 2] * torch.sqrt(compute + 1e-4)
        return torch.sigmoid(4 * (level + head[:, 3] * memory + head[:, 4] * gap + own - 0.5))

    def by_device(self, name: str) -> Tensor:
        """A parameter for each row of the device table: the common value and, but for the default, an offset."""
        offsets = self.fitted[f"{name}_offset"]
        known = torch.ones(len(self.devices), dtype=torch.float64)
        known[0] = 0.0
        return self.fitted[name] + offsets * known.reshape(-1, *[1] * (offsets.dim() - 1))

    def forget(self, rows: Sequence[int]) -> None:
        """Take back the offsets of devices that no observation showed.

        An older engine on such a device is taken to differ from today's as that engine does on the devices it was
        seen on.
        """
        seen = {row: name.partition("@")[2] for row, name in enumerate(self.devices) if row not in rows}
        with torch.no_grad():
            for name in _BY_DEVICE:
                offsets = self.fitted[f"{name}_offset"]
                for row in rows:
                    era = self.devices[row].partition("@")[2]
                    alike = [other for other, its in seen.items() if era and its == era]
                    offsets[row] = offsets[alike].mean(0) if alike else 0.0

    def prior_penalty(self) -> Tensor:
        """Sum of squared deviations from the priors, in standard deviations."""
        terms = [(((self.fitted[k] - v.mean) / v.deviation) ** 2).sum() for k, v in self.priors.items()]
        return torch.stack(terms).sum()

    def weight_penalty(self) -> Tensor:
        """Sum of squared network weights, biases left out."""
        return torch.stack([(v**2).sum() for k, v in self.weights.items() if not k.endswith("bias")]).sum()

    def parameters_for_serving(self) -> dict[str, np.ndarray]:
        """All arrays ``predictor.forward.Network`` reads, by name."""
        found = {**dict(self.fitted.items()), **dict(self.weights.items())}
        for name in _BY_DEVICE:
            found[name] = self.by_device(name)
            del found[f"{name}_offset"]
        return {name: value.detach().numpy().copy() for name, value in found.items()}


def _sum(values: Tensor, graphs: Graphs) -> Tensor:
    return torch.zeros(graphs.count, dtype=values.dtype).index_add(0, graphs.owner, values)


def _glorot(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    bound = math.sqrt(6 / (rows + columns))
    return nn.Parameter((torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1) * bound)


def _table(values: Sequence[float]) -> Tensor:
    """By kind, the same for every precision."""
    return torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, _PRECISIONS)


def _prior(mean: Tensor | float, deviation: Tensor | float) -> Prior:
    centre = torch.as_tensor(mean, dtype=torch.float64)
    return Prior(centre, torch.as_tensor(deviation, dtype=torch.float64).expand_as(centre))


def _priors(devices: int) -> dict[str, Prior]:
    """Means and deviations, in the order of NodeKind.

    Linear kernels reach 0.6 of the compute peak and 0.8 of the bandwidth, collectives 0.7 of the link with 12 us each
    (vidur's profiles of A100 and H100, docs/data.md); a launch inside a captured graph takes 2 to 3 us; a mixture's
    expert kernels come with routing and sorting. 4-bit weights are widened on the way.
    """
    compute = torch.log(_table([0.6, 0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.4]))
    compute[NodeKind.EXPERT, NodePrecision.FOUR_BIT] -= 0.5
    memory = torch.log(_table([0.8, 0.6, 0.65, 0.6, 0.5, 0.7, 0.8, 0.6]))
    latency = torch.log(_table([3e-6, 12e-6, 6e-6, 6e-6, 2.5e-6, 12e-6, 5e-6, 8e-6]))
    draw = torch.zeros(_KINDS, _PRECISIONS, dtype=torch.float64)
    draw[NodeKind.EXPERT, NodePrecision.BLOCK] = 0.3
    draw[NodeKind.EXPERT, NodePrecision.FOUR_BIT] = 0.1
    power = torch.tensor([0.15, 0.5, 0.8, 0.7, -0.1], dtype=torch.float64)
    none = torch.zeros(devices, dtype=torch.float64)
    return {
        "log_compute": _prior(compute, 0.35),
        "log_memory": _prior(memory, 0.3),
        "log_link": _prior(math.log(0.7), 0.15),
        "log_latency": _prior(latency, 0.5),
        "log_expert_latency": _prior(torch.log(torch.tensor([3e-7, 3e-7, 2e-6, 3e-7], dtype=torch.float64)), 0.7),
        "log_imbalance": _prior(0.0, 0.7),
        "log_host": _prior(math.log(1.5e-3), 0.8),
        "log_host_offset": _prior(none, 0.7),
        "log_per_request": _prior(math.log(9e-5), 0.5),
        "log_per_request_offset": _prior(none, 0.5),
        "power": _prior(power, 0.3),
        "power_offset": _prior(none[:, None].repeat(1, 5), 0.1),
        "growth": _prior(0.88, 0.1),
        "overlap": _prior(1.0, 1.0),
        "log_per_prefill": _prior(math.log(2e-3), 1.0),
        "log_prefill_stall": _prior(0.0, 2.0),
        "draw": _prior(draw, 0.3),
    }
