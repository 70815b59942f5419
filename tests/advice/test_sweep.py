"""Laws of the sweep: grams follow intensity, memory and objectives only ever take away, the front is not beaten."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmco2_vllm.advice.front import FIGURES, best, front
from llmco2_vllm.advice.held import Ownership
from llmco2_vllm.advice.slo import Slo
from llmco2_vllm.advice.sweep import Advice, Configuration, Question, advise
from llmco2_vllm.advice.zones import ZoneIntensity, zone_intensities, zone_intensity
from llmco2_vllm.core.embodied import MODELS as EMBODIED
from llmco2_vllm.core.hardware import device_by_name
from llmco2_vllm.telemetry.accounting import Node
from llmco2_vllm.testing import ConstantPredictor
from tests.advice.asked import CLEAN, COAL, LLAMA_8B, LLAMA_70B, asked, of_length

QUICK = (1, 16, 256)


def constant(question: Question) -> Advice:
    return advise(question, price=lambda device, topology: ConstantPredictor())


def feasible(found: Advice) -> set[Configuration]:
    return {row.configuration for row in found.rows}


def grams_of(intensity: float, **changes: Any) -> list[float]:
    zone = ZoneIntensity("somewhere", intensity, "test")
    return [row.operational_grams for row in constant(asked(zones=(zone,), batch_limits=QUICK, **changes)).rows]


@given(st.floats(0, 3000), st.floats(0, 10))
def test_operational_grams_scale_with_the_intensity(intensity: float, factor: float) -> None:
    scaled = min(3000.0, intensity * factor)
    one = grams_of(1.0)
    assert grams_of(scaled) == pytest.approx([scaled * grams for grams in one])


def test_pue_and_host_multiply_what_the_devices_draw() -> None:
    plain, sited = grams_of(100), grams_of(100, site=Node.stated(1.3, 0.2, None))
    assert sited == pytest.approx([1.3 * 1.2 * grams for grams in plain])


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 4))
def test_more_memory_never_makes_fewer_feasible(factor: float) -> None:
    device = device_by_name("a100-40")
    larger = replace(device, memory_bytes=device.memory_bytes * factor)
    less, more = (constant(asked(LLAMA_70B, devices=[one])) for one in (device, larger))
    assert feasible(less) <= feasible(more)
    assert len(less.infeasible) + len(feasible(less)) == len(more.infeasible) + len(feasible(more)) == 36


bounds = st.none() | st.floats(1e-4, 1.0)


@settings(max_examples=30, deadline=None)
@given(bounds, bounds, st.floats(1, 10))
def test_a_looser_objective_never_takes_a_configuration_away(
    ttft: float | None, tpot: float | None, factor: float
) -> None:
    loose = [None if bound is None else bound * factor for bound in (ttft, tpot)]
    strict, free = (
        advise(asked(slo=Slo(*bound), batch_limits=QUICK, predictor="roofline")) for bound in ((ttft, tpot), loose)
    )
    assert feasible(strict) <= feasible(free)
    for row in strict.rows:
        assert ttft is None or row.steady.ttft_seconds <= ttft
        assert tpot is None or row.steady.tpot_seconds is None or row.steady.tpot_seconds <= tpot


points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


@given(points)
def test_no_point_of_the_front_is_beaten_and_each_other_point_is(values: list[tuple[int, int]]) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    kept = front(values, lambda point: point)
    assert sorted(kept) == sorted(p for p in values if not any(beats(other, p) for other in values))


@pytest.mark.parametrize("by", FIGURES)
def test_the_best_row_of_a_device_and_zone_has_the_least_figure(by: str) -> None:
    devices = [device_by_name(name) for name in ("h100-sxm", "a100-80", "l4")]
    rows = advise(asked(devices=devices, zones=(COAL, CLEAN), batch_limits=QUICK)).rows
    found = best(rows, by)
    assert set(found) == {(zone, device.name) for zone in ("coal", "clean") for device in devices}
    for (zone, device), row in found.items():
        own = [r for r in rows if (r.zone, r.configuration.device) == (zone, device)]
        values = [FIGURES[by](r) for r in own]
        chosen = FIGURES[by](row)
        assert chosen is None or chosen == min(value for value in values if value is not None)


def test_products_are_those_of_the_row() -> None:
    for row in advise(asked(batch_limits=QUICK, ownership=Ownership("server"))).rows:
        joules, delay = row.energy_joules + row.idle_joules, row.steady.latency_seconds
        assert row.embodied_grams is not None and row.total_grams is not None
        assert row.total_grams == row.operational_grams + row.embodied_grams
        assert row.edp_joule_seconds == joules * delay
        assert row.cdp_gram_seconds == row.embodied_grams * delay
        assert row.cep_gram_joules == row.embodied_grams * joules
        assert row.tcdp_gram_seconds == row.total_grams * delay


def test_only_a_whole_server_has_devices_that_idle() -> None:
    device = device_by_name("h100-sxm")
    for hold, size in (("devices", 2), ("server", 2), ("server", 8)):
        ownership = Ownership("server" if hold == "server" else "devices")
        row = constant(asked(ownership=ownership, tensor_parallel=(size,), batch_limits=(4,))).rows[0]
        idle = 8 - size if hold == "server" else 0
        seconds = 1000 / row.steady.output_tokens_per_second
        assert row.idle_joules == pytest.approx(idle * device.idle_power_watts * seconds)


HOLDS_OF_HOST: dict[str, Any] = {"devices": [device_by_name("h100-sxm")], "batch_limits": (16,)}


@settings(deadline=None)
@given(st.floats(3, 5), st.floats(3, 5))
def test_a_host_that_lives_longer_than_its_devices_counts_for_less(devices: float, host: float) -> None:
    def embodied(*years: float | None) -> float:
        row = constant(asked(ownership=Ownership("devices", "product", *years), **HOLDS_OF_HOST)).rows[0]  # type: ignore[arg-type]
        assert row.embodied_grams is not None
        return row.embodied_grams

    assert embodied(devices) == embodied(devices, None) == embodied(devices, devices)
    assert (embodied(devices, host) <= embodied(devices)) == (host >= devices)
    # Both parts go as one over their years.
    both = embodied(4.0, 4.0)
    of_devices = (embodied(3.0, 4.0) - both) / (1 / 3 - 1 / 4)
    assert embodied(devices, host) == pytest.approx(of_devices / devices + (both - of_devices / 4) * 4 / host)


@pytest.mark.parametrize("years", [2.9, 5.1])
def test_a_lifetime_of_a_host_outside_of_what_is_possible_is_refused(years: float) -> None:
    with pytest.raises(ValueError, match="years"):
        constant(asked(ownership=Ownership(host_lifetime_years=years), **HOLDS_OF_HOST))


@pytest.mark.parametrize("model", EMBODIED)
def test_what_nobody_published_is_not_known_and_never_zero(model: Any) -> None:
    devices = [device_by_name(name) for name in ("h100-sxm", "l4", "cpu")]
    found = constant(asked(devices=devices, ownership=Ownership(model=model), batch_limits=(1,)))
    for row in found.rows:
        known = row.embodied_grams is not None
        assert known == (
            row.configuration.device == "h100-sxm" or (model, row.configuration.device) == ("components", "l4")
        )
        assert not known or row.embodied_grams > 0
        assert ("total_grams" in row.to_dict()) == known == (row.cdp_gram_seconds is not None)
        assert known or any(row.configuration.device in note for note in found.notes)


def test_the_host_is_never_added_to_another_models_device() -> None:
    found = constant(asked(ownership=Ownership(model="components"), batch_limits=(1,)))
    assert "h100-sxm: embodied without the host" in found.notes


def test_infeasible_configurations_say_why() -> None:
    found = advise(asked(LLAMA_70B, devices=[device_by_name("a100-80"), device_by_name("cpu")], slo=Slo(tpot=0.05)))
    reasons = {(one.configuration.device, one.configuration.tensor_parallel, one.reason) for one in found.infeasible}
    assert {("a100-80", 1, "memory"), ("a100-80", 4, "slo"), ("cpu", 2, "layout"), ("cpu", 1, "memory")} <= reasons
    odd = advise(asked({**LLAMA_8B, "num_attention_heads": 36, "head_dim": 128}, tensor_parallel=(8,)))
    assert not odd.rows and {one.detail for one in odd.infeasible} == {"36 heads do not divide over 8 devices"}


def test_arrivals_say_how_many_engines_are_needed() -> None:
    row = constant(asked(workload=of_length(10, 5, rate=3.0), batch_limits=(1,))).rows[0]
    # One request at a time, a second a step: a fifth of a request per second.
    assert row.engines == pytest.approx(15.0)
    assert constant(asked(batch_limits=(1,))).rows[0].engines is None


def test_rows_survive_json() -> None:
    zone = ZoneIntensity("daily", 100.0, "test", tuple(50.0 + hour for hour in range(24)))
    for row in advise(asked(zones=(zone,), batch_limits=QUICK)).rows:
        flat = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert flat == row.to_dict()
        assert flat["operational_grams"] == pytest.approx(flat["energy_joules"] * 100 / 3.6e6)
        assert flat["best_hour"]["hour_utc"] == 0 and flat["worst_hour"]["hour_utc"] == 23
        ratio = flat["worst_hour"]["operational_grams"] / flat["best_hour"]["operational_grams"]
        assert ratio == pytest.approx(73 / 50)
        assert flat["lower_joules"] <= flat["energy_joules"] <= flat["upper_joules"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", Slo()), ("tpot=50ms", Slo(tpot=0.05)), (" ttft = 1s , latency=20", Slo(ttft=1.0, latency=20.0))],
)
def test_objectives_are_read_in_seconds_or_milliseconds(text: str, expected: Slo) -> None:
    found = Slo.parse(text)
    assert found == expected or math.isclose(found.tpot or 0, expected.tpot or 0)


@pytest.mark.parametrize("text", ["tpot", "speed=1", "tpot=0", "tpot=-1", "tpot=nan", "tpot=1h", "tpot=1,tpot=2"])
def test_a_malformed_objective_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Slo.parse(text)
    assert str(caught.value).startswith("slo") and "\n" not in str(caught.value)


def hourly(path: Path, rows: list[tuple[str, float]]) -> Path:
    path.write_text("datetime_utc,grams_per_kwh\n" + "".join(f"{at},{value}\n" for at, value in rows))
    return path


def test_an_hourly_file_gives_the_mean_day(tmp_path: Path) -> None:
    rows = [(f"2024-01-0{day} {hour:02}:00", 100.0 * day + hour) for day in (1, 2) for hour in range(24)]
    found = zone_intensity("FR", hourly(tmp_path / "fr.csv", rows))
    assert found.hours == tuple(150.0 + hour for hour in range(24))
    assert (found.best_hour, found.worst_hour, found.grams_per_kwh) == (0, 23, pytest.approx(161.5))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(f"2024-01-0{day}", 1.0) for day in (1, 2, 3)], "is not hourly"),
        ([(f"2024-01-01 {hour:02}:00", 1.0) for hour in range(23)], "no row of 23:00 UTC"),
    ],
)
def test_a_file_without_whole_days_is_refused(tmp_path: Path, rows: list[tuple[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zone_intensity("FR", hourly(tmp_path / "fr.csv", rows))


def test_part_of_a_country_says_that_the_country_stands_in() -> None:
    assert zone_intensity("US-CAL-CISO").source.endswith("of US as a whole")
    with pytest.raises(ValueError, match=r"zone='fr' is not known; .*near: FR"):
        zone_intensities(("fr",), {"fr": Path("fr.csv")})
    with pytest.raises(ValueError, match="intensity file of zone='DE'; allowed: one of the zones compared, FR"):
        zone_intensities(("FR",), {"DE": Path("de.csv")})
