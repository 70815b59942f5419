"""Drives step mixes on a running server and reads ``GET /carbon``: what was predicted, and what was observed.

Requests are random token ids, so that no prompt is found in the prefix cache and no text is made up; what the server
answers is thrown away. Which requests share a step is the server's choice, but its own prediction is of the steps that
really ran: that is what the observation is held against.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from llmco2_vllm.predictor.deployment import Point
from llmco2_vllm.training.traffic import Candidate

T = TypeVar("T")
Prompts = list[list[int]]
# A prefill step is short: so often it is measured, after once unmeasured for what is done at the first of a shape.
PREFILL_REPEATS = 3
# Times that prefill joins the decoding requests of a mixed step.
PREFILL_WAVES = 4
REQUEST_SECONDS = 900.0
# Until the engine has let go of a request that was answered; a meter's last window has closed.
_SETTLE_SECONDS, _METER_SECONDS = 3.0, 5.0
_POLL_SECONDS, _IDLE_POLL_SECONDS, _METER_POLL_SECONDS = 0.005, 0.05, 0.5
_SUMS = (
    *("steps", "predicted_seconds", "step_seconds", "prefill_joules", "decode_joules", "prefill_tokens"),
    *("decode_tokens", "finished_requests", "aborted_requests", "running_requests", "open_tickets"),
)


class DriverError(RuntimeError):
    """The server cannot be measured; the message is one line."""


class Totals(NamedTuple):
    """Cumulative figures of all engines; ``measured_joules`` of both phases, None where no engine has a meter."""

    steps: int
    predicted_seconds: float
    step_seconds: float
    prefill_joules: float
    decode_joules: float
    prefill_tokens: int
    decode_tokens: int
    finished_requests: int
    aborted_requests: int
    running_requests: int
    open_tickets: int
    measured_joules: float | None = None

    @classmethod
    def of(cls, engines: Sequence[dict[str, Any]]) -> Totals:
        """Summed over ``engines`` of ``GET /carbon``; unknown as soon as one engine does not know it."""
        sums = {name: sum(engine[name] for engine in engines) for name in _SUMS}
        told = [engine.get("metered", {}).get("attributed_joules") for engine in engines]
        known = [float(joules) for joules in told if joules is not None]
        return cls(**sums, measured_joules=sum(known) if known and len(known) == len(told) else None)

    def minus(self, other: Totals) -> Totals:
        """What came since ``other``; running requests and open tickets are those of now."""
        change = {name: getattr(self, name) - getattr(other, name) for name in _SUMS[:-2]}
        known = self.measured_joules is not None and other.measured_joules is not None
        joules = (self.measured_joules or 0.0) - (other.measured_joules or 0.0) if known else None
        return Totals(
            **change, running_requests=self.running_requests, open_tickets=self.open_tickets, measured_joules=joules
        )


@dataclass(frozen=True)
class Driving:
    """How to drive. vocab: token ids are drawn from its lower half, where no family keeps placeholders for images.

    decode_steps: per decoding request. busy_ok: go on although other requests run.
    """

    vocab: int
    max_model_len: int
    max_num_batched_tokens: int
    decode_steps: int = 64
    busy_ok: bool = False
    seed: int = 0


class LiveServer:
    """A vLLM server with ``--carbon`` at ``url``. Every method raises DriverError in one line."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._runner = asyncio.Runner()
        # A proxy named by the environment would not find a server of this host.
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(REQUEST_SECONDS, connect=10.0), trust_env=False
        )
        self.model = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do asynchronous ``work`` with this server."""
        return self._runner.run(work)

    def card(self) -> dict[str, Any]:
        """The first model of ``GET /v1/models``: id, root, max_model_len."""
        card: dict[str, Any] = self.run(self.answer("GET", "/v1/models")).json()["data"][0]
        self.model = card["id"]
        return card

    def status(self) -> dict[str, Any]:
        """``GET /carbon``, of a server whose hook is on in every engine."""
        status: dict[str, Any] = self.run(self.answer("GET", "/carbon")).json()
        engines = status.get("engines") or []
        if not engines or not all(engine["active"] for engine in engines):
            raise DriverError(f"{self.url}/carbon: no engine predicts, or its hook is off; see the server's log")
        return status

    def kv_capacity_tokens(self) -> int | None:
        """Size of one engine's KV cache, from vLLM's ``cache_config_info`` in ``/metrics``; None when not told."""
        text = self.run(self.answer("GET", "/metrics")).text
        for family in text_string_to_metric_families(text):
            if family.name == "vllm:cache_config_info":
                labels = family.samples[0].labels
                blocks = (labels.get("num_gpu_blocks", ""), labels.get("block_size", ""))
                if labels.get("kv_cache_size_tokens", "").isdigit():
                    return int(labels["kv_cache_size_tokens"])
                return int(blocks[0]) * int(blocks[1]) if all(map(str.isdigit, blocks)) else None
        return None

    async def totals(self) -> Totals:
        """The cumulative figures now."""
        answer = await self.answer("GET", "/carbon")
        return Totals.of(answer.json()["engines"])

    async def complete(self, prompts: Prompts, max_tokens: int) -> None:
        """Have every prompt continued by exactly ``max_tokens`` tokens, all at once, and drop the answer."""
        body = {"model": self.model, "prompt": prompts, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        await self.answer("POST", "/v1/completions", body)

    async def answer(self, method: str, path: str, body: object = None) -> httpx.Response:
        """The response to one request, if its status is 2xx."""
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise DriverError(f"{self.url}{path}: {type(error).__name__} {error}".rstrip()) from None
        if response.is_success:
            return response
        hints = {401: "; give --api-key", 404: "; is the server started with --carbon?"}
        raise DriverError(f"{self.url}{path}: status {response.status_code}{hints.get(response.status_code, '')}")


class Driver:
    """Measures step mixes on a server that is otherwise idle."""

    def __init__(self, server: LiveServer, driving: Driving) -> None:
        self._server, self._driving = server, driving
        self._draw = np.random.default_rng(driving.seed)
        self._sent = 0

    def measure(self, candidate: Candidate) -> Point | None:
        """Drive the mix once. None when other requests came between, or it was over before it could be looked at.

        Raises DriverError when the server does not answer, or other requests run.
        """
        return self._server.run(self._measure(candidate))

    def warm_up(self) -> None:
        """One small request: what is done at the first of all is not measured. Raises as :meth:`measure`."""
        self._server.run(self._warm_up())

    async def _warm_up(self) -> None:
        await self._idle()
        await self._complete(self._prompts(1, 8), 4)

    async def _measure(self, candidate: Candidate) -> Point | None:
        sequences = candidate.prefill_sequences
        rows: Prompts = []
        if not candidate.decode_sequences:
            await self._complete(self._prompts(sequences, candidate.prefill_tokens), 1)
            rows = self._prompts(sequences * PREFILL_REPEATS, candidate.context_tokens + candidate.prefill_tokens)
            if candidate.context_tokens:  # the prefix goes into the cache first
                await self._complete([row[: candidate.context_tokens] for row in rows], 1)
        before, sent = await self._idle(), self._sent
        begin = await self._decode(candidate, before) if candidate.decode_sequences else before
        for first in range(0, len(rows), max(1, sequences)):
            await self._complete(rows[first : first + sequences], 1)
        after = await self._idle()
        whole = after.minus(before)
        alone = whole.finished_requests + whole.aborted_requests == self._sent - sent
        if begin is None or not (alone or self._driving.busy_ok):
            return None
        return _point(candidate, after.minus(begin), begin.open_tickets, whole)

    async def _decode(self, candidate: Candidate, before: Totals) -> Totals | None:
        """Run the decoding requests, with prefill joining them; the totals when all of them decoded.

        Their own prefill is thus subtracted where it ends, and its noise is not in the difference.
        """
        waves, each, sequences, context = candidate
        room = self._driving.max_model_len - 1
        steps = max(1, min(self._driving.decode_steps, room - 1))
        prompt = max(1, min(context - steps // 2, room - steps))
        # The first decodes while the last still waits for its prefill.
        late = sequences * prompt // self._driving.max_num_batched_tokens
        run = asyncio.create_task(
            self._complete(self._prompts(sequences, prompt), min(steps + late, room - prompt) + 1)
        )
        try:
            begin = None
            while begin is None and not run.done():
                now = await self._server.totals()
                new = now.minus(before)
                if new.prefill_tokens >= sequences * prompt and new.decode_tokens >= 2 * sequences:
                    begin = now
                else:
                    await asyncio.sleep(_POLL_SECONDS)
            for _ in range(PREFILL_WAVES if waves else 0):
                if not run.done():
                    await self._complete(self._prompts(waves, each), 1)
            await run
        finally:
            run.cancel()
        return begin

    async def _complete(self, prompts: Prompts, max_tokens: int) -> None:
        self._sent += len(prompts)
        await self._server.complete(prompts, max_tokens)

    def _prompts(self, count: int, length: int) -> Prompts:
        rows: Prompts = self._draw.integers(max(1, self._driving.vocab // 2), size=(count, length)).tolist()
        return rows

    async def _idle(self) -> Totals:
        """The totals once nothing runs and, with a meter, its last window has closed."""
        now = await self._server.totals()
        # Only what we sent ourselves is worth waiting for.
        patience = 0.0 if self._driving.busy_ok or not self._sent else _SETTLE_SECONDS
        for _ in range(round(patience / _IDLE_POLL_SECONDS)):
            if not (now.running_requests or now.open_tickets):
                break
            await asyncio.sleep(_IDLE_POLL_SECONDS)
            now = await self._server.totals()
        if now.running_requests and not self._driving.busy_ok:
            raise DriverError(
                f"{self._server.url}: {now.running_requests} other requests are running; "
                "calibrate on an idle server, or give --busy-ok"
            )
        last = None
        for _ in range(round(_METER_SECONDS / _METER_POLL_SECONDS)):
            if now.measured_joules == last:
                break
            last = now.measured_joules
            await asyncio.sleep(_METER_POLL_SECONDS)
            now = await self._server.totals()
        return now


def _point(candidate: Candidate, steps: Totals, open_tickets: int, whole: Totals) -> Point | None:
    """What came of a mix: ``steps`` are those that stand for it, ``open_tickets`` of them were priced before.

    The predicted seconds are shared over the phases as the predicted joules are: exact where one phase runs alone, and
    elsewhere as far as all steps are predicted to draw the same power.
    """
    joules = steps.prefill_joules + steps.decode_joules
    if steps.steps <= 0 or min(joules, steps.predicted_seconds, steps.step_seconds) <= 0:
        return None
    seconds = steps.predicted_seconds * (steps.steps + open_tickets) / steps.steps
    measured = whole.measured_joules
    return Point(
        **candidate._asdict(),
        steps=steps.steps + open_tickets,
        predicted_prefill_seconds=seconds * steps.prefill_joules / joules,
        predicted_decode_seconds=seconds * steps.decode_joules / joules,
        observed_seconds=steps.step_seconds,
        predicted_prefill_joules=whole.prefill_joules,
        predicted_decode_joules=whole.decode_joules,
        observed_joules=measured if measured else None,
    )
