import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.core.roofline import (
    Bound,
    Ceilings,
    Work,
    arithmetic_intensity,
    bound,
    least_time_seconds,
    ridge_point,
)

H100 = Ceilings(989.4e12, 3.35e12, 450e9)
amounts = st.floats(0, 1e18)


def test_a_matrix_vector_product_is_bound_by_memory_and_a_large_matrix_product_by_compute() -> None:
    n = 8192
    one_row = Work(flops=2 * n * n, memory_bytes=2 * n * n)
    many_rows = Work(flops=2 * n**3, memory_bytes=3 * 2 * n * n)
    assert bound(one_row, H100) is Bound.MEMORY
    assert bound(many_rows, H100) is Bound.COMPUTE
    assert least_time_seconds(many_rows, H100) == pytest.approx(2 * n**3 / 989.4e12)


def test_work_that_is_only_sent_is_bound_by_the_link() -> None:
    assert bound(Work(network_bytes=1e6), H100) is Bound.NETWORK
    assert least_time_seconds(Work(network_bytes=450e9), H100) == 1.0


def test_at_the_ridge_compute_and_memory_take_equally_long() -> None:
    work = Work(flops=ridge_point(H100) * 1e9, memory_bytes=1e9)
    assert arithmetic_intensity(work) == pytest.approx(ridge_point(H100))
    assert work.flops / H100.flops_per_second == pytest.approx(work.memory_bytes / H100.memory_bytes_per_second)


def test_work_without_memory_traffic_has_infinite_intensity() -> None:
    assert math.isinf(arithmetic_intensity(Work(flops=1.0)))


@given(amounts, amounts, amounts, st.floats(1, 1e3))
def test_more_work_never_takes_less_time(flops: float, memory: float, network: float, factor: float) -> None:
    small = least_time_seconds(Work(flops, memory, network), H100)
    large = least_time_seconds(Work(flops * factor, memory * factor, network * factor), H100)
    assert large >= small
