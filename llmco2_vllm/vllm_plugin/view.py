"""``RequestOutput.carbon``: what offline callers see of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.telemetry.annotation import annotate
from llmco2_vllm.telemetry.ledger import Ledger, RequestLedger, total


class RequestCarbon(Mapping[str, Any]):
    """The annotation as a mapping, empty until the request has finished.

    A live view: it sums the ledgers of all sequences of the request (n > 1) each time it is read.
    """

    def __init__(
        self, ledgers: Sequence[RequestLedger], accounting: Callable[[Sequence[RequestLedger]], Accounting]
    ) -> None:
        self._ledgers = ledgers
        self._accounting = accounting

    @property
    def ledger(self) -> Ledger:
        """What the request has been charged so far, finished or not."""
        return total(item.ledger for item in self._ledgers)

    def _document(self) -> dict[str, Any]:
        annotation = annotate(self._ledgers, self._accounting(self._ledgers))
        return {} if annotation is None else annotation.document()

    def __getitem__(self, key: str) -> Any:
        return self._document()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document())

    def __len__(self) -> int:
        return len(self._document())

    def __repr__(self) -> str:
        return f"RequestCarbon({self._document()!r})"
