"""A number that stands alone says why it is none, as Prometheus evaluates it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmco2_vllm.dashboards.promql import excess, told
from tests.prometheus import Promtool, promtool

__all__ = ["promtool"]

PART, WHOLE = "sum(part)", "sum(whole)"


@pytest.mark.parametrize(
    ("series", "there", "number"),
    [
        ({"part": 3, "whole": 2}, True, True),
        ({"part": 0, "whole": 2}, True, True),
        ({"part": 0, "whole": 0}, True, False),
        ({"part": 3, "whole": 0}, True, False),
        ({"whole": 2}, False, False),
        ({"whole": 0}, False, False),
        ({"part": 3}, False, False),
    ],
    ids=str,
)
def test_it_is_nan_without_a_whole_and_nothing_where_one_is_not_there(
    promtool: Promtool, tmp_path: Path, series: dict[str, int], there: bool, number: bool
) -> None:
    expected = {"": there, " < Inf": number}
    asked = [
        {"expr": f"count(({text}){filtered})", "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": 1}][:found]}
        for text in (told(PART, WHOLE), excess(PART, WHOLE))
        for filtered, found in expected.items()
    ]
    given = [{"series": name, "values": f"{value}x2"} for name, value in series.items()]
    path = tmp_path / "told.yaml"
    path.write_text(yaml.safe_dump({"tests": [{"input_series": given, "promql_expr_test": asked}]}))
    answer = promtool("test", "rules", path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
