"""Documents of ``/carbon/live.json`` out of made statuses, and a server of our middleware that serves them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn

from llmco2_vllm.core.embodied import Hardware, Lifetimes
from llmco2_vllm.core.intensity import Intensity
from llmco2_vllm.telemetry.accounting import Accounting, Node
from llmco2_vllm.vllm_plugin.live import document
from llmco2_vllm.vllm_plugin.middleware import CarbonMiddleware
from tests.vllm_plugin.asgi import FakeFrontEnd, replaying

NOON = 1_790_000_000.0
STARTED = NOON - 5400.0
GRID = Intensity(
    56.0, "FR", "average", "location", "electricity-maps", False, NOON - 600, None, NOON - 420, "lifecycle"
)
HARDWARE = Hardware("product", 0.002, Lifetimes(), "line", ("host",))
ACCOUNTING = Accounting(GRID, None, 420.0, Node(pue=1.2, pue_source="settings"), HARDWARE, 0.6)


def engine(seconds: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A snapshot of an engine at 210 W predicted and 220 W measured for its requests, ``seconds`` after noon."""
    predicted, measured = 1e6 + 210.0 * seconds, 1.04e6 + 220.0 * seconds
    metered = {
        "prefill_joules": 0.2 * measured,
        "decode_joules": 0.8 * measured,
        "idle_joules": 3e5,
        "sleeping_joules": 0.0,
        "unattributed_joules": -120.0,
        "residual_joules": 2e-10,
        "estimated_joules": 0.01 * measured,
        "aborted_joules": 900.0,
        "metered_joules": measured + 3e5 - 120.0,
        "windows": 40_000,
        "doubtful_windows": 12,
        "idle_power_watts": {"awake": 75.0},
        "bias_ratio": {"prefill": 0.031, "decode": -0.012},
    }
    device = {"source": "counter", "power_watts": 312.5, "faults": {}}
    return {
        "engine": 0,
        "started_seconds": STARTED,
        "step_seconds": 4000.0,
        "active": True,
        "failures": {},
        "running_requests": 3,
        "prefill_joules": 0.2 * predicted,
        "decode_joules": 0.8 * predicted,
        "aborted_joules": 800.0,
        "prefill_tokens": 900_000 + round(300 * seconds),
        "decode_tokens": 400_000 + round(120 * seconds),
        "cached_tokens": 50_000,
        "metered": metered,
        "meter": {"devices": [device]},
    } | changes


def unmetered(**changes: Any) -> dict[str, Any]:
    """The same without a meter."""
    return {key: value for key, value in engine(**changes).items() if key not in ("metered", "meter")}


def status(*engines: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What ``GET /carbon`` says of these engines, as far as the document needs it."""
    intensity = {"grams_per_kwh": 56.0, "zone": "FR", "method": "average", "basis": "location"}
    return {
        "version": "0.1.0",
        "vllm_version": "0.32.0",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "meter": "nvml",
        "predictor": "gnn/2026.11-h100-sxm",
        "front_end": {"active": True, "failures": {}},
        "intensity": {**intensity, "source": "electricity-maps", "estimated": False, "age_seconds": 420.0},
        "intensity_market": None,
        "pue": 1.2,
        "pue_source": "settings",
        "engines": list(engines),
    } | changes


def annotation(number: int = 0, basis: str = "measured") -> str:
    """An annotation; ``basis`` as in it."""
    predicted = 40.0 + 11.0 * number
    found: dict[str, Any] = {
        "basis": basis,
        "estimate": {"energy_joules": predicted},
        "tokens": {"prefill": 512 + 37 * number, "cached": 64 * (number % 3), "recomputed": 0, "decode": 128},
        "in_distribution": True,
    }
    joules = predicted
    if basis != "predicted":
        joules = predicted * 1.03
        found["energy_joules"] = {"value": joules}
        found["coverage_ratio"] = 1.0 if basis == "measured" else 0.97
    found["carbon_grams"] = {"operational": joules * 56 * 1.2 / 3.6e6, "embodied": 0.0011}
    return json.dumps(found)


def finished(count: int) -> list[tuple[float, str]]:
    """The last requests of a log, newest first."""
    bases = ("mixed", "measured", "measured", "predicted")
    return [(NOON - 7.0 * n, annotation(n, bases[min(n, 3)] if n < 4 else "measured")) for n in range(count)]


class Watched(FakeFrontEnd):
    """A front end whose figures go on by ``step_seconds`` with each look."""

    def __init__(self, metered: bool = True, requests: int = 20) -> None:
        super().__init__()
        self.metered, self.requests, self.looks, self.step_seconds = metered, requests, 0, 2.0
        self.accounting: Accounting = ACCOUNTING
        self.changes: dict[str, Any] = {}
        self.begin = NOON

    async def live(self) -> dict[str, Any] | None:
        self._enter("live")
        seconds = self.step_seconds * self.looks
        self.looks += 1
        made = engine(seconds) if self.metered else unmetered(seconds=seconds)
        made |= {"started_seconds": self.begin - 5400.0}
        told = {} if self.metered else {"meter": "none", "meter_reason": "no NVIDIA driver"}
        return document(
            status(made, **{**told, **self.changes}), self.accounting, finished(self.requests), self.begin + seconds
        )


class Site:
    """A server of ``front_end`` on a port of its own, that can be taken away and brought back."""

    def __init__(self, front_end: FakeFrontEnd, *keys: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/carbon/live"
        self.front_end = front_end
        self._state = SimpleNamespace(args=SimpleNamespace(api_key=list(keys) or None))
        self._server: uvicorn.Server | None = None

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["app"] = SimpleNamespace(state=self._state)
            await CarbonMiddleware(replaying([]), self.front_end)(scope, receive, send)

    def start(self) -> None:
        """Answer."""
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, "127.0.0.1", self.port, interface="asgi3", lifespan="off", log_level="warning")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)

    def stop(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join()
            self._server = None


@contextmanager
def site(front_end: FakeFrontEnd, *keys: str) -> Iterator[Site]:
    """A running :class:`Site`."""
    served = Site(front_end, *keys)
    served.start()
    try:
        yield served
    finally:
        served.stop()
