"""How many measurements does focused sampling need? Against random sampling, on a simulated truth.

    python -m benchmarks.focused_sampling [--seeds 20] [--measurements 160] [--trace FILE] [--plot FILE.png] [--json]

The truth of each seed is the Roofline prediction of Llama-3.1-8B on an H100 times an efficiency the learner does not
know: a bumpy surface over the log of all counts, and cliffs where a batch outgrows a tile of the matrix units. What
is measured carries 1 % of noise. The learner is a Gaussian-process correction of the Roofline prediction in the log
features, fitted again after each round; its left-out errors are what focused sampling is given. Random sampling draws
from the space at large (all counts log-uniform), from the traffic, or 80 : 20 from both, which is how focused sampling
divides its measurements but for the first round. Nothing here is a measurement: it compares ways to choose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmco2_vllm.core.hardware import Topology, device_by_name
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.predictor.calibration import RooflineCalibration
from llmco2_vllm.predictor.predict import RooflinePredictor
from llmco2_vllm.training.sampling import propose
from llmco2_vllm.training.traffic import Candidate, Space, Traffic

FloatArray = NDArray[np.float64]
# Sizes of Llama-3.1-8B, as published with the model.
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
SPACE = Space(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=8192, kv_capacity_tokens=400_000)
ROUND = 8
NOISE_RATIO = 0.01
TARGET_ERROR = 0.015
COLOURS = ("#0b6e4f", "#8d99ae", "#d1495b", "#edae49")
METHODS = ("focused", "random: space", "random: traffic", "random: 80 % traffic, 20 % space")
Choose = Callable[[list[tuple[Candidate, float]], int], list[Candidate]]


@cache
def roofline_predictor() -> RooflinePredictor:
    """The prediction that the learner corrects."""
    model = ModelSpec.from_config(MODEL)
    return RooflinePredictor(model, device_by_name("h100-sxm"), Topology(), RooflineCalibration.load())


@dataclass(frozen=True)
class Truth:
    """Log of measured over predicted energy: bumps (places (b, 4), heights, widths (b,)) and cliffs per 64 requests."""

    places: FloatArray
    heights: FloatArray
    widths: FloatArray
    cliff: float

    @classmethod
    def drawn(cls, seed: int) -> Truth:
        """Twelve bumps of up to 50 % either way."""
        draw = np.random.default_rng([1, seed])
        heights = draw.uniform(0.15, 0.5, 12) * draw.choice([-1.0, 1.0], 12)
        return cls(SPACE.coordinates(_spread(draw, 12)), heights, draw.uniform(0.1, 0.25, 12), 0.1)

    def log_ratio(self, candidates: Sequence[Candidate]) -> FloatArray:
        """log(true / Roofline) energy of each step, shape (n,)."""
        x = SPACE.coordinates(candidates)
        squared = np.square(x[:, None] - self.places).sum(axis=2)
        bumps = np.exp(-squared / (2 * self.widths**2)) @ self.heights
        decoding = np.array(candidates, dtype=np.float64)[:, 2]
        padded = np.ceil(decoding / 64) * 64 / np.maximum(1, decoding) - 1
        result: FloatArray = bumps + self.cliff * np.where(decoding > 32, padded, 0.0)
        return result


class Learner:
    """Correction of the Roofline prediction: kernel ridge on the log features, one constant besides."""

    def __init__(self, candidates: Sequence[Candidate], log_ratios: FloatArray) -> None:
        self._x = SPACE.coordinates(candidates)
        self._mean = float(log_ratios.mean())
        kernel = self._kernel(self._x) + 0.005 * np.eye(len(self._x))
        inverse = np.linalg.inv(kernel)
        self._weights = inverse @ (log_ratios - self._mean)
        # Left-one-out residuals in closed form (Rasmussen and Williams 2006, equation 5.12).
        self.left_out = np.expm1(-self._weights / np.diag(inverse))

    def _kernel(self, x: FloatArray) -> FloatArray:
        kernel: FloatArray = np.exp(-np.square(x[:, None] - self._x).sum(axis=2) / (2 * 0.2**2))
        return kernel

    def log_ratio(self, candidates: Sequence[Candidate]) -> FloatArray:
        """Predicted log(true / Roofline), shape (n,)."""
        result: FloatArray = self._mean + self._kernel(SPACE.coordinates(candidates)) @ self._weights
        return result


@dataclass(frozen=True)
class Test:
    """Steps to score on: those of the traffic with their shares, and of the whole space by regime (names (n,))."""

    traffic: Traffic
    rare: tuple[Candidate, ...]
    regimes: NDArray[np.str_]

    @classmethod
    def of(cls, traffic: Traffic) -> Test:
        """Regimes are cut by phases present, and by more or fewer than 32 requests."""
        rare = Traffic.uniform(SPACE, seed=99, nodes=1500).candidates
        names = [_regime(candidate) for candidate in rare]
        return cls(traffic, rare, np.array(names))

    def scores(self, truth: Truth, learner: Learner) -> tuple[float, float]:
        """Mean absolute relative error over the traffic, and over the worst regime of the space."""
        error = [
            np.abs(np.expm1(learner.log_ratio(candidates) - truth.log_ratio(candidates)))
            for candidates in (self.traffic.candidates, self.rare)
        ]
        regime = [float(error[1][self.regimes == name].mean()) for name in np.unique(self.regimes)]
        return float(error[0] @ self.traffic.shares), max(regime)


def _regime(candidate: Candidate) -> str:
    sequences, _, decoding, _ = candidate
    phases = "prefill" if not decoding else "decode" if not sequences else "mixed"
    return f"{phases} {'large' if sequences + decoding > 32 else 'small'}"


def _spread(draw: np.random.Generator, count: int) -> list[Candidate]:
    """Steps drawn log-uniformly from the space."""
    uniform = Traffic.uniform(SPACE, seed=int(draw.integers(2**31)), nodes=4 * count)
    return [uniform.candidates[i] for i in draw.permutation(len(uniform.candidates))[:count]]


def simulated_traffic(seed: int) -> Traffic:
    """Three kinds of requests, other ones for each seed, 60 : 30 : 10; log-normal lengths, 2 to 128 running."""
    draw = np.random.default_rng([2, seed])
    centres = np.log(np.column_stack([draw.uniform(100, 3000, 3), draw.uniform(20, 600, 3)]))
    kind = draw.choice(3, 3000, p=(0.6, 0.3, 0.1))
    lengths = np.exp(centres[kind] + np.array([0.8, 0.8]) * draw.normal(size=(3000, 2)))
    steps: list[Candidate] = []
    for part in range(3):
        running = np.exp(draw.uniform(np.log(2), np.log(128), 50)).round()
        some = Traffic.observed(SPACE, np.clip(lengths[kind == part], 1, 6000), running, seed=seed)
        steps += draw.choice(np.array(some.candidates), int((0.6, 0.3, 0.1)[part] * 1000), p=some.shares).tolist()
    return Traffic.from_steps(SPACE, steps, "simulated")


def chooser(method: str, traffic: Traffic, seed: int) -> Choose:
    """How a method picks the next steps from what was measured."""
    draw = np.random.default_rng([3, seed])

    def focused(measured: list[tuple[Candidate, float]], count: int) -> list[Candidate]:
        return propose(SPACE, traffic, measured, count)

    def from_space(_: list[tuple[Candidate, float]], count: int) -> list[Candidate]:
        return _spread(draw, count)

    def from_traffic(_: list[tuple[Candidate, float]], count: int) -> list[Candidate]:
        return [traffic.candidates[i] for i in draw.choice(len(traffic.shares), count, p=traffic.shares)]

    def from_both(measured: list[tuple[Candidate, float]], count: int) -> list[Candidate]:
        wide = int((len(measured) + count) * 0.2) - int(len(measured) * 0.2)
        return from_traffic(measured, count - wide) + from_space(measured, wide)

    return dict(zip(METHODS, (focused, from_space, from_traffic, from_both), strict=True))[method]


def run(method: str, seed: int, traffic: Traffic, measurements: int) -> FloatArray:
    """One campaign, shape (rounds, 2): traffic-weighted and worst-regime error after each round."""
    truth, test, choose = Truth.drawn(seed), Test.of(traffic), chooser(method, traffic, seed)
    noise = np.random.default_rng([4, seed])
    taken: list[Candidate] = []
    seen = np.zeros(0)
    measured: list[tuple[Candidate, float]] = []
    scores = []
    for _ in range(measurements // ROUND):
        chosen = choose(measured, ROUND)
        taken += chosen
        seen = np.concatenate([seen, truth.log_ratio(chosen) + NOISE_RATIO * noise.normal(size=len(chosen))])
        learner = Learner(taken, seen)
        measured = list(zip(taken, learner.left_out.tolist(), strict=True))
        scores.append(test.scores(truth, learner))
    return np.array(scores)


def measurements_to_target(scores: FloatArray, target: float = TARGET_ERROR) -> float:
    """Measurements until the traffic-weighted error of a campaign stays at the target or below; inf when it never does.

    scores: as returned by :func:`run`.
    """
    above = np.flatnonzero(scores[:, 0] > target)
    first = int(above[-1]) + 1 if len(above) else 0
    return float((first + 1) * ROUND) if first < len(scores) else float("inf")


def campaigns(seeds: int, measurements: int, trace: Path | None, advance: Callable[[], None]) -> dict[str, FloatArray]:
    """All campaigns by method, shape (seeds, rounds, 2) each; ``advance`` is called after each of them."""
    traced = trace and Traffic.from_trace(
        SPACE, trace, lambda batch: roofline_predictor().estimate(batch).duration_seconds
    )
    found: dict[str, list[FloatArray]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        traffic = traced or simulated_traffic(seed)
        for method in METHODS:
            found[method].append(run(method, seed, traffic, measurements))
            advance()
    return {method: np.array(scores) for method, scores in found.items()}


def summary(found: dict[str, FloatArray]) -> dict[str, Any]:
    """Medians over the seeds; a number of measurements that was not reached is None."""
    rows = {}
    for method, scores in found.items():
        needed = [measurements_to_target(one) for one in scores]
        middle = float(np.median(needed))
        rows[method] = {
            "measurements_to_target": middle if np.isfinite(middle) else None,
            "seeds_at_target": int(np.isfinite(needed).sum()),
            "traffic_error": round(float(np.median(scores[:, -1, 0])), 4),
            "worst_regime_error": round(float(np.median(scores[:, -1, 1])), 4),
        }
    some = next(iter(found.values()))
    return {"target_error": TARGET_ERROR, "seeds": len(some), "measurements": some.shape[1] * ROUND, "methods": rows}


def draw_plot(found: dict[str, FloatArray], path: Path) -> None:
    """Error against measurements: median and middle half of the seeds, for the traffic and for the worst regime."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    titles = ("Weighted by traffic", "Worst of six regimes, all of the space")
    for part, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for (method, scores), colour in zip(found.items(), COLOURS, strict=True):
            low, middle, high = np.quantile(scores[:, :, part], (0.25, 0.5, 0.75), axis=0)
            taken = ROUND * np.arange(1, len(middle) + 1)
            axis.plot(taken, middle, color=colour, lw=2.4 if method == "focused" else 1.6, label=method, zorder=3)
            axis.fill_between(taken, low, high, color=colour, alpha=0.16, lw=0)
        axis.set(title=title, xlabel="steps measured", yscale="log", xlim=(ROUND, taken[-1]))
        ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in ticks if low <= tick <= high], minor=False)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(TARGET_ERROR, color="black", lw=1, ls=":")
    axes[0].annotate(
        f"target {TARGET_ERROR:.1%}", (taken[-1], TARGET_ERROR), (-2, 3), textcoords="offset points", ha="right"
    )
    axes[0].set_ylabel("mean absolute relative error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    seeds = len(found["focused"])
    figure.suptitle(
        f"Simulated truth: error of a learner by what it measured (median and middle half of {seeds} seeds)"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--measurements", type=int, default=160, help=f"per campaign, in rounds of {ROUND}")
    parser.add_argument("--trace", type=Path, help="CSV of t_s, input_tokens, output_tokens in place of the simulation")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.measurements < ROUND:
        parser.error(f"--seeds must be 1 or more, --measurements {ROUND} or more")
    bar = Progress(
        TextColumn("campaigns"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    )
    with bar:
        line = bar.add_task("", total=options.seeds * len(METHODS))
        found = campaigns(options.seeds, options.measurements, options.trace, lambda: bar.advance(line))
    if options.plot:
        draw_plot(found, options.plot)
    result = summary(found)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    table = Table("choice", f"steps to {TARGET_ERROR:.1%}", "seeds there", "traffic error", "worst regime")
    for method, row in result["methods"].items():
        needed = row["measurements_to_target"]
        steps = "not reached" if needed is None else f"{needed:.0f}"
        scores = (f"{row['traffic_error']:.2%}", f"{row['worst_regime_error']:.1%}")
        table.add_row(method, steps, f"{row['seeds_at_target']}/{result['seeds']}", *scores)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
