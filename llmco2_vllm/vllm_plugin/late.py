"""Late results: a response is out before the meter has covered its last steps; the final figure follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.telemetry.metered import decode_metered

# Requests and responses that wait; beyond, the oldest keep the figure of their response.
MOST_WAITING = 10_000


class LateResults:
    """Requests whose figures are not final yet, and the responses that are written anew when they are.

    rewrite: called with a response id and its ledgers once all of them are final.
    final: called with the ledger of each engine request once its figure is final.
    """

    def __init__(
        self, rewrite: Callable[[str, Sequence[RequestLedger]], None], final: Callable[[RequestLedger], None]
    ) -> None:
        self._rewrite, self._final = rewrite, final
        self._requests: dict[str, RequestLedger] = {}
        self._responses: dict[str, Sequence[RequestLedger]] = {}

    @property
    def request_ids(self) -> list[str]:
        """Engine requests to ask for."""
        return list(self._requests)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def finished(self, request_id: str, ledger: RequestLedger) -> None:
        """A request has left the front end."""
        if ledger.metered is None:
            return
        if ledger.metered.final:
            self._final(ledger)
        else:
            self._requests[request_id] = ledger
            if len(self._requests) > MOST_WAITING:
                del self._requests[next(iter(self._requests))]

    def answered(self, response_id: str, ledgers: Sequence[RequestLedger]) -> None:
        """A response is out."""
        if any(ledger.metered is not None and not ledger.metered.final for ledger in ledgers):
            self._responses[response_id] = ledgers
            if len(self._responses) > MOST_WAITING:
                del self._responses[next(iter(self._responses))]

    def settle(self, records: Mapping[str, str]) -> None:
        """What engines said: final records by engine request. Raises ValueError for one that cannot be read."""
        for request_id, record in records.items():
            ledger = self._requests.pop(request_id, None)
            if ledger is not None:
                ledger.metered = decode_metered(record)
                self._final(ledger)
        if not records:
            return
        done = [
            response_id
            for response_id, ledgers in self._responses.items()
            if all(ledger.metered is None or ledger.metered.final for ledger in ledgers)
        ]
        for response_id in done:
            self._rewrite(response_id, self._responses[response_id])
            del self._responses[response_id]
