"""The network in torch and in numpy is one function, and its priors are physics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmco2_vllm.core.batch import BatchShape, PhaseShape
from llmco2_vllm.core.features import GraphFeatures
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.forward import DEFAULT_DEVICE, Network
from tests.core.published import PUBLISHED

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from llmco2_vllm.training.network import KernelGraphNetwork, collate  # noqa: E402

DEVICES = (DEFAULT_DEVICE, "b200", "h100-sxm")
BATCHES = [
    BatchShape(decode=PhaseShape(1, 1, 300, 300, 1)),
    BatchShape(decode=PhaseShape(64, 64, 64_000, 64_000, 64)),
    BatchShape(PhaseShape(2, 2048, 1_500_000, 2048, 2), PhaseShape(30, 30, 9000, 9000, 30)),
    BatchShape(prefill=PhaseShape(1, 8192, 8192 * 4096, 8192, 1)),
]
LAYOUTS = [
    Topology(),
    Topology(tensor_parallel=8),
    Topology(tensor_parallel=4, expert_parallel=True),
    Topology(data_parallel=4, expert_parallel=True),
]


def shaken(seed: int) -> KernelGraphNetwork:
    """A network none of whose parameters is where it began."""
    network = KernelGraphNetwork(DEVICES, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def features(name: str, device: str, topology: Topology, **changes: Any) -> GraphFeatures:
    model = ModelSpec.from_config({**PUBLISHED[name][0], **changes})
    return GraphFeatures.of(model, device_by_name(device), topology)


CASES = [
    *((name, "h100-sxm") for name in sorted(PUBLISHED)),
    ("Qwen/Qwen3-8B", "b200"),
    ("Qwen/Qwen3-8B", "a100-80-sxm"),
]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_numpy_and_torch_agree_on_every_model(name: str, device: str) -> None:
    network = shaken(1)
    arrays = network.parameters_for_serving()
    for topology in LAYOUTS:
        graph = features(name, device, topology)
        served = Network(arrays, DEVICES, graph)
        with torch.no_grad():
            steps = network(collate([(graph, batch) for batch in BATCHES], DEVICES))
        for index, batch in enumerate(BATCHES):
            step = served.step(batch)
            assert step.total == pytest.approx(float(steps.total[index]), rel=1e-9)
            assert step.power == pytest.approx(float(steps.power[index]), rel=1e-9)
            assert step.kernels.sum() == pytest.approx(float(steps.device[index]), rel=1e-9)


def test_extra_host_time_is_the_same_in_numpy_and_torch() -> None:
    network, graph = shaken(2), features("Qwen/Qwen3-8B", "b200", Topology())
    with torch.no_grad():
        steps = network(collate([(graph, BATCHES[1])], DEVICES), torch.tensor([0.02], dtype=torch.float64))
    served = Network(network.parameters_for_serving(), DEVICES, graph)
    assert served.step(BATCHES[1], 0.02).total == pytest.approx(float(steps.total[0]), rel=1e-9)


def test_the_untrained_network_is_the_calibrated_roofline() -> None:
    network = KernelGraphNetwork(DEVICES)
    graph = features("Qwen/Qwen3-8B", "h100-sxm", Topology())
    with torch.no_grad():
        outputs = network.outputs(collate([(graph, BATCHES[1])], DEVICES))
    assert float(outputs.abs().max()) == 0.0
    step = Network(network.parameters_for_serving(), DEVICES, graph).step(BATCHES[1])
    least = graph.step(BATCHES[1]).seconds.max(axis=0) * graph.repeats
    assert (step.kernels >= least).all()


def test_a_correction_is_bounded_whatever_the_weights() -> None:
    network = KernelGraphNetwork(DEVICES)
    graph = features("Qwen/Qwen3-8B", "h100-sxm", Topology())
    plain = Network(network.parameters_for_serving(), DEVICES, graph).step(BATCHES[1]).kernels
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            network.weights["decode_readout"][:, :2] = sign * 1e3
        kernels = Network(network.parameters_for_serving(), DEVICES, graph).step(BATCHES[1]).kernels
        ratios = kernels[plain > 0] / plain[plain > 0]
        assert (ratios <= 3.0 + 1e-9).all() and (ratios >= 1 / 3 - 1e-9).all()


def test_the_order_of_graphs_in_a_batch_does_not_matter() -> None:
    network, graph = shaken(3), features("openai/gpt-oss-20b", "h100-sxm", Topology())
    items = [(graph, batch) for batch in BATCHES]
    with torch.no_grad():
        there = network(collate(items, DEVICES)).total.numpy()
        back = network(collate(items[::-1], DEVICES)).total.numpy()
    assert np.allclose(there, back[::-1], rtol=1e-12)


def test_a_device_never_seen_takes_the_default_row() -> None:
    network = shaken(4)
    arrays = network.parameters_for_serving()
    served = Network(arrays, DEVICES, features("Qwen/Qwen3-8B", "a100-80-sxm", Topology()))
    assert not served.known_device
    assert served.host.fixed == pytest.approx(float(np.exp(arrays["log_host"][0])))


def test_the_first_row_must_be_the_default_device() -> None:
    with pytest.raises(ValueError, match="default"):
        KernelGraphNetwork(("h100-sxm",))
