"""How wrong are the joules of a single request? Against a simulated truth, and against what others do.

    python -m benchmarks.attribution [--data DIR] [--seconds 300] [--seeds 5] [--quick] [--write FOLDER] [--json]

A simulated GPU (simulated_card.py: physics of its own, drawn anew for each seed) serves the first seconds of the
Azure conversation trace of 2023 under continuous batching. Its energy counter ticks, lags, has a gain, and may see a
quarter of the time only; the product's sampler reads it, the product's monitor prices the steps with the shipped
predictor as it is, and the product's metering splits the windows. Others get the same windows. Nothing here is a
measurement: the truth is known because it was made.

Error of a request: attributed / true - 1; idle energy is true of nobody. The gain of the counter multiplies the
figures of all methods alike and is taken out of every error but ``median_error_with_gain``.
--data: folder of azure2023_conv.csv.gz; without it a synthetic trace of like lengths. --quick: one seed, 60 s, three
scenes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.attribution_methods import METHODS, OURS, Counter, Remembering, Weighed, Weighing, attributed
from benchmarks.attribution_plot import draw_plot
from benchmarks.simulated_card import PerfectPredictor, Physics
from benchmarks.simulated_serving import Engine, Serving, Shared
from llmco2_vllm.assemble import predictor_of
from llmco2_vllm.core.attribution import GAIN_DEVIATION
from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.traffic import Served, kv_capacity_tokens, read_trace

FloatArray = NDArray[np.float64]
TRACE = "azure2023_conv.csv.gz"
# Sizes as published with the models.
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
MIXTURE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
MODELS = {"llama-3.1-8b": LLAMA, "qwen3-30b-a3b": MIXTURE}
CLASSES = {
    "prompt to 512": ("prompt", 0, 512),
    "prompt 513 to 2048": ("prompt", 512, 2048),
    "prompt above 2048": ("prompt", 2048, np.inf),
    "output to 64": ("output", 0, 64),
    "output 65 to 256": ("output", 64, 256),
    "output above 256": ("output", 256, np.inf),
}


NORMAL = Counter()


@dataclass(frozen=True)
class Scene:
    """What is served, how much of it, and how it is metered and priced. load: arrivals per arrival of the trace."""

    name: str
    counter: Counter = NORMAL
    model: str = "llama-3.1-8b"
    load: float = 1.0
    predictor: str = "gnn"


BASE = Scene("base")
SCENES = (
    BASE,
    replace(BASE, name="tick 20 ms", counter=Counter(0.02)),
    replace(BASE, name="sensor sees 25 %", counter=Counter(duty=0.25)),
    replace(BASE, name="tick 20 ms, sees 25 %", counter=Counter(0.02, duty=0.25)),
    replace(BASE, name="lag 100 ms", counter=Counter(lag_seconds=0.1)),
    replace(BASE, name="load x 0.2", load=0.2),
    replace(BASE, name="load x 2", load=2.0),
    replace(BASE, name="load x 3", load=3.0),
    replace(BASE, name="Roofline prices", predictor="roofline"),
    replace(BASE, name="perfect prices", predictor="perfect"),
    replace(BASE, name="mixture", model="qwen3-30b-a3b"),
    replace(BASE, name="mixture, load x 3", model="qwen3-30b-a3b", load=3.0),
)
QUICK = (BASE, SCENES[2], SCENES[10])
TARGET_ERROR = 0.05
TARGET_FACTOR = 3.0


def synthetic_trace(seconds: float, seed: int = 0) -> Served:
    """Poisson arrivals, 5.5 in a second, with log-normal lengths about those of the conversation trace."""
    draw = np.random.default_rng([5, seed])
    count = max(2, int(5.5 * seconds))
    prompt = np.clip(np.exp(draw.normal(np.log(1000), 0.9, count)), 16, 8000)
    output = np.clip(np.exp(draw.normal(np.log(150), 0.8, count)), 2, 800)
    return Served(draw.exponential(1 / 5.5, count).cumsum(), prompt.round(), output.round())


def part_of(trace: Served, seconds: float, load: float) -> Served:
    """The first requests of a trace, arriving ``load`` times as fast, for so many seconds."""
    arrival = trace.arrival_seconds - trace.arrival_seconds[0]
    chosen = arrival < seconds * load
    return Served(arrival[chosen] / load, trace.input_tokens[chosen], trace.output_tokens[chosen])


def serve(model: str, trace: Served, seed: int) -> Serving:
    """A trace on the card of this seed."""
    spec, device = ModelSpec.from_config(MODELS[model]), device_by_name("h100-sxm")
    capacity = kv_capacity_tokens(spec, device, Topology())
    return Engine(Physics.drawn(spec, device, seed), kv_capacity_tokens=capacity, seed=seed).serve(trace)


def weigh(serving: Serving, scene: Scene, predictor: Remembering, seed: int) -> dict[str, Any]:
    """Scores of all methods in a scene, and of what the interval of ours holds."""
    gain = 1.0 + GAIN_DEVIATION * float(np.random.default_rng([4, seed]).normal())
    weighed = Weighing(serving, replace(scene.counter, gain=gain), predictor, seed).run()
    metered = sum(window.energy_joules or 0.0 for window in weighed.windows)
    found = attributed(serving, weighed)
    rows = {name: _scores(serving, joules / gain, metered / gain) for name, joules in found.items()}
    truth = serving.truth()
    for name, joules in found.items():
        rows[name]["median_error_with_gain"] = float(np.median(np.abs(joules.sum(axis=0) / truth.sum(axis=0) - 1)))
        other = serving.truth(Shared.REQUESTS).sum(axis=0)
        rows[name]["median_error_shared_by_requests"] = float(np.median(np.abs(joules.sum(axis=0) / gain / other - 1)))
    errors = {name: np.abs(joules.sum(axis=0) / gain / truth.sum(axis=0) - 1) for name, joules in found.items()}
    inside = np.abs(found[OURS].sum(axis=0) - truth.sum(axis=0)) <= _half_widths(weighed)
    return {
        "requests": len(serving.prompt),
        "steps": len(serving.begin),
        "running_requests": len(serving.entries) / len(serving.begin),
        "step_seconds": float(np.mean(serving.end - serving.begin)),
        "windows": len(weighed.windows),
        "metered_joules": metered,
        "gain": gain,
        "lag_learnt_seconds": weighed.lag_seconds,
        "conservation_residual": weighed.kept_joules / metered - 1,
        "interval_coverage": float(inside.mean()),
        "methods": rows,
        "errors": {name: values.tolist() for name, values in errors.items()},
    }


def _half_widths(weighed: Weighed) -> FloatArray:
    return np.array([figures.half_width_joules for figures in weighed.settled])


def _scores(serving: Serving, joules: FloatArray, metered: float) -> dict[str, Any]:
    """Errors of a method against the truth. joules: by phase, shape (2, requests). metered: joules of the counter.

    bias: of the sum over requests. over_metered: their sum over all joules metered, idle included.
    """
    truth = serving.truth()
    error = joules.sum(axis=0) / truth.sum(axis=0) - 1
    row: dict[str, Any] = {
        "median_error": float(np.median(np.abs(error))),
        "p90_error": float(np.quantile(np.abs(error), 0.9)),
        "rms_error": float(np.sqrt(np.mean(error**2))),
        "bias": float(joules.sum() / truth.sum() - 1),
        "over_metered": float(joules.sum() / metered),
        "classes": {},
    }
    for phase, own, true in zip(("prefill", "decode"), joules, truth, strict=True):
        some = true > 0
        row[f"{phase}_median_error"] = float(np.median(np.abs(own[some] / true[some] - 1)))
        row[f"{phase}_bias"] = float(own.sum() / true.sum() - 1)
    for name, (column, low, high) in CLASSES.items():
        tokens = getattr(serving, column)
        some = (tokens > low) & (tokens <= high)
        if some.any():
            row["classes"][name] = {
                "requests": int(some.sum()),
                "median_error": float(np.median(np.abs(error[some]))),
                "bias": float(joules[:, some].sum() / truth[:, some].sum() - 1),
            }
    return row


@dataclass(frozen=True)
class Campaign:
    """What is run: scenes of so many virtual seconds, for each seed."""

    trace: Served
    scenes: Sequence[Scene] = SCENES
    seconds: float = 300.0
    seeds: int = 5

    def run(self, advance: Callable[[], None] = lambda: None) -> dict[str, list[dict[str, Any]]]:
        """Scores by scene, one per seed; ``advance`` is called after each of them."""
        found: dict[str, list[dict[str, Any]]] = {scene.name: [] for scene in self.scenes}
        for seed in range(self.seeds):
            servings: dict[tuple[str, float], Serving] = {}
            predictors: dict[tuple[str, float, str], Remembering] = {}
            for scene in self.scenes:
                served = scene.model, scene.load
                if served not in servings:
                    trace = part_of(self.trace, self.seconds, scene.load)
                    servings[served] = serve(scene.model, trace, seed)
                key = (*served, scene.predictor)
                if key not in predictors:
                    predictors[key] = _predictor(scene.predictor, servings[served].physics)
                found[scene.name].append(weigh(servings[served], scene, predictors[key], seed))
                advance()
        return found


def _predictor(name: str, physics: Physics) -> Remembering:
    if name == "perfect":
        return Remembering(PerfectPredictor(physics))
    return Remembering(predictor_of(name, physics.model, physics.device, Topology()))


def mean(found: Sequence[Any]) -> Any:
    """Of the same figures of several seeds: their mean, within mappings by key; None where one is not known."""
    if isinstance(found[0], dict):
        return {key: mean([one[key] for one in found if key in one]) for key in found[0]}
    return None if any(one is None for one in found) else float(np.mean(found))


def summary(found: dict[str, list[dict[str, Any]]], campaign: Campaign) -> dict[str, Any]:
    """Means over the seeds by scene, the range of the median errors, and whether the targets are met.

    Of the first scene alone: classes, and error_percentiles, 0 to 100, over the requests of all seeds.
    """
    scenes = {}
    for scene in campaign.scenes:
        rows = [{key: row[key] for key in row if key != "errors"} for row in found[scene.name]]
        scenes[scene.name] = {"setting": asdict(scene), **_rounded(mean(rows))}
        for method in METHODS:
            each = [row["methods"][method]["median_error"] for row in rows]
            scenes[scene.name]["methods"][method]["median_error_range"] = _rounded([min(each), max(each)])
    first = campaign.scenes[0].name
    base = scenes[first]["methods"]
    for method in METHODS:
        for other in list(scenes)[1:]:
            del scenes[other]["methods"][method]["classes"]
        pooled = np.concatenate([row["errors"][method] for row in found[first]])
        base[method]["error_percentiles"] = _rounded(np.percentile(pooled, range(101)).tolist())
    ours, tokens = base[OURS]["median_error"], base["token share"]["median_error"]
    return {
        "seeds": campaign.seeds,
        "seconds": campaign.seconds,
        "median_error": ours,
        "times_smaller_than_token_share": round(tokens / ours, 1),
        "targets_met": ours <= TARGET_ERROR and tokens >= TARGET_FACTOR * ours,
        "scenes": scenes,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_tables(result: dict[str, Any]) -> None:
    """The first scene by method, and all scenes in short."""
    name, base = next(iter(result["scenes"].items()))
    table = Table("method", "median", "p90", "prefill", "decode", "bias", "sum / metered", title=name)
    for method, row in base["methods"].items():
        columns = ("median_error", "p90_error", "prefill_median_error", "decode_median_error")
        table.add_row(method, *(f"{row[c]:.1%}" for c in columns), f"{row['bias']:+.1%}", f"{row['over_metered']:.3f}")
    Console().print(table)
    table = Table("scene", "running", "ours", "with gain", "in interval", "token share", "output tokens", "time share")
    for name, scene in result["scenes"].items():
        rows = scene["methods"]
        others = (rows[m]["median_error"] for m in ("token share", "output token share", "time share"))
        own = (rows[OURS]["median_error"], rows[OURS]["median_error_with_gain"], scene["interval_coverage"], *others)
        table.add_row(name, f"{scene['running_requests']:.0f}", *(f"{value:.1%}" for value in own))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder of {TRACE}")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the trace")
    parser.add_argument("--seeds", type=int, default=5, help="cards, each with physics of its own")
    parser.add_argument("--quick", action="store_true", help="one seed, 60 s, three scenes")
    parser.add_argument("--write", type=Path, help="folder for attribution.json and attribution.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.seconds < 10:
        parser.error("--seeds must be 1 or more, --seconds 10 or more")
    try:
        trace = read_trace(options.data / TRACE) if options.data else synthetic_trace(3 * options.seconds)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    campaign = Campaign(trace, SCENES, options.seconds, options.seeds)
    if options.quick:
        campaign = Campaign(trace, QUICK, 60.0, 1)
    bar = Progress(
        TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    )
    with bar:
        line = bar.add_task("", total=campaign.seeds * len(campaign.scenes))
        found = campaign.run(lambda: bar.advance(line))
    result = summary(found, campaign)
    result["trace"] = TRACE if options.data else "synthetic"
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "attribution.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        draw_plot(result, options.write / "attribution.png")
    if options.json:
        print(json.dumps(result, indent=1))
    if not options.json:
        print_tables(result)
    return 0 if result["targets_met"] else 1


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
