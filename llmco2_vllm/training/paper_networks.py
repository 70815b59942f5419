"""Two published networks on the LLMCO2 released labels, to compare with: our code, the same rows for both.

LLMCO2 (Fu et al., arXiv:2410.02950): a graph of the kernels of a layer, once with the work of prefill and once with
that of decode, node features with a Roofline time, one encoder of GraphSAGE convolutions per phase, its mean over
the nodes joined with features of the request and the model, a perceptron that reads out the phase.
NNLQP (Liu et al., ICPP 2022): one GraphSAGE encoder over operators described by kind and shape alone, joined with
static features of the whole model (FLOPs, memory traffic, parameters, batch), one perceptron. It knows no phases
and no Roofline; it reads out both labels at once.

Widths, depth and training are ours, the same for both and small; inputs and logarithms of labels are standardised
with the rows that are learned from, on both sides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv, global_mean_pool

from llmco2_vllm.core.batch import Phase
from llmco2_vllm.core.flow import data_flow
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.kernels import KernelGraph, KernelKind, build_graph
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.configs import ModelSizes
from llmco2_vllm.training.released import DEVICE, PHASES, ReleasedRows, batch_of, layout

FloatArray = NDArray[np.float64]
Features = Callable[[ReleasedRows], "Inputs"]
KINDS = tuple(KernelKind)
_QUANTITIES = ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "network_bytes")
_PICO = 1e-12


class Inputs(NamedTuple):
    """What a network sees of n rows: one or more graphs of each row, and static features of shape (n, features)."""

    graphs: tuple[list[Any], ...]
    static: Tensor


class Training(NamedTuple):
    """How a network is trained: Adam with one cycle of the learning rate on absolute errors of log labels."""

    width: int = 64
    epochs: int = 30
    rows_per_step: int = 128
    learning_rate: float = 3e-3
    seed: int = 0


class Served(NamedTuple):
    """A model of the rows and how it is laid out."""

    model: ModelSpec
    topology: Topology
    graph: KernelGraph


@lru_cache(maxsize=64)
def served(name: str) -> Served:
    """The model called ``name`` on the fewest devices that hold it."""
    model = ModelSizes().spec(name, "float16")
    topology = layout(model, device_by_name(DEVICE))
    return Served(model, topology, build_graph(model, topology))


def kernel_work(graph: KernelGraph, phase: Phase, tokens: FloatArray, requests: int) -> FloatArray:
    """Work of each kernel in a step of a phase, shape (n, kernels, 5): FLOPs and bytes in the order of the fields."""
    drivers = np.array([graph.drivers(batch_of(phase, int(count), requests)) for count in tokens])
    return np.stack([drivers @ graph.coefficients(quantity).T for quantity in _QUANTITIES], axis=2)


def roofline_features(work: FloatArray, dtypes: list[str]) -> FloatArray:
    """Of each kernel: seconds by ceiling and the longest of them, log, and which it is, shape (n, kernels, 7)."""
    device = device_by_name(DEVICE)
    peaks = np.array([device.peak_flops(dtype) for dtype in dtypes])
    memory = work[..., 1:4].sum(axis=-1) / device.memory_bandwidth_bytes_per_second
    network = work[..., 4] / (device.link_bytes_per_second or np.inf)
    seconds = np.stack([work[..., 0] / peaks, memory, network], axis=-1)
    bound = np.eye(3)[seconds.argmax(axis=-1)]
    longest = seconds.max(axis=-1, keepdims=True)
    return np.concatenate([np.log(seconds + _PICO), np.log(longest + _PICO), bound], axis=-1)


def _kind_and_shape(graph: KernelGraph) -> FloatArray:
    """One-hot kind, logarithms of the weight matrix and of repeats, shape (kernels, kinds + 3)."""
    kinds = np.eye(len(KINDS))[[KINDS.index(kernel.kind) for kernel in graph.kernels]]
    shapes = [(kernel.rows, kernel.columns, kernel.repeat) for kernel in graph.kernels]
    return np.hstack([kinds, np.log1p(np.array(shapes, dtype=np.float64))])


def _of_phase(graph: KernelGraph, phase: Phase) -> tuple[NDArray[np.int64], Tensor]:
    """Positions of the kernels a phase runs, and the edges between them, shape (2, edges), both ways."""
    other = PHASES[1 - PHASES.index(phase)]
    kept = [place for place, kernel in enumerate(graph.kernels) if not kernel.name.startswith(other)]
    names = [graph.kernels[place].name for place in kept]
    pairs = [(names.index(one), names.index(two)) for one, two in data_flow(set(names))]
    edges = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return np.array(kept), torch.cat([edges, edges.flip(0)], dim=1)


def _graphs(nodes: FloatArray, edges: Tensor) -> list[Any]:
    return [Data(x=x, edge_index=edges) for x in torch.tensor(nodes, dtype=torch.float32)]


def _by_model(rows: ReleasedRows, build: Callable[[str, ReleasedRows], tuple[list[list[Any]], FloatArray]]) -> Inputs:
    """Inputs built model by model, put back into the order of the rows."""
    order, graphs, static = [], [], []
    for name in rows.models:
        places = np.flatnonzero(rows.model == name)
        own_graphs, own_static = build(name, rows.where(places))
        order.append(places)
        graphs.append(own_graphs)
        static.append(own_static)
    back = np.argsort(np.concatenate(order))
    lists = [[graph for part in column for graph in part] for column in zip(*graphs, strict=True)]
    features = torch.tensor(np.concatenate(static)[back], dtype=torch.float32)
    return Inputs(tuple([column[place] for place in back] for column in lists), features)


def _request(rows: ReleasedRows) -> list[FloatArray]:
    return [np.log(values.astype(np.float64)) for values in (rows.batch, rows.prompt, rows.output)]


def llmco2_inputs(rows: ReleasedRows) -> Inputs:
    """Two graphs per row, prefill of the prompt and decode at the mean context; static: request and model sizes."""

    def build(name: str, own: ReleasedRows) -> tuple[list[list[Any]], FloatArray]:
        model, topology, graph = served(name)
        dtypes = [kernel.dtype for kernel in graph.kernels]
        lists = []
        for phase, tokens in zip(PHASES, (own.prompt, own.prompt + own.output / 2), strict=True):
            work = kernel_work(graph, phase, tokens.astype(np.float64), int(own.batch[0]))
            shape = np.broadcast_to(_kind_and_shape(graph), (len(own), len(dtypes), len(KINDS) + 3))
            nodes = np.concatenate([shape, np.log1p(work), roofline_features(work, dtypes)], axis=2)
            kept, edges = _of_phase(graph, phase)
            lists.append(_graphs(nodes[:, kept], edges))
        sizes = np.log([model.layers, model.hidden, model.parameters, topology.tensor_parallel])
        return lists, np.column_stack([*_request(own), np.tile(sizes, (len(own), 1))])

    return _by_model(rows, build)


def nnlqp_inputs(rows: ReleasedRows) -> Inputs:
    """One graph per row, kind and shapes of the operators; static: FLOPs, bytes, parameters, request."""

    def build(name: str, own: ReleasedRows) -> tuple[list[list[Any]], FloatArray]:
        model, _, graph = served(name)
        tokens = np.log((own.batch * own.prompt).astype(np.float64))[:, None, None]
        shape = np.broadcast_to(_kind_and_shape(graph), (len(own), len(graph.kernels), len(KINDS) + 3))
        nodes = np.concatenate([shape, np.broadcast_to(tokens, (*shape.shape[:2], 1))], axis=2)
        kept, edges = _of_phase(graph, Phase.PREFILL)
        requests = int(own.batch[0])
        work = kernel_work(graph, Phase.PREFILL, own.prompt.astype(np.float64), requests).sum(axis=1)
        steps = kernel_work(graph, Phase.DECODE, own.prompt + own.output / 2, requests).sum(axis=1)
        work += steps * (own.output[:, None] - 1)
        totals = np.log([work[:, 0], work[:, 1:4].sum(axis=1), np.full(len(own), float(model.parameters))])
        return [_graphs(nodes[:, kept], edges)], np.column_stack([*_request(own), *totals])

    return _by_model(rows, build)


class Standard(nn.Module):  # type: ignore[misc]
    """Columns with mean zero and deviation one over the rows that are learned from; constant ones become zero."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        deviation = values.std(dim=0, unbiased=False)
        self.register_buffer("mean", values.mean(dim=0))
        self.register_buffer("deviation", torch.where(deviation > 1e-6, deviation, torch.inf))

    def forward(self, values: Tensor) -> Tensor:
        """Standardised values, same shape."""
        return (values - self.mean) / self.deviation


class Encoder(nn.Module):  # type: ignore[misc]
    """Two GraphSAGE convolutions (Hamilton et al., NIPS 2017) and the mean over nodes: graphs to (n, width)."""

    def __init__(self, nodes: Tensor, width: int) -> None:
        super().__init__()
        self.standard = Standard(nodes)
        self.first = SAGEConv(nodes.shape[1], width)
        self.second = SAGEConv(width, width)

    def forward(self, batch: Any) -> Tensor:
        """Embeddings of a batch of graphs; the order of the nodes does not matter."""
        hidden = torch.relu(self.first(self.standard(batch.x), batch.edge_index))
        hidden = torch.relu(self.second(hidden, batch.edge_index))
        return global_mean_pool(hidden, batch.batch)


class GraphNetwork(nn.Module):  # type: ignore[misc]
    """One encoder and one perceptron per graph of a row; with one graph, its perceptron reads out both labels."""

    def __init__(self, inputs: Inputs, width: int) -> None:
        super().__init__()
        nodes = [torch.cat([graph.x for graph in graphs]) for graphs in inputs.graphs]
        self.standard = Standard(inputs.static)
        self.encoders = nn.ModuleList(Encoder(values, width) for values in nodes)
        outputs = 2 // len(nodes)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width + inputs.static.shape[1], 2 * width),
                nn.ReLU(),
                nn.Linear(2 * width, width),
                nn.ReLU(),
                nn.Linear(width, outputs),
            )
            for _ in nodes
        )

    def forward(self, batches: list[Any], static: Tensor) -> Tensor:
        """Standardised logarithms of prefill and decode label, shape (n, 2)."""
        seen = self.standard(static)
        parts = [
            head(torch.cat([encoder(batch), seen], dim=1))
            for encoder, head, batch in zip(self.encoders, self.heads, batches, strict=True)
        ]
        return torch.cat(parts, dim=1)


class NetworkPredictor:
    """Learns a network on rows and predicts labels of others; deterministic for a seed on one thread."""

    def __init__(self, name: str, features: Features, training: Training | None = None) -> None:
        self.name = name
        self.training = training or Training()
        self._features = features
        self._network: Any = None
        self._mean, self._deviation = torch.zeros(2), torch.ones(2)

    def fit(self, rows: ReleasedRows, on_epoch: Callable[[], None] = lambda: None) -> Self:
        """Train from scratch; ``on_epoch`` is called after each epoch."""
        settings = self.training
        torch.manual_seed(settings.seed)
        inputs = self._features(rows)
        targets = torch.tensor(np.log(rows.labels), dtype=torch.float32)
        self._mean, self._deviation = targets.mean(dim=0), targets.std(dim=0, unbiased=False).clamp(min=1e-6)
        targets = (targets - self._mean) / self._deviation
        self._network = GraphNetwork(inputs, settings.width)
        optimiser = torch.optim.Adam(self._network.parameters())
        steps = settings.epochs * -(-len(rows) // settings.rows_per_step)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, total_steps=steps)
        for _ in range(settings.epochs):
            for places in torch.randperm(len(rows)).split(settings.rows_per_step):
                optimiser.zero_grad()
                # Deviations weigh the phases so that the errors are those of the logarithms.
                error = (self._network(*_pick(inputs, places)) - targets[places]) * self._deviation
                error.abs().mean().backward()
                optimiser.step()
                rate.step()
            on_epoch()
        return self

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def predict(self, rows: ReleasedRows) -> FloatArray:
        """Prefill and decode label, shape (n, 2)."""
        inputs = self._features(rows)
        self._network.eval()
        parts = [self._network(*_pick(inputs, places)) for places in _in_order(len(rows))]
        predicted: FloatArray = (torch.cat(parts) * self._deviation + self._mean).double().exp().numpy()
        return predicted


def _in_order(count: int, size: int = 1024) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)


def _pick(inputs: Inputs, places: Tensor) -> tuple[list[Any], Tensor]:
    chosen = places.tolist()
    return [Batch.from_data_list([graphs[i] for i in chosen]) for graphs in inputs.graphs], inputs.static[places]


def llmco2_network(training: Training | None = None) -> NetworkPredictor:
    """The network of LLMCO2 as its paper describes it."""
    return NetworkPredictor("LLMCO2 network", llmco2_inputs, training)


def nnlqp_network(training: Training | None = None) -> NetworkPredictor:
    """A network like NNLQP's."""
    return NetworkPredictor("NNLQP-like network", nnlqp_inputs, training)
