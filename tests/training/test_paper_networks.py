"""Laws of the two published networks, small and on invented rows."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from rich.progress import Progress  # noqa: E402
from torch_geometric.data import Batch, Data  # noqa: E402

from benchmarks.released_labels import FourCoefficients, Options, run, tables  # noqa: E402
from llmco2_vllm.core.batch import Phase  # noqa: E402
from llmco2_vllm.core.scores import mape  # noqa: E402
from llmco2_vllm.training.paper_networks import (  # noqa: E402
    GraphNetwork,
    NetworkPredictor,
    Standard,
    Training,
    kernel_work,
    llmco2_inputs,
    llmco2_network,
    nnlqp_inputs,
    nnlqp_network,
    roofline_features,
    served,
)
from llmco2_vllm.training.released import NOT_ENERGY, ReleasedPredictor  # noqa: E402
from tests.training.released_rows import LARGE, SMALL, WIDE, labelled, requests  # noqa: E402

BRIEF = Training(width=16, epochs=2, rows_per_step=16)
BOTH = pytest.mark.parametrize("make", [llmco2_network, nnlqp_network])
INPUTS = pytest.mark.parametrize("features", [llmco2_inputs, nnlqp_inputs])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def shuffled(graph: Data, seed: int) -> Data:
    """The same graph with its nodes in another order."""
    order = torch.randperm(graph.x.shape[0], generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    return Data(x=graph.x[order], edge_index=place[graph.edge_index])


@INPUTS
def test_a_network_does_not_see_the_order_of_nodes(features: object) -> None:
    inputs = features(requests((SMALL, LARGE), 4))  # type: ignore[operator]
    torch.manual_seed(0)
    network = GraphNetwork(inputs, 16)
    batches = [Batch.from_data_list(list(graphs)) for graphs in inputs.graphs]
    others = [Batch.from_data_list([shuffled(graph, i) for i, graph in enumerate(g)]) for g in inputs.graphs]
    same, other = network(batches, inputs.static), network(others, inputs.static)
    assert torch.allclose(same, other, atol=1e-5)
    assert same.shape == (8, 2)


@INPUTS
def test_inputs_keep_the_order_of_rows(features: object) -> None:
    rows = requests((SMALL, LARGE, WIDE), 5)
    order = np.random.default_rng(2).permutation(len(rows))
    plain, mixed = features(rows), features(rows.where(order))  # type: ignore[operator]
    assert torch.equal(mixed.static, plain.static[order])
    for graphs, others in zip(plain.graphs, mixed.graphs, strict=True):
        assert all(torch.equal(graphs[place].x, other.x) for place, other in zip(order, others, strict=True))


@INPUTS
def test_inputs_never_look_at_labels(features: object) -> None:
    rows = requests((SMALL,), 5)
    one, other = features(rows), features(labelled(rows))  # type: ignore[operator]
    assert torch.equal(one.static, other.static)
    assert all(torch.equal(a.x, b.x) for a, b in zip(one.graphs[0], other.graphs[0], strict=True))


def test_llmco2_sees_a_graph_per_phase_and_nnlqp_one() -> None:
    rows = requests((SMALL,), 3)
    assert len(llmco2_inputs(rows).graphs) == 2
    assert len(nnlqp_inputs(rows).graphs) == 1


def test_every_kernel_of_a_phase_is_reached_by_an_edge() -> None:
    for graphs in llmco2_inputs(requests((SMALL, LARGE), 1)).graphs:
        for graph in graphs:
            assert set(graph.edge_index.flatten().tolist()) == set(range(graph.x.shape[0]))


def test_work_of_the_nodes_adds_up_to_twice_the_weights_per_token() -> None:
    name, tokens = SMALL, np.array([64.0])
    model, _, graph = served(name)
    linear = [kernel.name.endswith("projection") for kernel in graph.kernels]
    flops = kernel_work(graph, Phase.PREFILL, tokens, 1)[0, linear, 0].sum()
    assert flops == pytest.approx(2 * 64 * model.non_embedding_parameters, rel=1e-3)


def test_prefill_is_bound_by_compute_and_decode_by_memory() -> None:
    graph = served(SMALL).graph
    dtypes = [kernel.dtype for kernel in graph.kernels]
    down = [kernel.name for kernel in graph.kernels].index("down_projection")
    bounds = {
        phase: roofline_features(kernel_work(graph, phase, np.array([2000.0]), 1), dtypes)[0, down, -3:].argmax()
        for phase in Phase
    }
    assert bounds == {Phase.PREFILL: 0, Phase.DECODE: 1}


def test_standard_columns_have_no_scale_and_constant_ones_vanish() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    found = Standard(values)(values)
    assert torch.allclose(found.mean(dim=0), torch.zeros(2))
    assert found[:, 0].std(unbiased=False) == pytest.approx(1.0)
    assert Standard(values)(torch.tensor([[3.0, 99.0]]))[0, 1] == 0


@BOTH
def test_predictions_are_positive_and_repeat_with_a_seed(make: object) -> None:
    rows = labelled(requests((SMALL, WIDE), 20))
    found = [make(BRIEF).fit(rows).predict(rows) for _ in range(2)]  # type: ignore[operator]
    assert found[0].shape == (40, 2)
    assert (found[0] > 0).all()
    assert np.array_equal(found[0], found[1])


@BOTH
def test_training_learns_labels_without_noise(make: object) -> None:
    rows = labelled(requests((SMALL,), 150))
    epochs: list[int] = []
    network: NetworkPredictor = make(Training(width=32, epochs=30, rows_per_step=16))  # type: ignore[operator]
    network.fit(rows, lambda: epochs.append(1))
    assert mape(network.predict(rows).sum(axis=1), rows.labels.sum(axis=1)) < 10
    assert len(epochs) == 30


def test_four_coefficients_return_labels_made_of_them() -> None:
    rows = requests((SMALL,), 50)
    made = {
        "prefill": 0.01 + 1e-4 * rows.prompt,
        "decode": (rows.output - 1) * (0.02 + 1e-6 * (rows.prompt + rows.output / 2)),
    }
    known = type(rows)(**{**vars(rows), **made})
    assert FourCoefficients().fit(known).predict(known) == pytest.approx(known.labels)


def test_the_benchmark_scores_every_method_in_both_settings() -> None:
    rows = labelled(requests((SMALL, LARGE, WIDE), 60))
    with Progress(disable=True) as progress:
        result = run(rows, Options(seeds=1, draws=2, epochs=1), progress)
    names = list(result["authors_split"])
    assert result["note"] == NOT_ENERGY
    assert names == list(result["leave_one_model_out"])
    assert len(names) == 5
    assert all(set(models) == set(rows.models) for models in result["leave_one_model_out"].values())
    assert [table.row_count for table in tables(result)] == [5, 5]
    ours = result["authors_split"][names[0]]["total"]
    held = rows.where(rows.split != "train")
    again = ReleasedPredictor().fit(rows.where(rows.split == "train")).predict(held)
    assert ours == pytest.approx(mape(again.sum(axis=1), held.labels.sum(axis=1)), abs=1e-3)
