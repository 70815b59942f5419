"""The front end: ledgers out of engine outputs, onto request outputs, responses and metrics.

Lives in every process with an output processor: API servers, and the caller of ``LLM``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import llmco2_vllm
from llmco2_vllm.config import Settings
from llmco2_vllm.core.ledgers import DecodeSums
from llmco2_vllm.telemetry.accounting import Accounting, HostShare
from llmco2_vllm.telemetry.annotation import Annotation, annotate, intensity_document
from llmco2_vllm.telemetry.ledger import KEY, SUMS_KEY, RequestLedger, decode_sums
from llmco2_vllm.telemetry.metered import METERED_KEY, decode_metered
from llmco2_vllm.telemetry.requests import RequestLog
from llmco2_vllm.vllm_plugin import compat
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

    def __init__(self, settings: Settings, model_name: str) -> None:
        self.settings = settings
        self.model_name = model_name
        self.host_version = compat.host_version()
        self.guard = Guard("front end", self.host_version)
        self.accounting = Accounting.from_values(
            settings.zone, settings.intensity, settings.pue, settings.node_overhead, settings.auxiliary
        )
        self.log = RequestLog(_request_log_path())
        self.self_check = compat.self_check()
        self.engine_client: Callable[[], Any] = lambda: None
        self._counted: dict[str, float] = {}
        self._late = LateResults(self._rewrite)
        self._host = HostShare()
        # Running sums by engine, and the requests whose ledgers follow them.
        self._sums: dict[int, DecodeSums] = {}
        self._following: dict[str, RequestLedger] = {}
        self._recorder: Any = None
        self._pull: asyncio.Task[None] | None = None

    # -- what the wrappers call -----------------------------------------------------------

    def track(self, processor: Any, request: Any) -> None:
        """Open the ledger of a request; sequences of one request share their parent's list."""
        state = processor.request_states.get(request.request_id)
        if state is None or hasattr(state, "llmco2_ledger"):
            return  # gone already, or a further turn of a session
        parent = state.parent_req
        ledger = RequestLedger()
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
            self._late.finished(request_id, ledger)
            try:
                self.recorder.request_finished(engine, joules)
            except Exception as error:
                self.failed("request_finished", error)  # costs the histogram, not the annotation

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
        return RequestCarbon(ledgers, self.accounting) if ledgers else None

    # -- what the middleware calls --------------------------------------------------------

    def open_call(self) -> list[RequestLedger]:
        """A fresh list that the engine requests of this HTTP call will be added to."""
        call: list[RequestLedger] = []
        _CALL.set(call)
        return call

    def describe(self, ledgers: Sequence[RequestLedger]) -> str | None:
        """The annotation of a call as JSON text, or None where there is nothing to say."""
        annotation: Annotation | None = annotate(ledgers, self.accounting)
        return None if annotation is None else annotation.json_text()

    def header_values(self, ledgers: Sequence[RequestLedger]) -> list[tuple[bytes, bytes]]:
        """Response headers, none unless the setting ``headers`` is on."""
        if not self.settings.headers or (annotation := annotate(ledgers, self.accounting)) is None:
            return []
        measured = annotation.energy_joules
        joules = annotation.estimate.energy_joules if measured is None else measured.value
        grams = annotation.carbon_grams.operational
        return [
            (b"x-carbon-energy-joules", f"{joules:.6g}".encode()),
            (b"x-carbon-gco2e", f"{grams:.6g}".encode()),
        ]

    def remember(self, response_id: str, annotation_json: str, ledgers: Sequence[RequestLedger] = ()) -> None:
        """Keep a finished request for ``GET /carbon/requests/{id}``; a log that is locked or full costs that alone."""
        self._late.answered(response_id, ledgers)
        try:
            self.log.remember(response_id, annotation_json)
        except sqlite3.Error as error:
            self.failed("remember", error)

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
        """Begin the periodic pull, once."""
        if self._pull is None and self.engine_client() is not None:
            self._pull = asyncio.get_running_loop().create_task(self._pull_forever())

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
        if hosts := [snapshot["host"] for snapshot in snapshots if "host" in snapshot]:
            metered = [snapshot["metered"] for snapshot in snapshots if "metered" in snapshot]
            joules, blind = (sum(m[key] for m in metered) for key in ("metered_joules", "unmetered_seconds"))
            self._host.see(max(host["joules"] for host in hosts), joules, blind)
            self.accounting = self.accounting.with_host_measured(self._host.ratio, hosts[0]["source"])

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
        return {
            "version": llmco2_vllm.__version__,
            "vllm_version": self.host_version,
            "model": self.model_name,
            "basis": "measured" if any(e.get("metered", {}).get("windows") for e in engines) else "predicted",
            **first,
            "zone": self.settings.zone,
            "intensity": intensity_document(self.accounting),
            "pue": self.settings.pue,
            "node_overhead": self.accounting.node_overhead_ratio,
            "node_overhead_source": self.accounting.node_overhead_source,
            "auxiliary": self.settings.auxiliary,
            "front_end": {"active": self.guard.active, "failures": dict(self.guard.failures)},
            "self_check": self.self_check,
            "engines": engines,
        }

    @property
    def recorder(self) -> Any:
        """The Prometheus recorder, made on first use: vLLM unregisters what is there before its own."""
        if self._recorder is None:
            from llmco2_vllm.telemetry.metrics import Identity, Recorder

            self._recorder = Recorder(Identity(self.model_name, llmco2_vllm.__version__, self.host_version))
        return self._recorder

    async def _record(self) -> None:
        accounting, recorder = self.accounting, self.recorder
        recorder.intensity(accounting.grams_per_kwh, accounting.zone or "", accounting.source, accounting.method)
        recorder.failures("front_end", self.guard.failures)
        snapshots = await self.snapshots()
        if compat.client_index(self.engine_client()) != 0:
            return  # another API server counts the engine-wide figures
        for snapshot in snapshots:
            recorder.engine(snapshot, accounting.operational_grams(1.0))

    async def _pull_forever(self) -> None:
        while True:
            try:
                await self._record()
            except Exception as error:
                self.failed("pull", error)
            await asyncio.sleep(PULL_SECONDS)


_front_end: CarbonFrontEnd | None = None


def front_end() -> CarbonFrontEnd:
    """This process's front end. Raises RuntimeError where none was enabled."""
    if _front_end is None:
        raise RuntimeError("the carbon meter is not enabled in this process")
    return _front_end


def enable(settings: Settings, vllm_config: Any) -> None:
    """Make this process a front end and wrap the host's output path, once."""
    global _front_end
    names = vllm_config.model_config.served_model_name
    _front_end = CarbonFrontEnd(settings, names if isinstance(names, str) else names[0])
    compat.warn_missing(_front_end.self_check)
    if _front_end.accounting.estimated:
        logger.warning(
            "llmco2: no carbon intensity is set; grams use the world average of %g g/kWh and say so "
            "(--carbon-config.intensity)",
            _front_end.accounting.grams_per_kwh,
        )
    compat.wrap("async_llm", _async_llm_init)
    compat.wrap("add_request", _add_request)
    compat.wrap("process_outputs", _process_outputs)
    compat.wrap("abort_requests", _abort_requests)
    compat.wrap("new_request_output", _new_request_output)
    for key in ("embedding_output", "classification_output", "scoring_output"):
        compat.wrap(key, _from_base)


def _request_log_path() -> str:
    # Several API servers share one file, in the folder their metrics already share. Its name must
    # not end in .db: prometheus_client reads every such file there.
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return ":memory:" if shared is None else str(Path(shared) / "llmco2-requests.sqlite")


def _async_llm_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.engine_client = weakref.ref(self)

    return __init__


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("add_request", _front_end.track, self, request)
        return result

    return add_request


def _process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        front = _front_end
        if front is None:
            return original(self, engine_core_outputs, *args, **kwargs)
        # Before the original: generators may read the ledger right after it.
        received = front.guard.call("receive", front.receive, self, engine_core_outputs)
        result = original(self, engine_core_outputs, *args, **kwargs)
        ended = getattr(result, "reqs_to_abort", ())
        if received or ended:
            front.guard.call("settle", front.settle, self, received or (), ended)
        return result

    return process_outputs


def _abort_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        request_ids = original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("abort_requests", _front_end.abandoned, request_ids)
        return request_ids

    return abort_requests


def _from_base(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_base(request_output: Any, *args: Any, **kwargs: Any) -> Any:
        # The offline pooling calls rebuild their outputs.
        output = original(request_output, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("from_base", _carry_over, request_output, output)
        return output

    return from_base


def _carry_over(request_output: Any, output: Any) -> None:
    if (carbon := getattr(request_output, "carbon", None)) is not None:
        output.carbon = carbon


def _new_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if _front_end is not None:
            _front_end.guard.call("request_output", _attach_view, _front_end, self, output)
        return output

    return _new_request_output


def _attach_view(front: CarbonFrontEnd, state: Any, output: Any) -> None:
    output.carbon = front.carbon_of(state)
