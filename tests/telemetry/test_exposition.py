"""Prepared lines: byte for byte what the library writes, whatever happened to the values before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from llmco2_vllm.telemetry.exposition import FAMILIES, leave_out

BOUNDS = (0.5, 1.0, 2.5, 1e6)
NEGATIVE_BOUNDS = (-1.0, 0.0, 1e16)
EOF = b"# EOF\n"


class Registry(CollectorRegistry):
    """A registry with a family of ours of each kind."""

    def __init__(self, help_text: str = "Help.", label: str = "label") -> None:
        super().__init__()
        self.counter = FAMILIES[Counter]("a_total", help_text, ("z", label), registry=self)
        self.gauge = FAMILIES[Gauge]("b", help_text, (label,), registry=self)
        self.histogram = FAMILIES[Histogram]("c", help_text, ("z", label), registry=self, buckets=BOUNDS)
        self.negative = FAMILIES[Histogram]("d", help_text, (label,), registry=self, buckets=NEGATIVE_BOUNDS)
        self.empty = FAMILIES[Counter]("e_total", help_text, (label,), registry=self)


def scraped(registry: CollectorRegistry, openmetrics: bool = False) -> bytes:
    """Prepared lines of what the library leaves out."""
    left_out = leave_out()
    rest = generate_latest(registry)
    text = left_out.text(openmetrics)
    left_out.over = True
    assert rest == b""
    return text


def assert_as_the_library(registry: CollectorRegistry) -> None:
    assert scraped(registry) == generate_latest(registry)
    assert scraped(registry, openmetrics=True) + EOF == generate_openmetrics(registry)


numbers = st.floats() | st.integers(-(10**18), 10**18) | st.sampled_from([0.0, -0.0, 1e-4, 1e6, 999999.9999999999])
amounts = st.floats(0.0) | st.integers(0, 10**18)
names = st.text(max_size=4) | st.sampled_from(
    ['"', "\\", "\n", "a b", "\r", "\x85", "\u2028", "é", "# HELP a b\n", "%d.0\n", "%"]
)


def change(action: str, name: str, number: float) -> Callable[[Registry], Any]:
    """A change of a registry; the names are those of one label, new or not."""
    return {
        "count": lambda registry: registry.counter.labels("z", name).inc(abs(number)),
        "set": lambda registry: registry.gauge.labels(name).set(number),
        "observe": lambda registry: registry.histogram.labels(name, "x").observe(number),
        "observe negative": lambda registry: registry.negative.labels(name).observe(number),
        "look": lambda registry: registry.counter.labels("only", name),
        "remove": lambda registry: (name,) in registry.gauge._metrics and registry.gauge.remove(name),
        "clear": lambda registry: registry.histogram.clear(),
        "scrape": assert_as_the_library,
    }[action]


ACTIONS = ("count", "set", "observe", "observe negative", "look", "remove", "clear", "scrape")
changes = st.lists(st.builds(change, st.sampled_from(ACTIONS), names, numbers), max_size=30)


@given(changes, st.text(max_size=8))
def test_prepared_lines_are_those_of_the_library(changes: Iterable[Callable[[Registry], Any]], help_text: str) -> None:
    registry = Registry(help_text)
    for action in changes:
        action(registry)
    assert_as_the_library(registry)


@given(st.lists(st.floats() | st.floats(1e-5, 1e-3) | st.floats(1e5, 1e7) | st.floats(1e15, 1e17), min_size=1))
def test_every_number_is_written_as_the_library_does(values: list[float]) -> None:
    registry = Registry()
    for place, value in enumerate(values):
        registry.gauge.labels(str(place)).set(value)
    assert_as_the_library(registry)


def test_the_powers_of_ten_and_their_neighbours_are_written_as_the_library_does() -> None:
    registry = Registry()
    powers = [10.0**power for power in (-320, -101, -100, -99, -98, *range(-12, 20), 99, 100, 101)]
    values = [near for power in powers for near in (power, math.nextafter(power, 0), math.nextafter(power, math.inf))]
    for place, value in enumerate([*values, *(-value for value in values)]):
        registry.gauge.labels(str(place)).set(value)
    assert_as_the_library(registry)


@given(st.lists(st.integers(10**6, 10**16), min_size=1), st.integers(0, 15))
def test_large_whole_numbers_lose_their_zeros_as_with_the_library(values: list[int], zeros: int) -> None:
    registry = Registry()
    for place, value in enumerate(values):
        registry.gauge.labels(str(place)).set(value // 10**zeros * 10**zeros)
    assert_as_the_library(registry)


@given(st.lists(st.lists(st.integers(0, 10**8), min_size=5, max_size=5), min_size=1, max_size=4))
def test_buckets_of_any_size_add_up_as_with_the_library(children: list[list[int]]) -> None:
    registry = Registry()
    for place, counts in enumerate(children):
        for bucket, count in zip(registry.histogram.labels(str(place), "x")._buckets, counts, strict=True):
            bucket.inc(count)
    assert_as_the_library(registry)


def test_counts_that_grow_large_are_written_as_with_the_library_and_small_ones_after_them_too() -> None:
    registry = Registry()
    buckets = registry.histogram.labels("a %d.0", "x")._buckets
    for count in (0, 1, 999_997, 1, 1, 1, 10**9):
        buckets[0].inc(count)
        assert_as_the_library(registry)
        registry.histogram.labels("b", "x").observe(2.0)
        assert_as_the_library(registry)
    registry.histogram.clear()
    registry.histogram.labels("a", "x").observe(0.25)
    assert_as_the_library(registry)


requests = st.tuples(
    st.sampled_from(["histogram", "negative"]),
    st.sampled_from(["a", "b", "% d.0"]),
    st.integers(0, 3),
    st.sampled_from([1, 8, 9, 10, 90, 99, 900, 99_999, 999_999]) | st.integers(0, 10**6),
)


@given(st.lists(st.lists(requests, max_size=8), max_size=12))
def test_counts_that_get_wider_between_scrapes_are_written_as_with_the_library(
    scrapes: list[list[tuple[str, str, int, int]]],
) -> None:
    registry = Registry()
    for finished in scrapes:
        for name, label, place, count in finished:
            family = getattr(registry, name)
            child = family.labels(label, "x") if family is registry.histogram else family.labels(label)
            child._buckets[place].inc(count)
            child._sum.inc(0.1 * count)
        assert_as_the_library(registry)


def test_counts_of_many_children_get_wider_at_once() -> None:
    registry = Registry()
    children = [registry.histogram.labels(str(place), "x") for place in range(50)]
    children += [registry.negative.labels(str(place)) for place in range(50)]
    for _ in range(12):
        for place, child in enumerate(children):
            child.observe(0.75)
            child._buckets[place % 4].inc(3 ** (place % 12))
        assert_as_the_library(registry)


def test_a_count_that_falls_is_written_as_with_the_library_and_so_is_what_comes_after_it() -> None:
    registry = Registry()
    one, other = (registry.histogram.labels(name, "x") for name in "ab")
    for child in (one, other, registry.negative.labels("a")):
        child._buckets[0].inc(123)
    assert_as_the_library(registry)
    for count in (7, 1234, math.nan, 8):
        one._buckets[0].set(count)
        other.observe(0.1)
        registry.negative.labels("a").observe(-2.0)
        assert_as_the_library(registry)


def test_histograms_that_two_registries_share_are_whole_in_both() -> None:
    registry, other = Registry(), CollectorRegistry()
    first = FAMILIES[Gauge]("first", "Help.", ("label",), registry=other)
    for shared in (registry.histogram, registry.negative):
        other.register(shared)
    for count in range(12):
        first.labels("a").inc()
        registry.histogram.labels("a", "x").observe(0.1)
        assert_as_the_library(other)
        registry.negative.labels(str(count // 8)).observe(0.1)
        assert_as_the_library(registry)
        assert_as_the_library(other)


def test_the_text_of_one_scrape_is_not_changed_by_the_next() -> None:
    registry = Registry()
    gauge, histogram = registry.gauge.labels("a"), registry.histogram.labels("a", "x")
    held, expected = [], []
    for count in range(12):
        gauge.set(10.0**count)
        histogram.observe(1.0)
        held.append(scraped(registry))
        expected.append(generate_latest(registry))
    assert held == expected


def test_a_label_that_comes_for_one_that_went_is_seen() -> None:
    registry = Registry()
    for name in ("a", "b"):
        registry.gauge.labels(name).set(1.0)
    assert_as_the_library(registry)
    registry.gauge.remove("a")
    registry.gauge.labels("c").set(1.0)
    assert b'label="c"' in scraped(registry)
    assert_as_the_library(registry)


def test_zero_and_minus_zero_and_what_is_not_known_are_told_apart() -> None:
    registry = Registry()
    gauge = registry.gauge.labels("a")
    for value in (0.0, -0.0, math.nan, -math.inf, 0.0):
        gauge.set(value)
        assert_as_the_library(registry)


def test_a_family_is_written_anew_only_when_it_has_changed() -> None:
    registry = Registry()
    registry.counter.labels("z", "a").inc()
    registry.gauge.labels("a").set(1.0)
    scraped(registry)
    (counter,), (gauge,) = registry.counter.lines().parts, registry.gauge.lines().parts
    registry.gauge.labels("a").set(2.0)
    scraped(registry)
    assert registry.counter.lines().parts[0] is counter
    assert registry.gauge.lines().parts[0] != gauge


def test_counts_are_changed_where_they_stand() -> None:
    registry = Registry()
    for _ in range(11):
        registry.histogram.labels("a", "x").observe(0.1)
    assert_as_the_library(registry)
    block = registry.histogram.lines().parts[0]
    for _ in range(88):
        registry.histogram.labels("a", "x").observe(0.1)
        assert_as_the_library(registry)
        assert registry.histogram.lines().parts[0] is block


def test_values_count_on_after_a_scrape_and_the_library_sees_them() -> None:
    registry = Registry()
    counter = registry.counter.labels("z", "a")
    counter.inc(2)
    scraped(registry)
    counter.inc(0.5)
    assert registry.get_sample_value("a_total", {"z": "z", "label": "a"}) == 2.5
    assert_as_the_library(registry)


def test_there_are_no_times_of_birth() -> None:
    registry = Registry()
    registry.counter.labels("z", "a").inc()
    registry.histogram.labels("z", "a").observe(1.0)
    assert b"_created" not in generate_latest(registry) + generate_openmetrics(registry)


def test_a_restricted_registry_and_every_other_consumer_see_our_families() -> None:
    registry = Registry()
    registry.gauge.labels("a").set(1.0)
    assert b"# TYPE b gauge" in generate_latest(registry.restricted_registry(["b"]))
    assert {metric.name for metric in registry.collect()} == {"a", "b", "c", "d", "e"}


async def test_families_are_left_out_in_the_context_of_a_scrape_alone() -> None:
    registry = Registry()
    whole = generate_latest(registry)
    left_out, others = asyncio.Event(), asyncio.Event()

    async def scrape() -> tuple[bytes, bytes, list[Any]]:
        out = leave_out()
        left_out.set()
        await others.wait()
        texts = await asyncio.to_thread(generate_latest, registry), generate_latest(registry)
        out.over = True
        return *texts, list(out.families)

    async def other() -> bytes:
        await left_out.wait()
        others.set()
        return generate_latest(registry)

    (in_thread, in_task, families), elsewhere = await asyncio.gather(scrape(), other())
    assert (in_thread, in_task, elsewhere) == (b"", b"", whole)
    assert families == [registry.counter, registry.gauge, registry.histogram, registry.negative, registry.empty]


async def test_a_task_that_outlives_the_scrape_it_was_begun_in_sees_our_families() -> None:
    registry = Registry()
    go_on = asyncio.Event()

    async def later() -> bytes:
        await go_on.wait()
        return generate_latest(registry)

    left_out = leave_out()
    task = asyncio.create_task(later())
    left_out.over = True
    go_on.set()
    assert await task == generate_latest(registry) != b""


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_of_the_kind_it_stands_for(kind: type) -> None:
    assert issubclass(FAMILIES[kind], kind)
