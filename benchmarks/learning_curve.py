"""How the error on unseen architectures falls with the number of architectures learned from, and what is left.

    python -m benchmarks.learning_curve --data DIR [--write FOLDER] [--json] [--draws 7] [--seed 0] [--quick]

DIR is that of benchmarks/accuracy.py, and so are the rows (text rows of mlenergy_v3.csv; stalled ones neither learned
from nor scored), the other sources, what is kept from the learner, and the baselines, which learn from the first table
alone. The architectures are put on a ring in an order that ``--seed`` draws. Each draw starts at another place of it,
learns from the next n and predicts the rows of all others, so with 7 draws of 14 architectures every row is predicted
equally often at every even n, and a curve does not bend because easier rows are left to predict. Nothing is
extrapolated.

Besides the curve: the error by regime at every n; by how many learned architectures are alike (same task, device and
kind of model); how far rows of one operating point differ (label noise); and what one factor from one or two measured
rows of the deployment itself leaves of the error, at the largest n.

FOLDER gets learning_curve.json, which holds scores alone, and learning_curve.png.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Printed

from benchmarks.accuracy import BASELINES, NOISE_PERCENT, OTHERS, OURS, QUICK_STEPS, Data, data_of
from benchmarks.learning_curve_plot import draw_plot
from llmco2_vllm.core.scores import score
from llmco2_vllm.training.fit import Recipe, Table, devices_of, trainable
from llmco2_vllm.training.observation import Architecture, Observation
from llmco2_vllm.training.predict import train_on
from llmco2_vllm.training.splits import Fold, architecture, configuration, with_more

FloatArray = NDArray[np.float64]
Key = Callable[[Observation], str]
METHODS = (OURS, *(make().name for make in BASELINES))
METRICS = ("mape", "median_ape", "eba_30")
# Rows of a deployment that set its factor, and how often they are chosen anew.
METERED, CHOICES = (0, 1, 2), 20
MANY_ALIKE = 3


@dataclass(frozen=True)
class Plan:
    """What is learned: ``draws`` sets of architectures of each size, in an order that ``seed`` decides."""

    sizes: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    draws: int = 7
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)


class Outcome(NamedTuple):
    """One draw of ``size`` architectures: the rows learned from, those predicted, and step energies, joules, (n,)."""

    draw: int
    size: int
    learned: tuple[Observation, ...]
    rows: tuple[Observation, ...]
    joules: dict[str, FloatArray]

    @property
    def measured(self) -> FloatArray:
        """Measured step energy, joules, shape (n,)."""
        return _measured(self.rows)


def learned_sets(rows: Iterable[Observation], plan: Plan) -> list[tuple[int, frozenset[Architecture]]]:
    """(draw, architectures to learn from). ValueError for a size that leaves nothing to learn from or to predict."""
    ring = sorted({o.architecture for o in rows})
    for size in plan.sizes:
        if not 0 < size < len(ring):
            raise ValueError(f"sizes: {size} of {len(ring)} architectures is not possible; allowed: 1 to all but one")
    if not 1 <= plan.draws <= len(ring):
        raise ValueError(f"draws: {plan.draws} is not possible; allowed: 1 to {len(ring)}, one per architecture")
    random.Random(plan.seed).shuffle(ring)
    found = []
    for draw in range(plan.draws):
        start = round(draw * len(ring) / plan.draws)
        turned = ring[start:] + ring[:start]
        found += [(draw, frozenset(turned[:size])) for size in plan.sizes]
    return found


def fold_of(data: Data, learned: frozenset[Architecture]) -> Fold:
    """Rows of the ``learned`` architectures, and all of other sources but those of the others, which are predicted."""
    sides: tuple[list[int], list[int]] = ([], [])
    for row, o in enumerate(data.rows):
        sides[o.architecture not in learned].append(row)
    fold = Fold(f"{len(learned)} architectures", tuple(sides[0]), tuple(sides[1]))
    return with_more(fold, data.observations, range(len(data.rows), len(data.observations)), architecture)


def run(data: Data, plan: Plan, progress: Progress) -> list[Outcome]:
    """All draws of all sizes."""
    data = data._replace(rows=trainable(data.rows))
    table = Table(data.observations, devices_of(data.observations), data.kernel_times)
    sets = learned_sets(data.rows, plan)
    bar = progress.add_task("", total=len(sets) * plan.recipe.steps)
    found = []
    for draw, learned in sets:
        progress.update(bar, description=f"draw {draw + 1} of {plan.draws}, {len(learned)} architectures")
        fold = fold_of(data, learned)
        known, rows = ([data.observations[i] for i in side] for side in (fold.train, fold.test))
        use = np.zeros(len(data.observations), dtype=np.bool_)
        use[list(fold.train)] = True
        trained = train_on(table, use.tolist(), plan.recipe, lambda: progress.advance(bar))
        joules = {OURS: trained.predict(rows).energy_joules(rows)}
        scored = [o for o in known if o.source == rows[0].source]
        joules |= {made.name: made.fit(scored).predict(rows) for made in (make() for make in BASELINES)}
        found.append(Outcome(draw, len(learned), tuple(scored), tuple(rows), joules))
    return found


def curve(found: Sequence[Outcome]) -> dict[str, list[dict[str, Any]]]:
    """By method and size: each metric over the draws, and the scores of all predictions together, in percent."""
    return {method: [_point(own, method) for own in _by_size(found).values()] for method in METHODS}


def _point(found: Sequence[Outcome], method: str) -> dict[str, Any]:
    each = [score(o.joules[method], o.measured).to_dict() for o in found]
    together = score(_joined(found, method), np.concatenate([o.measured for o in found])).to_dict()
    pooled = {name: together[name] for name in ("n", *METRICS, "bias")}
    point: dict[str, Any] = {"architectures": found[0].size, "pooled": _rounded(pooled)}
    for metric in METRICS:
        values = [float(scores[metric] or 0.0) for scores in each]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        point[metric] = _rounded({"mean": float(np.mean(values)), "deviation": spread}) | {
            "draws": [round(value, 2) for value in values]
        }
    return point


def kind(observation: Observation) -> str:
    """Whether layers have experts."""
    return "MoE" if observation.model.moe_layers else "dense"


def prefilling(observation: Observation) -> str:
    """Share of steps that prefill too, as a range."""
    share = sum(share for share, batch in observation.step_mix if batch.prefill.tokens)
    return (
        "100 %"
        if share >= 1
        else ("0 to 5 %", "5 to 25 %", "25 to 100 %")[np.searchsorted((0.05, 0.25), share, side="right")]
    )


def octave(observation: Observation) -> str:
    """Requests that run at a time, from a power of two to below the next."""
    low = 1 << (observation.batch_limit.bit_length() - 1)
    return f"{low} to {2 * low - 1}"


def layout(observation: Observation) -> str:
    """How the devices of an instance divide the work."""
    deployment = observation.deployment
    if deployment.n_gpu == 1:
        return "one device"
    if deployment.data_parallel > 1:
        return "data and expert parallel" if deployment.expert_parallel > 1 else "data parallel"
    return "expert parallel" if deployment.expert_parallel > 1 else "tensor parallel"


def alike(observation: Observation, learned: Iterable[Observation]) -> str:
    """How many learned architectures have rows of the same task, on the same device, of the same kind of model."""
    own = _family(observation)
    count = len({o.architecture for o in learned if _family(o) == own})
    return str(count) if count < MANY_ALIKE else f"{MANY_ALIKE} and more"


def _family(observation: Observation) -> Hashable:
    return observation.workload, observation.device.name, kind(observation)


REGIMES: dict[str, Key] = {
    "steps that prefill": prefilling,
    "model kind": kind,
    "device": lambda o: o.device.name,
    "batch": octave,
    "task": lambda o: o.workload,
    "layout": layout,
}


def regimes(found: Sequence[Outcome]) -> dict[str, Any]:
    """By regime and group: rows predicted at the largest size, their share of its error, scores by size, percent."""
    names: dict[Architecture, str] = {}
    for o in (o for outcome in found for o in outcome.rows):
        names[o.architecture] = min(names.get(o.architecture, o.model_name), o.model_name)
    keys: dict[str, Key] = {**REGIMES, "architecture": lambda o: names[o.architecture]}
    result = {}
    for regime, key in keys.items():
        result[regime] = _grouped(found, [[key(o) for o in outcome.rows] for outcome in found])
    result["learned architectures alike"] = _grouped(found, [[alike(o, x.learned) for o in x.rows] for x in found])
    return result


def _grouped(found: Sequence[Outcome], labels: Sequence[Sequence[str]]) -> dict[str, Any]:
    sizes = np.concatenate([np.full(len(o.rows), o.size) for o in found])
    groups = np.array([label for own in labels for label in own])
    truth = np.concatenate([o.measured for o in found])
    off = {method: _joined(found, method) / truth - 1 for method in METHODS}
    order = sorted(set(sizes.tolist()))
    last = sizes == order[-1]
    result = {}
    for group in sorted(set(groups.tolist()), key=_order):
        own = groups == group
        share = np.abs(off[OURS][last & own]).sum() / np.abs(off[OURS][last]).sum()
        result[group] = {
            "rows": int((last & own).sum()),
            "share_of_error": round(100 * float(share), 1),
            "bias": [_percent(off[OURS][own & (sizes == size)]) for size in order],
            "mape": {m: [_percent(np.abs(off[m][own & (sizes == size)])) for size in order] for m in METHODS},
        }
    return result


def metered(found: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """MAPE at the largest size when each deployment has a factor from a few measured rows of its own.

    Scored are rows that set no factor, the same for every number of measured rows; so it is not the curve's last.
    """
    largest = max(o.size for o in found)
    ratios: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    last = [o for o in found if o.size == largest]
    for place, (draw, o) in enumerate((outcome.draw, o) for outcome in last for o in outcome.rows):
        ratios[draw, o.deployment].append(place)
    sweeps = [np.array(places) for places in ratios.values() if len(places) > max(METERED)]
    truth = np.concatenate([o.measured for o in last])
    result: dict[str, Any] = {"rows": list(METERED), "deployments": len(sweeps), "mape": {}}
    for method in METHODS:
        logs, rng = np.log(truth / _joined(last, method)), np.random.default_rng(seed)
        left: dict[int, list[float]] = {rows: [] for rows in METERED}
        for sweep in sweeps * CHOICES:
            drawn = rng.permutation(logs[sweep])
            held = drawn[max(METERED) :]
            for rows in METERED:
                factor = drawn[:rows].mean() if rows else 0.0
                left[rows] += np.abs(np.expm1(factor - held)).tolist()
        result["mape"][method] = [_percent(np.array(left[rows])) for rows in METERED]
    return result


def repeats(rows: Iterable[Observation]) -> list[float]:
    """Largest step energy over the smallest of each operating point with several rows, less one, ascending, percent.

    These rows differ in weights or in nothing, so also a little in the lengths of their answers.
    """
    points: dict[Hashable, list[float]] = defaultdict(list)
    for o in trainable(rows):
        points[configuration(o)].append(o.step_energy_joules or 0.0)
    return sorted(round(100 * (max(own) / min(own) - 1), 1) for own in points.values() if len(own) > 1)


def document(found: Sequence[Outcome], data: Data, plan: Plan) -> dict[str, Any]:
    """All scores, and what they were computed on."""
    rows = trainable(data.rows)
    own = {o.architecture for o in rows}
    return {
        "target": "step energy, joules, all devices of the instance; rows of architectures that were not learned from",
        "data": "mlenergy_v3.csv, text rows that are not stalled",
        "also_learned_from": [*OTHERS, "vidur_kernels.csv.gz", "vidur_network.csv.gz"],
        "rows": len(rows),
        "architectures": len(own),
        "architectures_of_other_sources": len({o.architecture for o in data.others} - own),
        "plan": {**vars(plan), "sizes": list(plan.sizes), "recipe": vars(plan.recipe)},
        "noise_floor_percent": NOISE_PERCENT,
        "repeats_percent": repeats(rows),
        "curve": curve(found),
        "regimes": regimes(found),
        "metered": metered(found, plan.seed),
    }


def tables(result: dict[str, Any]) -> list[Printed]:
    """The curve, ours by regime, and what measured rows of a deployment bring."""
    sizes = [str(size) for size in result["plan"]["sizes"]]
    first = Printed(
        "method", "", *sizes, title="Step energy by architectures learned from, %, mean ± deviation over draws"
    )
    for method, points in result["curve"].items():
        for metric in METRICS:
            first.add_row(method, metric, *(_shown(point[metric]) for point in points))
    second = Printed("group", "rows", *sizes, "bias", "share of error", title="Ours, MAPE %; the last two at the end")
    for regime, groups in result["regimes"].items():
        for group, found in groups.items():
            cells = [_cell(value) for value in (*found["mape"][OURS], found["bias"][-1], found["share_of_error"])]
            second.add_row(f"{regime}: {group.split('/')[-1]}", str(found["rows"]), *cells)
        second.add_section()
    measured = result["metered"]
    names = [str(rows) for rows in measured["rows"]]
    title = f"MAPE % after a factor from so many measured rows of the deployment itself, {sizes[-1]} learned"
    third = Printed("method", *names, title=title)
    for method, values in measured["mape"].items():
        third.add_row(method, *(_cell(value) for value in values))
    return [first, second, third]


def write(folder: Path, result: dict[str, Any]) -> None:
    """learning_curve.json and learning_curve.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learning_curve.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_plot(result, folder / "learning_curve.png")


def _by_size(found: Sequence[Outcome]) -> dict[int, list[Outcome]]:
    return {size: [o for o in found if o.size == size] for size in sorted({o.size for o in found})}


def _joined(found: Sequence[Outcome], method: str) -> FloatArray:
    return np.concatenate([o.joules[method] for o in found])


def _measured(rows: Iterable[Observation]) -> FloatArray:
    return np.array([o.step_energy_joules for o in rows], dtype=np.float64)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None or name == "n" else round(value, 2) for name, value in values.items()}


def _percent(ratios: FloatArray) -> float | None:
    return round(100 * float(ratios.mean()), 1) if len(ratios) else None


def _order(name: str) -> tuple[int, str]:
    """Ranges by their first number, other names by the alphabet."""
    first = name.split()[0]
    return (int(first), name) if first.isdigit() else (0, name)


def _shown(metric: dict[str, Any]) -> str:
    spread = metric["deviation"]
    return f"{metric['mean']:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables, as of benchmarks.accuracy")
    parser.add_argument("--write", type=Path, help="folder for learning_curve.json and learning_curve.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--draws", type=int, default=plan.draws, help="sets of architectures of each size")
    parser.add_argument("--seed", type=int, default=plan.seed, help="of the order of the architectures")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} training steps: a check, no result")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    recipe = Recipe(steps=QUICK_STEPS) if options.quick else Recipe()
    plan = Plan(draws=options.draws, seed=options.seed, recipe=recipe)
    try:
        data = data_of(options.data)
        learned_sets(data.rows, plan)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        found = run(data, plan, progress)
    result = document(found, data, plan)
    if options.write:
        write(options.write, result)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    for table in tables(result):
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
