"""Offline inference: ``LLM(model, additional_config={"carbon": ...})`` and ``RequestOutput.carbon``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from tests.server.clients import SIX_DIGITS, assert_tokens, checked, joules
from tests.server.conftest import Child

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def in_process(child: Child, model_dir: Path) -> dict[str, Any]:
    return child("offline_child", "in_process", str(model_dir))


@pytest.fixture(scope="module")
def speculative(child: Child, model_dir: Path) -> dict[str, Any]:
    return child("offline_child", "speculative", str(model_dir))


def test_every_output_has_its_annotation(in_process: dict[str, Any]) -> None:
    for output in in_process["outputs"]:
        carbon = checked(output["carbon"])
        assert_tokens(carbon, output["prompt"], output["completion"])
        assert carbon["intensity"]["zone"] == "FR"


def test_answers_of_one_request_are_one_sum(in_process: dict[str, Any]) -> None:
    (output,) = in_process["several"]
    assert output["sequences"] == 2
    assert_tokens(checked(output["carbon"]), 2 * output["prompt"], output["completion"], sequences=2)


def test_outputs_add_up_to_what_the_engine_spent(in_process: dict[str, Any]) -> None:
    spent = in_process["spent"]
    outputs = in_process["outputs"] + in_process["several"]
    charged = sum(joules(output["carbon"]) for output in outputs)
    assert charged == approx(spent["prefill_joules"] + spent["decode_joules"], rel=SIX_DIGITS)
    assert spent["finished_requests"] == 4
    assert not any(spent["failures"].values())
    assert spent["lost_tickets"] == 0


def test_without_carbon_the_scheduler_is_vllms_own_and_outputs_say_nothing(in_process: dict[str, Any]) -> None:
    assert in_process["plain_scheduler"].startswith("vllm.v1.core.sched.")
    assert in_process["plain_carbon"] == [None, None]


def test_with_carbon_the_scheduler_is_the_same_one_beneath_and_says_the_same(in_process: dict[str, Any]) -> None:
    carbon, mixin, base, *_ = in_process["metered_scheduler"]
    assert (carbon, mixin) == (f"Carbon{base}", "CarbonMixin")
    assert in_process["plain_scheduler"].endswith(f".{base}")
    assert in_process["same_text"]
    assert in_process["additional_config"] == {}


def test_drafts_are_charged_and_those_rejected_are_said(speculative: dict[str, Any]) -> None:
    rejected = 0
    for output in speculative["outputs"]:
        carbon = checked(output["carbon"])
        tokens = carbon["tokens"]
        drafts = tokens.get("rejected_drafts", 0)
        assert tokens["prefill"] + tokens["cached"] == output["prompt"]
        assert tokens["recomputed"] == 0
        # Accepted drafts are tokens of the answer; some of the last step may have come behind its end.
        assert output["completion"] - 1 <= tokens["decode"] - drafts <= output["completion"] + 2
        rejected += drafts
    assert rejected > 0, "sampled at temperature 1, some n-gram drafts are wrong"


def test_embeddings_decode_nothing(in_process: dict[str, Any]) -> None:
    for output in in_process["embedded"]:
        assert_tokens(checked(output["carbon"]), output["prompt"], 0, sequences=0)
        assert output["carbon"]["estimate"]["decode_joules"] == 0


def test_an_unknown_key_is_a_value_error_that_names_it(in_process: dict[str, Any]) -> None:
    error = in_process["refused"]
    assert "'zoen'" in error
    assert "'zone'" in error
    assert "\n" not in error
