"""The front end: ledgers out of engine outputs, onto request outputs, responses and metrics.

Lives in every process with an output processor: API servers, and the caller of ``LLM``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import llmco2_vllm
from llmco2_vllm.config import Settings
from llmco2_vllm.core.ledgers import DecodeSums
from llmco2_vllm.telemetry.accounting import Accountant, Accounting, HostShare
from llmco2_vllm.telemetry.annotation import Annotation, annotate, intensity_documents, node_document
from llmco2_vllm.telemetry.ledger import KEY, SUMS_KEY, RequestLedger, decode_sums
from llmco2_vllm.telemetry.metered import METERED_KEY, decode_metered, figure
from llmco2_vllm.telemetry.requests import RequestLog
from llmco2_vllm.vllm_plugin import compat, live
from llmco2_vllm.vllm_plugin.asgi import Page
from llmco2_vllm.vllm_plugin.guard import Guard
from llmco2_vllm.vllm_plugin.late import LateResults
from llmco2_vllm.vllm_plugin.view import RequestCarbon

logger = logging.getLogger("vllm.llmco2")

PULL_SECONDS = 5.0
MOST_COUNTED = 10_000
_ATTRIBUTE = "llmco2_ledgers"
_CALL: ContextVar[list[RequestLedger] | None] = ContextVar("llmco2_call", default=None)


class CarbonFrontEnd:
    """Collaborator of the middleware and of the output-processor wrappers; one per process."""

    def __init__(self, settings: Settings, model_name: str, accountant: Accountant) -> None:
        self.settings = settings
        self.model_name = model_name
        self.host_version = compat.host_version()
        self.guard = Guard("front end", self.host_version)
        self.accountant = accountant
        self.log = RequestLog(_request_log_path())
        self.self_check = compat.self_check()
        self.engine_client: Callable[[], Any] = lambda: None
        self._counted: dict[str, float] = {}
        self._late = LateResults(self._rewrite, self._measured)
        self._host = HostShare()
        # Running sums by engine, and the requests whose ledgers follow them.
        self._sums: dict[int, DecodeSums] = {}
        self._following: dict[str, RequestLedger] = {}
        self._recorder: Any = None
        self._pull: asyncio.Task[None] | None = None
        self._grid: asyncio.Task[None] | None = None
        self._pulled_epoch_seconds: float | None = None

    # -- what the wrappers call -----------------------------------------------------------

    def track(self, processor: Any, request: Any) -> None:
        """Open the ledger of a request; sequences of one request share their parent's list."""
        state = processor.request_states.get(request.request_id)
        if state is None or hasattr(state, "llmco2_ledger"):
            return  # gone already, or a further turn of a session
        parent = state.parent_req
        ledger = RequestLedger(begin_epoch_seconds=self.accountant.clock())
        state.llmco2_ledger = ledger
        siblings: list[RequestLedger] = getattr(parent, _ATTRIBUTE, []) if parent is not None else []
        siblings.append(ledger)
        setattr(state if parent is None else parent, _ATTRIBUTE, siblings)
        call = _CALL.get()
        if call is not None:
            call.append(ledger)

    def receive(self, processor: Any, outputs: Sequence[Any]) -> list[tuple[str, RequestLedger]]:
        """Take over the ledgers that came with ``outputs``; those requests' ids and ledgers."""
        states = processor.request_states
        received = []
        for output in outputs:
            headers = output.trace_headers
            if not headers:
                continue
            if SUMS_KEY in headers:
                engine, sums = decode_sums(headers[SUMS_KEY])
                self._sums[engine] = sums
            if KEY in headers and (state := states.get(output.request_id)) is not None:
                ledger = getattr(state, "llmco2_ledger", None)
                if ledger is not None:
                    self._take(output.request_id, ledger, headers[KEY])
                    if METERED_KEY in headers:
                        ledger.metered = decode_metered(headers[METERED_KEY])
                    received.append((output.request_id, ledger))
        return received

    def _take(self, request_id: str, ledger: RequestLedger, record: str) -> None:
        ledger.receive(record, self._sums)
        if ledger.follows_sums:
            self._following[request_id] = ledger
            if len(self._following) > MOST_COUNTED:
                del self._following[next(iter(self._following))]
        else:
            self._following.pop(request_id, None)

    def settle(self, processor: Any, received: Sequence[tuple[str, RequestLedger]], ended: Sequence[str] = ()) -> None:
        """Mark the ledgers whose request has left, and count them.

        ended: requests that this process ended by itself, on a stop string.
        """
        states = processor.request_states
        left = {request_id: ledger for request_id, ledger in received if request_id not in states}
        left.update((request_id, self._following[request_id]) for request_id in ended if request_id in self._following)
        for request_id, ledger in left.items():
            self._following.pop(request_id, None)
            if ledger.follows_sums:
                ledger.settle(self._sums[ledger.ledger.engine])
            engine, joules = ledger.ledger.engine, ledger.ledger.energy_joules
            if not ledger.complete:
                # Ended here by a stop string: the engine sent what its figures need with this very output.
                self._ended_here(request_id, joules)
            ledger.complete = ledger.finished = True
            ledger.end_epoch_seconds = self.accountant.clock()
            self._late.finished(request_id, ledger)
            try:
                self.recorder.request_finished(engine, joules)
            except Exception as error:
                self.failed("request_finished", error)  # costs the histogram, not the annotation

    def at_finish(self, ledger: RequestLedger) -> RequestLedger:
        """A copy with the figures of a request that ends with this very step; the ledger itself stays as it is."""
        whole = replace(ledger, complete=True)
        if whole.follows_sums:
            whole.settle(self._sums[whole.ledger.engine])
        return whole

    def abandoned(self, request_ids: Sequence[str]) -> None:
        """The clients of these requests have left."""
        for request_id in request_ids:
            self._following.pop(request_id, None)
            self._ended_here(request_id, 0.0)

    def _ended_here(self, request_id: str, joules: float) -> None:
        # Goes along with the next pull, where there is one; what waits longest for a failing one is dropped.
        if self._pull is not None:
            self._counted[request_id] = joules
            if len(self._counted) > MOST_COUNTED:
                del self._counted[next(iter(self._counted))]

    def carbon_of(self, state: Any) -> RequestCarbon | None:
        """The live view for a request's output, or None where no ledger was opened."""
        owner = state if state.parent_req is None else state.parent_req
        ledgers = getattr(owner, _ATTRIBUTE, None)
        return RequestCarbon(ledgers, self.accounting_of) if ledgers else None

    # -- what the middleware calls --------------------------------------------------------

    def open_call(self) -> list[RequestLedger]:
        """A fresh list that the engine requests of this HTTP call will be added to."""
        call: list[RequestLedger] = []
        _CALL.set(call)
        return call

    def describe(self, ledgers: Sequence[RequestLedger]) -> str | None:
        """The annotation of a call as JSON text, or None where there is nothing to say."""
        annotation: Annotation | None = annotate(ledgers, self.accounting_of(ledgers))
        return None if annotation is None else annotation.json_text()

    def header_values(self, ledgers: Sequence[RequestLedger]) -> list[tuple[bytes, bytes]]:
        """Response headers, none unless the setting ``headers`` is on."""
        if not self.settings.headers or (annotation := annotate(ledgers, self.accounting_of(ledgers))) is None:
            return []
        measured = annotation.energy_joules
        joules = annotation.estimate.energy_joules if measured is None else measured.value
        headers = [(b"x-carbon-energy-joules", f"{joules:.6g}".encode())]
        if annotation.carbon_grams is not None and (grams := annotation.carbon_grams.operational) is not None:
            headers.append((b"x-carbon-gco2e", f"{grams:.6g}".encode()))
        return headers

    def remember(self, response_id: str, annotation_json: str, ledgers: Sequence[RequestLedger] = ()) -> None:
        """Keep a finished request for ``GET /carbon/requests/{id}``; a log that is locked or full costs that alone."""
        self._late.answered(response_id, ledgers)
        try:
            self.log.remember(response_id, annotation_json)
        except sqlite3.Error as error:
            self.failed("remember", error)

    def _measured(self, ledger: RequestLedger) -> None:
        """Count a measured figure that no longer changes; a part that is not measured leaves it out."""
        found = figure(ledger.ledger, ledger.metered)
        if found.coverage_ratio < 1.0:
            return
        tokens = max(0, ledger.ledger.useful_tokens)
        try:
            accounting = self.accounting_of([ledger])
            self.recorder.request_measured(ledger.ledger.engine, found.energy_joules, tokens, accounting)
        except Exception as error:
            self.failed("request_measured", error)  # costs the histogram, not the annotation

    def _rewrite(self, response_id: str, ledgers: Sequence[RequestLedger]) -> None:
        if (text := self.describe(ledgers)) is not None:
            self.remember(response_id, text)

    async def find(self, response_id: str) -> str | None:
        """The annotation of a finished request, final as soon as the meter has covered its last step, or None."""
        if response_id in self._late:
            await self.snapshots()
        return self.log.find(response_id)

    def failed(self, where: str, error: BaseException) -> None:
        """A failure in the middleware: it concerns one response, so nothing is switched off."""
        self.guard.failed(where, error, switch_off=False)

    def started(self) -> None:
        """Begin the periodic pull and the refresh of intensities, once."""
        if self._pull is None and self.engine_client() is not None:
            loop = asyncio.get_running_loop()
            self._pull = loop.create_task(self._pull_forever())
            self._grid = loop.create_task(self.accountant.grid.run())

    def accounting_of(self, ledgers: Sequence[RequestLedger]) -> Accounting:
        """At the intensity of the time in which these requests ran; of now, for one that still runs."""
        begin = min(ledger.begin_epoch_seconds for ledger in ledgers)
        ends = [ledger.end_epoch_seconds for ledger in ledgers]
        return self.accountant.over(begin, max(ends) if all(ends) else max(begin, self.accountant.clock()))

    async def snapshots(self) -> list[dict[str, Any]]:
        """The cumulative figures of every engine that has a hook."""
        client = self.engine_client()
        if client is None:
            return []
        counted, self._counted = self._counted, {}
        question = json.dumps({"counted": counted, "awaited": self._late.request_ids})
        try:
            answers = await compat.call_engines(client, "llmco2_snapshot", question)
        except BaseException:  # a scrape that ran out of time is cancelled
            self._counted = {**counted, **self._counted}
            raise
        found = [snapshot for answer in answers if (snapshot := json.loads(answer))]
        for snapshot in found:
            self._late.settle(snapshot.pop("settled", {}))
        self._count_host(found)
        return found

    def _count_host(self, snapshots: Sequence[dict[str, Any]]) -> None:
        """What the host took beside the devices; every engine of a host reads the same counter."""
        if hosts := [host for snapshot in snapshots if "joules" in (host := snapshot.get("host", {}))]:
            metered = [snapshot["metered"] for snapshot in snapshots if "metered" in snapshot]
            joules, blind = (sum(m[key] for m in metered) for key in ("metered_joules", "unmetered_seconds"))
            self._host.see(max(host["joules"] for host in hosts), joules, blind, time.monotonic())
            node = self.accountant.node
            self.accountant.node = node.with_host_measured(self._host.ratio, hosts[0]["source"])

    async def refresh_metrics(self) -> None:
        """Pull now, before a scrape."""
        if self.engine_client() is not None:
            await self._record()

    async def switch(self, on: bool) -> dict[str, Any] | None:
        """Turn the engines' hooks off or on; None where the setting ``switch`` does not allow it."""
        client = self.engine_client()
        if not self.settings.switch or client is None:
            return None
        return {"on": on, "engines": await compat.call_engines(client, "llmco2_switch", on)}

    async def status(self) -> dict[str, Any]:
        """``GET /carbon``: version, zone, meter, predictor, self-check, engines."""
        engines = await self.snapshots()
        first = engines[0]["provenance"] if engines else {}
        accounting = self.accountant.now()
        return {
            "version": llmco2_vllm.__version__,
            "vllm_version": self.host_version,
            "model": self.model_name,
            "basis": "measured" if any(e.get("metered", {}).get("windows") for e in engines) else "predicted",
            **first,
            "zone": self.settings.zone if accounting.intensity is None else accounting.intensity.zone,
            **intensity_documents(accounting),
            "grid": self.accountant.grid.state(),
            "pue": accounting.node.pue,
            "pue_source": accounting.node.pue_source,
            "node_overhead": node_document(accounting),
            "embodied": None if accounting.hardware is None else asdict(accounting.hardware),
            "utilisation_ratio": accounting.utilisation_ratio,
            "front_end": {"active": self.guard.active, "failures": dict(self.guard.failures)},
            "self_check": self.self_check,
            "engines": [{**e, "failures": {where: n for where, n in e["failures"].items() if n}} for e in engines],
        }

    def live_page(self) -> Page | None:
        """``GET /carbon/live``: the page; None without the setting ``live``."""
        return live.page() if self.settings.live else None

    async def live(self) -> dict[str, Any] | None:
        """``GET /carbon/live.json``: the figures of now; None without the setting ``live``."""
        if not self.settings.live:
            return None
        status = await self.status()
        try:
            finished = self.log.last(live.REQUESTS_SHOWN)
        except sqlite3.Error as error:
            finished = None
            self.failed("last", error)
        return live.document(status, self.accountant.now(), finished, self.accountant.clock())

    @property
    def recorder(self) -> Any:
        """The Prometheus recorder, made on first use: vLLM unregisters what is there before its own."""
        if self._recorder is None:
            from llmco2_vllm.telemetry.metrics import Identity, Recorder

            self._recorder = Recorder(Identity(self.model_name, llmco2_vllm.__version__, self.host_version))
        return self._recorder

    async def _record(self) -> None:
        accountant, recorder = self.accountant, self.recorder
        recorder.failures("front_end", self.guard.counts)
        snapshots = await self.snapshots()
        # What the counters gained since the last pull was used in that time.
        now = accountant.clock()
        accounting = accountant.over(min(self._pulled_epoch_seconds or now, now), now)
        self._pulled_epoch_seconds = now
        recorder.intensities(accounting)
        if compat.client_index(self.engine_client()) != 0:
            return  # another API server counts the engine-wide figures
        for snapshot in snapshots:
            recorder.engine(snapshot, accounting, now)

    async def _pull_forever(self) -> None:
        while True:
            try:
                await self._record()
            except Exception as error:
                self.failed("pull", error)
            await asyncio.sleep(PULL_SECONDS)


def _request_log_path() -> str:
    # Several API servers share one file, in the folder their metrics already share. Its name must
    # not end in .db: prometheus_client reads every such file there.
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return ":memory:" if shared is None else str(Path(shared) / "llmco2-requests.sqlite")
