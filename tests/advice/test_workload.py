"""Workloads: what is shipped, what a file may hold, and summaries that keep the means."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.advice.workload import Workload, open_workload, read_workload, sources


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    # Means of the traces, https://github.com/Azure/AzurePublicDataset, computed from its rows.
    [("azure-conv", 1154.697, 211.126), ("azure-code", 2047.848, 27.883)],
)
def test_the_shipped_workloads_have_the_means_of_their_traces(name: str, prompt: float, output: float) -> None:
    found = open_workload(name)
    assert found.prompt_mean == pytest.approx(prompt, rel=1e-5)
    assert found.output_mean == pytest.approx(output, rel=1e-4)
    assert found.shares.sum() == pytest.approx(1.0) and found.requests_per_second


def test_every_shipped_workload_names_its_licence_and_notice() -> None:
    for name, row in sources().items():
        assert row["licence"] == "CC BY 4.0" and "Microsoft" in row["notice"] and row["year"] == 2023, name


requests = st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 2000)), min_size=1, max_size=200)


@given(requests, st.integers(1, 12))
def test_a_summary_keeps_the_means_and_is_no_longer(lengths: list[tuple[int, int]], levels: int) -> None:
    prompt, output = np.array(lengths, dtype=np.float64).T
    full = Workload("w", prompt, output, np.full(len(lengths), 1 / len(lengths)))
    short = full.summarised(levels)
    assert len(short.shares) <= min(levels**2, len(lengths))
    assert short.prompt_mean == pytest.approx(full.prompt_mean)
    assert short.output_mean == pytest.approx(full.output_mean)


@given(requests)
def test_longer_outputs_are_met_in_more_steps(lengths: list[tuple[int, int]]) -> None:
    prompt, output = np.array(lengths, dtype=np.float64).T
    found = Workload("w", prompt, output, np.full(len(lengths), 1 / len(lengths)))
    steps = [p + t for p, o in lengths for t in range(1, o)]
    if steps:
        assert found.decode_context == pytest.approx(np.mean(steps))


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    rows = [(10, 5, 0.0), (20, 15, 1.5), (30, 1, 4.0)]
    table, lines, packed = tmp_path / "a.csv", tmp_path / "a.jsonl", tmp_path / "a.csv.gz"
    table.write_text("t_s,input_tokens,output_tokens\n" + "".join(f"{t},{p},{o}\n" for p, o, t in rows))
    packed.write_bytes(gzip.compress(table.read_bytes()))
    names = ("prompt_tokens", "completion_tokens", "arrival_seconds")
    lines.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n\n" for row in rows))
    for path in (table, lines, packed):
        found = read_workload(path)
        assert found.prompt_tokens.tolist() == [10, 20, 30] and found.output_tokens.tolist() == [5, 15, 1]
        assert found.requests_per_second == pytest.approx(0.5)


def test_without_arrivals_the_rate_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt_tokens,output_tokens\n10,5\n")
    assert read_workload(path).requests_per_second is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt_tokens\n1\n", "output_tokens is missing; allowed: output_tokens or completion_tokens"),
        ("a.csv", "prompt_tokens,output_tokens\n", "holds no request"),
        ("a.csv", "prompt_tokens,output_tokens\n10,0\n", "line 2, column output_tokens"),
        ("a.csv", "prompt_tokens,output_tokens\n10\n", "line 2, has 1 fields"),
        ("a.csv", "", "line 1 is no header"),
        ("a.jsonl", '{"prompt_tokens": 3, "output_tokens": 2}\n[]\n', "line 2 is no JSON object"),
        ("a.jsonl", '{"prompt_tokens": 3}\n', "line 1: output_tokens is missing"),
        ("a.jsonl", '{"prompt_tokens": 3.5, "output_tokens": 2}\n', "line 1, column prompt_tokens: '3.5'"),
    ],
)
def test_a_faulty_file_is_named_by_line_and_key(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_workload(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_workload_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"allowed: azure-conv, azure-code, or a \.csv"):
        open_workload("no-such-trace")
