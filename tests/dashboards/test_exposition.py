"""What a scrape holds: names that promtool accepts, every family, and series in bounds."""

from __future__ import annotations

import re
from collections import Counter

from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from llmco2_vllm.telemetry.exposition import leave_out
from llmco2_vllm.telemetry.metric_table import METRICS
from tests.dashboards.exposition import full, servers, text, work
from tests.prometheus import Promtool, promtool

__all__ = ["promtool"]

SERIES_OF_AN_ENGINE = 200
# Of no engine in particular: intensities by basis, what prices and measures, failures of the front end.
SERIES_OF_A_SERVER = 40


def series(models: int, engines: int) -> list[str]:
    """Series of a full scrape, less the times of birth that prometheus_client adds unless told not to."""
    lines = text(full(models, engines)).splitlines()
    return [line for line in lines if not line.startswith("#") and "_created{" not in line]


def test_promtool_finds_nothing_wrong_with_a_scrape_that_has_every_family(promtool: Promtool) -> None:
    scrape = text(full())
    for name in METRICS:
        assert re.search(rf"^{name}(_sum|_bucket)?{{", scrape, re.MULTILINE), name
    answer = promtool("check", "metrics", text=scrape)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_promtool_would_find_a_wrong_name(promtool: Promtool) -> None:
    wrong = "# HELP vllm:energy_kilojoules Energy.\n# TYPE vllm:energy_kilojoules counter\nvllm:energy_kilojoules 1\n"
    assert promtool("check", "metrics", text=wrong).returncode != 0


def test_series_of_an_engine_are_in_bounds_when_all_that_can_fail_has_failed() -> None:
    found = [line for line in series(1, 1) if 'engine="0"' in line]
    names = Counter(re.sub(r"(_bucket|_sum|_count)?{.*", "", line) for line in found)
    assert len(found) <= SERIES_OF_AN_ENGINE, names.most_common(8)


def test_series_grow_with_models_and_engines_and_by_nothing_else() -> None:
    one = series(1, 1)
    assert len([line for line in one if 'engine="0"' not in line]) <= SERIES_OF_A_SERVER
    of_one = len([line for line in one if 'engine="0"' in line])
    many = series(3, 4)
    assert sum('engine="' in line and 'engine="front_end"' not in line for line in many) == 12 * of_one


def test_prepared_lines_of_busy_servers_are_what_the_library_writes() -> None:
    registry, recorders = servers(models=2, engines=2, broken=True)
    for moment in range(4):
        left_out = leave_out()
        assert text(registry) == ""
        left_out.over = True
        assert left_out.text(openmetrics=False).decode() == text(registry)
        assert left_out.text(openmetrics=True) + b"# EOF\n" == generate_openmetrics(registry)
        for recorder in recorders[: 1 + moment % 2]:
            work(recorder, moment % 2, 1 + moment, broken=True)
