"""The ASGI interface as we use it, and what the middleware and its endpoints ask of the front end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

from llmco2_vllm.telemetry.ledger import RequestLedger

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

START, BODY = "http.response.start", "http.response.body"

logger = logging.getLogger("vllm.llmco2")


class Page(NamedTuple):
    """An HTML page and the headers that guard it."""

    body: bytes
    headers: Headers


class FrontEnd(Protocol):
    """What the middleware asks of the front end of the engine."""

    def open_call(self) -> list[RequestLedger]:
        """A fresh list, bound to the running context, to which the ledgers of this call are appended."""
        ...

    def describe(self, ledgers: Sequence[RequestLedger]) -> str | None:
        """Annotation JSON on one line, None to leave it out."""
        ...

    def header_values(self, ledgers: Sequence[RequestLedger]) -> Headers:
        """Headers to add to a response that is not streamed."""
        ...

    def remember(self, response_id: str, annotation_json: str, ledgers: Sequence[RequestLedger] = ()) -> None:
        """Keep an annotation that has been put into a response; it is made anew once its ledgers are final."""
        ...

    async def find(self, response_id: str) -> str | None:
        """The annotation kept for a response id."""
        ...

    async def status(self) -> dict[str, Any]:
        """Body of ``GET /carbon``."""
        ...

    def live_page(self) -> Page | None:
        """``GET /carbon/live``; None where it is off."""
        ...

    async def live(self) -> dict[str, Any] | None:
        """Body of ``GET /carbon/live.json``; None where it is off."""
        ...

    async def refresh_metrics(self) -> None:
        """Bring the engine-wide metrics up to date before a scrape."""
        ...

    async def switch(self, on: bool) -> dict[str, Any] | None:
        """Turn the hook on or off; None when that is not allowed."""
        ...

    def started(self) -> None:
        """The server runs: called once per process, from its event loop."""
        ...

    def failed(self, where: str, error: BaseException) -> None:
        """Something of ours raised; the response went out as the server made it."""
        ...


def report(front_end: FrontEnd, where: str, error: Exception) -> None:
    """Have the front end count a failure of ours. Never raises."""
    try:
        front_end.failed(where, error)
    except Exception:
        logger.exception("llmco2: failed at %s (%r) and could not count it", where, error)
