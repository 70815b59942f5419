"""Late results: every response is written anew once, when the last of its requests is final."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmco2_vllm.core.settlement import Settled
from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.telemetry.metered import Metered, encode_metered
from llmco2_vllm.vllm_plugin import late
from llmco2_vllm.vllm_plugin.late import LateResults

SETTLED = Settled(1.0, 2.0, 0.1, 1.0, 2.0, 0.0, 0.0, 0.5)
OPEN = Metered(False, SETTLED, 1.0)
FINAL = Metered(True, SETTLED._replace(estimated_joules=0.0), 1.0)


class Written(list[str]):
    def __call__(self, response_id: str, ledgers: Sequence[RequestLedger]) -> None:
        assert all(ledger.metered.final for ledger in ledgers)
        self.append(response_id)


def test_a_response_waits_for_all_of_its_requests() -> None:
    written, final = Written(), list[RequestLedger]()
    results, ledgers = LateResults(written, final.append), [RequestLedger(metered=OPEN), RequestLedger(metered=OPEN)]
    for name, ledger in zip("ab", ledgers, strict=True):
        results.finished(name, ledger)
    results.answered("response", ledgers)
    assert results.request_ids == ["a", "b"] and "response" in results
    results.settle({"a": encode_metered(FINAL)})
    assert written == [] and results.request_ids == ["b"] and final == ledgers[:1]
    results.settle({"b": encode_metered(FINAL)})
    assert written == ["response"] and "response" not in results
    results.settle({"b": encode_metered(FINAL)})
    assert written == ["response"] and final == ledgers, "each once"


def test_what_is_final_or_has_no_meter_is_not_waited_for() -> None:
    final: list[RequestLedger] = []
    results = LateResults(Written(), final.append)
    for metered in (None, FINAL):
        ledger = RequestLedger(metered=metered)
        results.finished("a", ledger)
        results.answered("response", [ledger])
    assert results.request_ids == [] and "response" not in results
    assert [ledger.metered for ledger in final] == [FINAL]


def test_the_oldest_is_given_up_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "MOST_WAITING", 3)
    results = LateResults(Written(), list[RequestLedger]().append)
    for number in range(5):
        ledger = RequestLedger(metered=OPEN)
        results.finished(str(number), ledger)
        results.answered(f"response {number}", [ledger])
    assert results.request_ids == ["2", "3", "4"] and "response 1" not in results and "response 4" in results
