"""Operating points of an offline engine with the plugin on: the child process of benchmarks/gpu_record.py.

Weights are random (``load_format=dummy``) and prompts are random token ids: shapes decide the time and most of the
energy; how far the power of a trained model's values is from that of these is not known (docs/h200.md).
The plugin keeps the windows with their steps in ``samples.sqlite``; here are written, a row as soon as it is known,

- ``points.csv``: when each repetition of a point ran, on the clock of the edges; the first one is the warm-up.
- ``requests.csv``: what ``RequestOutput.carbon`` says of each request after the warm-up, at its ``response`` (when
  its last windows are still open) and when it is ``final``. Empty: not known.
- ``engine.json``: versions, settings, and what the meter and its ledger say at the end.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, Self

import numpy as np

from benchmarks.gpu_provenance import SIMULATED
from benchmarks.meter_resolution import simulated_load

POINTS_FILE, REQUESTS_FILE, ENGINE_FILE = "points.csv", "requests.csv", "engine.json"
# A request longer than the last ticks of the counter before it ends: its last windows are closed and kept.
LAST_WINDOWS_SECONDS = 2.5
BETWEEN_SECONDS = 1.0
FIRST_TOKEN = 10
# How a line begins that tells of progress, among those of vLLM.
SAID = "point "
TINY_POSITIONS = 1024
POINT_COLUMNS = ("batch", "prompt", "output", "repetition", "begin_seconds", "end_seconds", "begin_epoch_seconds")
REQUEST_COLUMNS = (
    *("batch", "prompt", "output", "repetition", "request", "moment", "basis", "coverage_ratio", "in_distribution"),
    *(f"predicted_{part}" for part in ("joules", "prefill_joules", "decode_joules", "lower_joules", "upper_joules")),
    *(f"measured_{part}" for part in ("joules", "prefill_joules", "decode_joules", "lower_joules", "upper_joules")),
)


class Point(NamedTuple):
    """So many requests at once, tokens of each prompt, tokens that each gets."""

    batch: int
    prompt: int
    output: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``B,P,D``. Raises ValueError that says so."""
        try:
            point = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            point = None
        if point is None or min(point) < 1:
            raise ValueError(f"{text!r} is not possible; allowed: batch,prompt,output as whole numbers, 1 or more")
        return point

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.batch} x {self.prompt} + {self.output}"


# Prefill alone, decode alone from one request to many, and both.
POINTS = tuple(
    Point(*point)
    for point in (
        *((1, 2048, 1), (8, 2048, 1), (32, 2048, 1), (1, 64, 512), (8, 64, 512)),
        *((32, 64, 512), (128, 64, 512), (256, 64, 256), (32, 4096, 256)),
    )
)


@dataclass(frozen=True)
class Plan:
    """What to run. seconds: how long each point is repeated. engine, carbon: more options of LLM and of the plugin.

    model: None for a tiny Llama, which is for the shim alone. device: what it is priced as where vLLM cannot tell.
    """

    folder: Path
    model: Path | None
    points: tuple[Point, ...] = POINTS
    seconds: float = 6.0
    engine: dict[str, Any] = field(default_factory=dict)
    carbon: dict[str, Any] = field(default_factory=dict)
    device: str | None = None

    def json(self) -> str:
        """The plan as text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reverse of ``json``."""
        known = json.loads(text)
        model = known["model"] and Path(known["model"])
        points = tuple(Point(*point) for point in known["points"])
        return cls(**{**known, "folder": Path(known["folder"]), "model": model, "points": points})

    def options(self, model: Path) -> dict[str, Any]:
        """Of LLM, as cheap as they come where the device is simulated and a CPU works."""
        longest = max(point.prompt + point.output for point in self.points)
        own: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "seed": 0,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "max_model_len": longest + 16,
            "max_num_seqs": max(16, *(point.batch for point in self.points)),
        }
        if SIMULATED in os.environ:
            own["enforce_eager"] = True
        else:
            own |= {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.8}
        carbon = {"meter": "nvml", "samples": str(self.folder)} | ({"device": self.device} if self.device else {})
        return {**own, **self.engine, "additional_config": {"carbon": {**carbon, **self.carbon}}}


def tiny_model(folder: Path) -> Path:
    """A folder with the configuration of a Llama that two cores run fast, made from the one of the tests."""
    from tests.vllm_plugin.harness import model_folder

    return model_folder(folder, num_hidden_layers=2, max_position_embeddings=TINY_POSITIONS)


def vocabulary(model: Path) -> int:
    """How many tokens a model knows. Raises OSError, ValueError, KeyError."""
    config = json.loads((model / "config.json").read_text())
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


@contextmanager
def drawing() -> Iterator[Callable[[bool], None]]:
    """Tells a simulated device when there is work; a real one knows."""
    if SIMULATED not in os.environ:
        yield lambda busy: None
        return
    with simulated_load(Path(os.environ[SIMULATED])) as load:
        yield load


@dataclass
class Runner:
    """Runs points on an engine and writes what is known of them."""

    llm: Any
    tokens: int
    load: Callable[[bool], None]
    points: IO[str]
    requests: IO[str]
    last: Any = None
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, point: Point, seconds: float) -> None:
        """Once to warm up, then again and again for so long, and once at least."""
        self._once(point, 0)
        repetitions: list[list[Any]] = []
        begin = time.monotonic()
        while not repetitions or time.monotonic() - begin < seconds:
            repetitions.append(self._once(point, len(repetitions) + 1))
        self._tell(point, repetitions, "response")
        time.sleep(BETWEEN_SECONDS)
        settle(self.llm)
        self._tell(point, repetitions, "final")

    def _tell(self, point: Point, repetitions: list[list[Any]], moment: str) -> None:
        for repetition, outputs in enumerate(repetitions, 1):
            for number, output in enumerate(outputs):
                write_row(self.requests, [*point, repetition, number, moment, *carbon_row(output)])
        self.requests.flush()

    def _once(self, point: Point, repetition: int) -> list[Any]:
        from vllm import SamplingParams

        ids = self.generator.integers(FIRST_TOKEN, self.tokens, (point.batch, point.prompt)).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=point.output, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in ids]
        epoch, begin = time.time(), time.monotonic()
        self.load(True)
        try:
            outputs: list[Any] = self.llm.generate(prompts, sampling, use_tqdm=False)
        finally:
            self.load(False)
        times = [f"{begin:.6f}", f"{time.monotonic():.6f}", f"{epoch:.6f}"]
        write_row(self.points, [*point, repetition, *times])
        self.points.flush()
        self.last = outputs[-1]
        return outputs


def write_row(file: IO[str], row: list[Any]) -> None:
    """A row; what is unknown is empty."""
    csv.writer(file, lineterminator="\n").writerow(row)


def carbon_row(output: Any) -> list[Any]:
    """What an output says of its energy, in the order of ``REQUEST_COLUMNS`` from ``basis`` on."""
    carbon = dict(getattr(output, "carbon", None) or {})
    estimate, measured = carbon.get("estimate", {}), carbon.get("energy_joules", {})
    predicted = [estimate.get(key) for key in ("energy_joules", "prefill_joules", "decode_joules", "lower", "upper")]
    metered = [measured.get(key) for key in ("value", "prefill", "decode", "lower", "upper")]
    return [*(carbon.get(key) for key in ("basis", "coverage_ratio", "in_distribution")), *predicted, *metered]


def described(llm: Any, options: dict[str, Any], start_seconds: float, output: Any) -> dict[str, Any]:
    """What is known of the engine at the end; ``snapshot`` is left out where it does not answer."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    carbon = dict(getattr(output, "carbon", None) or {})
    found = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "platform": "cpu" if current_platform.is_cpu() else "gpu",
        "device": "cpu" if current_platform.is_cpu() else str(current_platform.get_device_name()),
        "predictor": carbon.get("predictor"),
        "meter": carbon.get("meter"),
        "meter_reason": carbon.get("meter_reason"),
        "start_seconds": round(start_seconds, 1),
        "options": {key: value for key, value in options.items() if key not in ("model", "additional_config")},
    }
    try:
        found["snapshot"] = snapshot(llm)
    except Exception as error:  # another version of vLLM keeps it elsewhere; the rest is as good without
        found["snapshot_failure"] = f"{type(error).__name__}: {error}"
    return found


def snapshot(llm: Any, awaited: Sequence[str] = ()) -> dict[str, Any]:
    """The cumulative figures of the hook, whichever process it is in, and final figures of requests awaited."""
    core, question = llm.llm_engine.engine_core, json.dumps({"counted": {}, "awaited": list(awaited)})
    if hasattr(core, "call_utility"):
        answer = core.call_utility("llmco2_snapshot", question)
    else:
        answer = core.engine_core.llmco2_snapshot(question)
    found: dict[str, Any] = json.loads(answer)
    return found


def settle(llm: Any) -> None:
    """Ask for what the meter has found out since the responses: a server's front end does, offline nobody does."""
    from llmco2_vllm.vllm_plugin.output_path import front_end

    late = front_end()._late
    late.settle(snapshot(llm, late.request_ids)["settled"])


def run(plan: Plan, scratch: Path) -> None:
    """Start the engine and run all points; scratch: a folder for what nobody keeps."""
    from vllm import LLM

    model = plan.model or tiny_model(scratch)
    options = plan.options(model)
    begin = time.monotonic()
    llm = LLM(**options)
    start_seconds = time.monotonic() - begin
    engine = plan.folder / ENGINE_FILE
    engine.write_text(json.dumps(described(llm, options, start_seconds, None)))
    with (plan.folder / POINTS_FILE).open("w") as points, (plan.folder / REQUESTS_FILE).open("w") as requests:
        write_row(points, list(POINT_COLUMNS))
        write_row(requests, list(REQUEST_COLUMNS))
        with drawing() as load:
            runner = Runner(llm, vocabulary(model), load, points, requests)
            for number, point in enumerate(plan.points, 1):
                print(f"{SAID}{number} of {len(plan.points)}: {point.name}", flush=True)
                runner.run(point, plan.seconds)
    time.sleep(LAST_WINDOWS_SECONDS)
    engine.write_text(json.dumps(described(llm, options, start_seconds, runner.last)))
    llm.llm_engine.engine_core.shutdown()  # one in a process of its own would keep this one from ending


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        run(Plan.parse(sys.argv[1]), Path(name))
