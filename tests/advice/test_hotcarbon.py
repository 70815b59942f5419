"""HotCarbon'24's qualitative findings with the shipped predictors, and where they stop to hold.

Li, Graif, Gupta, Towards Carbon-efficient LLM Life Cycle: the optimal batch grows with the size of the model; tensor
parallelism is worse for operational and better for embodied carbon on larger models; cleaner grids favour it. Their
server is charged whole however many of its GPUs work, and its findings depend on that: see the last tests.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest

from llmco2_vllm.advice.front import FIGURES
from llmco2_vllm.advice.held import Hold, Ownership
from llmco2_vllm.advice.sweep import Row, advise
from llmco2_vllm.advice.workload import Workload, open_workload
from llmco2_vllm.core.units import SECONDS_PER_YEAR
from tests.advice.asked import CLEAN, COAL, DECODE_HEAVY, GAS, MODELS, asked

PREDICTORS = ("gnn", "roofline")
GRIDS = (COAL, GAS, CLEAN)
SIZES = (1, 2, 4, 8)
FINE = tuple(range(8, 401, 8))


def optimal_batch(model: str, predictor: str, product: str, workload: Workload = DECODE_HEAVY) -> int:
    """On four H100s, which hold the largest model and more than its optimal batch."""
    question = asked(MODELS[model], workload=workload, predictor=predictor, tensor_parallel=(4,), batch_limits=FINE)
    return min(advise(question).rows, key=lambda row: FIGURES[product](row) or 0.0).configuration.batch_limit


@cache
def at_batch(model: str, predictor: str, hold: Hold, limit: int = 16) -> dict[tuple[str, int], Row]:
    """Rows of one batch limit by grid and TP size."""
    question = asked(
        MODELS[model], predictor=predictor, ownership=Ownership(hold), zones=GRIDS, batch_limits=(limit,),
        tensor_parallel=SIZES,
    )  # fmt: skip
    return {(row.zone, row.configuration.tensor_parallel): row for row in advise(question).rows}


def over_sizes(model: str, predictor: str, figure: str, hold: Hold = "server") -> list[float]:
    rows = [row for (zone, _), row in at_batch(model, predictor, hold).items() if zone == "coal"]
    return [value for row in rows if (value := FIGURES[figure](row)) is not None]


def falling(values: list[float]) -> bool:
    return len(values) > 1 and values == sorted(values, reverse=True)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("product", ["edp", "cdp"])
def test_the_optimal_batch_grows_with_the_size_of_the_model(predictor: str, product: str) -> None:
    batches = [optimal_batch(model, predictor, product) for model in MODELS]
    assert all(small < large for small, large in pairwise(batches)), batches
    assert batches[-1] < FINE[-1]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_long_prompts_undo_most_of_that_growth(predictor: str) -> None:
    # Each request brings a prefill in proportion to the model, so nothing is left to share: the Roofline's optimum
    # even falls, as launches, which a small model waits for, are shared too.
    chat = open_workload("azure-conv")
    growth = [
        optimal_batch("70B", predictor, "edp", workload) / optimal_batch("0.6B", predictor, "edp", workload)
        for workload in (DECODE_HEAVY, chat)
    ]
    assert growth[1] < 1.5 < growth[0]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallelism_takes_more_energy_of_the_engine_at_the_same_batch(model: str, predictor: str) -> None:
    joules = [row.energy_joules for (zone, _), row in at_batch(model, predictor, "devices").items() if zone == "coal"]
    assert len(joules) >= 2 and joules == sorted(joules)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_tensor_parallelism_lowers_the_embodied_carbon_of_a_whole_server_and_most_on_larger_models(
    predictor: str,
) -> None:
    gain = {}
    for model in MODELS:
        embodied = over_sizes(model, predictor, "embodied")
        assert model == "0.6B" or falling(embodied)
        gain[model] = embodied[-2] / embodied[-1]
    assert gain["0.6B"] < gain["8B"] < gain["32B"] < gain["70B"]
    # One small enough is no faster on two devices than on one: it waits for launches and collectives.
    small = over_sizes("0.6B", predictor, "embodied")
    assert small[1] > small[0]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("model", ["8B", "32B", "70B"])
def test_cleaner_grids_favour_tensor_parallelism(model: str, predictor: str) -> None:
    rows = at_batch(model, predictor, "server")

    def chosen(zone: str) -> int:
        own = {size: row.total_grams or 0.0 for (name, size), row in rows.items() if name == zone}
        return min(own, key=own.__getitem__)

    assert chosen("coal") <= chosen("gas") <= chosen("clean") == 8
    # On the largest model the network lets eight devices win on coal too: the others would idle for longer.
    assert chosen("coal") < 8 or model == "70B"


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("model", ["0.6B", "8B", "32B"])
def test_charged_by_device_tensor_parallelism_is_never_the_cleanest_at_the_same_batch(
    model: str, predictor: str
) -> None:
    # N devices are never N times as fast as one, so they hold more device-seconds: both carbons rise on every grid.
    for zone in GRIDS:
        own = [row.total_grams for (name, _), row in at_batch(model, predictor, "devices").items() if name == zone.zone]
        assert own == sorted(own, key=lambda grams: grams or 0.0) and len(own) == len(SIZES)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_where_memory_limits_the_batch_tensor_parallelism_lowers_both_carbons(predictor: str) -> None:
    # Two H100s hold the weights of 70 B and little else; four hold a batch that shares them.
    question = asked(MODELS["70B"], workload=open_workload("azure-conv"), predictor=predictor, tensor_parallel=(2, 4))
    least = {}
    for row in advise(question).rows:
        size = row.configuration.tensor_parallel
        found = (row.operational_grams, row.embodied_grams or 0.0)
        least[size] = tuple(map(min, least.get(size, found), found))
    assert least[4][0] < least[2][0] and least[4][1] < least[2][1]


def test_embodied_carbon_of_a_whole_server_is_its_rate_by_the_time() -> None:
    row = at_batch("8B", "gnn", "server")["coal", 2]
    grams = 8 * 164e3 + 5700e3
    seconds = 1000 / row.steady.output_tokens_per_second
    assert row.embodied_grams == pytest.approx(grams * seconds / (4 * SECONDS_PER_YEAR))
