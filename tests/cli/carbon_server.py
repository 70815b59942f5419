"""Answers like a vLLM server with the meter, on a simulated engine: its steps take and draw what the test says.

The engine's time is counted, not waited for. Steps are priced by ConstantPredictor, at the same power all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from typing import Any

from llmco2_vllm.core.batch import BatchShape
from llmco2_vllm.testing import ConstantPredictor
from llmco2_vllm.training.traffic import Candidate

# Decode steps that a long request takes before it waits until somebody has looked.
FIRST_STEPS = 3
POWER_WATTS = 100.0


@dataclass
class Engine:
    """Ratios of observed to predicted by phase; no ``energy`` is no meter. ``running``: requests of others."""

    time: tuple[float, float] = (1.0, 1.0)
    energy: tuple[float, float] | None = None
    predictor: str = "constant/1-h100-sxm"
    running: int = 0
    active: bool = True
    root: str = ""
    key: str = ""
    # Requests of others that end beside each of ours.
    strangers: int = 0
    # Prompts of ours after which requests of others come and stay.
    quiet_prompts: float = float("inf")
    prompts: list[list[int]] = field(default_factory=list)
    looked: Condition = field(default_factory=Condition)
    waiting: int = 0

    def __post_init__(self) -> None:
        names = ("prefill_joules", "decode_joules", "predicted_seconds", "step_seconds")
        counts = ("steps", "prefill_tokens", "decode_tokens", "finished_requests", "aborted_requests", "open_tickets")
        self.totals: dict[str, float] = {**dict.fromkeys(counts, 0), **dict.fromkeys(names, 0.0)}
        if self.energy is not None:
            self.totals["attributed_joules"] = 0.0

    def step(self, batch: BatchShape) -> None:
        """One step, at once."""
        estimate, totals = ConstantPredictor().estimate(batch), self.totals
        joules = (estimate.prefill_joules, estimate.decode_joules)
        totals["steps"] += 1
        totals["predicted_seconds"] += sum(joules) / POWER_WATTS
        totals["step_seconds"] += (joules[0] * self.time[0] + joules[1] * self.time[1]) / POWER_WATTS
        for number, phase in enumerate(("prefill", "decode")):
            totals[f"{phase}_joules"] += joules[number]
            totals[f"{phase}_tokens"] += batch[number].tokens
            if self.energy is not None:
                totals["attributed_joules"] += joules[number] * self.energy[number]

    def complete(self, prompts: Sequence[list[int]], tokens: int) -> None:
        """Prefill all prompts in one step, then decode; a long run waits on its way until it was looked at."""
        with self.looked:
            self.prompts += prompts
            count, length = len(prompts), len(prompts[0])
            self.step(Candidate(count, length, 0, 0).batch)
            for number in range(tokens - 1):
                if number == FIRST_STEPS:
                    self.waiting += 1
                    self.looked.wait_for(lambda: self.waiting == 0)
                self.step(Candidate(0, 0, count, length + number).batch)
            self.totals["finished_requests"] += count + self.strangers
            self.running += len(self.prompts) > self.quiet_prompts

    def status(self) -> dict[str, Any]:
        """``GET /carbon``; who waits to be looked at goes on."""
        with self.looked:
            engine = {"active": self.active, "running_requests": self.running + self.waiting, **self.totals}
            if self.energy is not None:
                engine["metered"] = {"attributed_joules": engine.pop("attributed_joules")}
            self.waiting = 0
            self.looked.notify_all()
        return {
            "vllm_version": "0.0",
            "predictor": self.predictor,
            "meter": "none",
            "meter_reason": "simulated",
            "engines": [engine],
        }


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of a server in front of ``engine``."""

    class Carbon(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card = {"id": "m", "root": engine.root, "max_model_len": 512}
            metrics = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0\n'
            answers = {
                "/v1/models": lambda: json.dumps({"data": [card]}),
                "/metrics": lambda: metrics,
                "/carbon": lambda: json.dumps(engine.status()),
            }
            if engine.key and self.headers["authorization"] != f"Bearer {engine.key}":
                self._send(401, "{}")
            elif self.path in answers:
                self._send(200, answers[self.path]())
            else:
                self._send(404, "{}")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert asked["ignore_eos"] and asked["model"] == "m"
            engine.complete(asked["prompt"], asked["max_tokens"])
            self._send(200, "{}")

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Carbon)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
