"""Score the network and baselines on measured step energy of models, devices and configurations they never saw.

    python -m benchmarks.accuracy --data DIR [--write FOLDER] [--json] [--quick]

DIR holds mlenergy_v3.csv with model_configs.json, mlenergy_v2.csv, splitwise_latency.csv, vidur_kernels.csv.gz and
vidur_network.csv.gz. Scored are text rows of the first (gpqa, lm-arena-chat, sourcegraph-fim), with 90 % intervals
learned inside each training fold; the others are learned from, but for what tells of the held-out architecture,
device or configuration. Baselines learn from the first alone. Splits:

unseen architecture    one fold per architecture; checkpoints that differ in weights or precision count as one
unseen device          learn from one kind of device, predict the other, both ways
unseen configuration   five folds in which no operating point is on both sides
A100 to H100           rows of engines of 2024 (mlenergy_v2.csv): learn from one device, predict the other

Of each split but the last, about 15 % of the groups are set aside first, never in any fold, and scored once:
"untouched". For unseen devices these are configurations on the device that is predicted. "Every row" is both together:
each row predicted once, and comparable with figures that leave nothing aside.

Stalled rows (a mean step over three times the median one) are never learned from; scores are with and without them.
FOLDER gets accuracy.json, which holds scores alone, accuracy.md, the table of the README, and the plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llmco2_vllm.core.scores import score
from llmco2_vllm.training import figures
from llmco2_vllm.training.baselines import Baseline, CalibratedRoofline, light_gbm
from llmco2_vllm.training.dataset import read
from llmco2_vllm.training.evaluate import Predictions, Split, cross_validate, joined, phase
from llmco2_vllm.training.fit import Recipe, trainable
from llmco2_vllm.training.kernel_times import KernelTimes, read_kernel_times
from llmco2_vllm.training.observation import Observation
from llmco2_vllm.training.splits import (
    Fold,
    Group,
    across_devices,
    architecture,
    configuration,
    device,
    hold_out,
    leave_one_architecture_out,
    unseen_configurations,
    with_more,
)

FloatArray = NDArray[np.float64]
WORKLOADS = ("gpqa", "lm-arena-chat", "sourcegraph-fim")
# J/token of an operating point that was measured twice by accident (gpt-oss-20b, one H100, 96 sequences).
NOISE_PERCENT = 5.2
OTHERS = ("mlenergy_v2.csv", "splitwise_latency.csv")
OLDER, OLDER_SPLIT = "mlenergy-v2", "A100 to H100"
BATCH_BINS = (1, 9, 33, 129, 513)
OURS = "ours"
QUICK_STEPS = 15
BASELINES: tuple[Callable[[], Baseline], ...] = (CalibratedRoofline, light_gbm)


class Part(NamedTuple):
    """One split's folds, all of them or the untouched ones, and what each method predicts, joules, shape (n,)."""

    predictions: Predictions
    joules: dict[str, FloatArray]


class Data(NamedTuple):
    """Text rows with a step energy, rows of other sources, and times of single kernels."""

    rows: list[Observation]
    others: list[Observation]
    kernel_times: list[KernelTimes]

    @property
    def observations(self) -> list[Observation]:
        """All rows, the scored ones first."""
        return self.rows + self.others


def data_of(folder: Path) -> Data:
    """All sources. Raises OSError, ValueError."""
    sizes = folder / "model_configs.json"
    rows = read(folder / "mlenergy_v3.csv", sizes).observations
    others = [o for name in OTHERS for o in read(folder / name, sizes).observations]
    return Data(
        [o for o in rows if o.workload in WORKLOADS and o.step_energy_joules is not None],
        trainable(others),
        read_kernel_times(folder / "vidur_kernels.csv.gz", folder / "vidur_network.csv.gz"),
    )


def splits_of(data: Data) -> list[tuple[Split, ...]]:
    """(cross-validated, untouched) for each of the first three splits, (cross-validated,) for the last."""
    every, more = data.observations, range(len(data.rows), len(data.observations))
    groups: tuple[Group, ...] = (architecture, device, configuration)
    found = []
    for pair, group in zip(_splits_of_rows(data.rows), groups, strict=True):
        folds = [tuple(with_more(fold, every, more, group) for fold in split.folds) for split in pair]
        found.append(tuple(split._replace(folds=f) for split, f in zip(pair, folds, strict=True)))
    return [*found, (_older_devices(every),)]


def _older_devices(observations: Sequence[Observation]) -> Split:
    """Rows of engines of 2024 on an H100, by what was seen on an A100 and on other devices than the H100."""
    held = [
        i for i, o in enumerate(observations)
        if o.source == OLDER and o.device.name == "h100-sxm" and o.step_energy_joules is not None
    ]  # fmt: skip
    fold = Fold("others -> h100-sxm", (), tuple(held))
    return Split(OLDER_SPLIT, (with_more(fold, observations, range(len(observations)), device),), configuration, True)


def _splits_of_rows(observations: Sequence[Observation]) -> list[tuple[Split, Split]]:
    unseen, settings = hold_out(observations, architecture), hold_out(observations, configuration)
    inside = [observations[i] for i in unseen.train], [observations[i] for i in settings.train]
    folds = [_at(fold, unseen.train) for fold in leave_one_architecture_out(inside[0])]
    parts = [_at(fold, settings.train) for fold in unseen_configurations(inside[1])]
    pairs = across_devices(observations)
    names = ("unseen architecture", "unseen device", "unseen configuration")
    return [
        (Split(names[0], tuple(folds), architecture), Split(names[0], (unseen,), architecture)),
        (
            # What is new is the device; the architectures were seen on another one.
            Split(names[1], _within(pairs, settings.train, settings.train), configuration, True),
            Split(names[1], _within(pairs, settings.train, settings.test), configuration, True),
        ),
        (Split(names[2], tuple(parts), configuration), Split(names[2], (settings,), configuration)),
    ]


def _at(fold: Fold, positions: Sequence[int]) -> Fold:
    """A fold of some of the observations as one of all of them."""
    return Fold(fold.name, *(tuple(positions[i] for i in side) for side in (fold.train, fold.test)))


def _within(folds: Sequence[Fold], train: Sequence[int], test: Sequence[int]) -> tuple[Fold, ...]:
    learn, held = set(train), set(test)
    return tuple(
        Fold(fold.name, tuple(i for i in fold.train if i in learn), tuple(i for i in fold.test if i in held))
        for fold in folds
    )


def predict(data: Data, split: Split, recipe: Recipe, tick: Callable[[], None]) -> Part:
    """What the network and the baselines predict of the held-out rows."""
    observations = data.observations
    predictions = cross_validate(observations, split, recipe, tick, data.kernel_times)
    joules = {OURS: predictions.energy_joules}
    for make in BASELINES:
        parts = []
        for fold in split.folds:
            learn, held = fold.rows(observations)
            sources = {o.source for o in held}
            parts.append(make().fit(trainable(o for o in learn if o.source in sources)).predict(held))
        joules[make().name] = np.concatenate(parts)
    return Part(predictions, joules)


def scores_of(part: Part, method: str, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Scores of one method over the ``chosen`` rows, in percent."""
    if method == OURS:
        found = part.predictions.scores(chosen).to_dict()
    else:
        found = score(part.joules[method][chosen], part.predictions.measured_joules[chosen]).to_dict()
    return {name: value if value is None or name == "n" else round(value, 2) for name, value in found.items()}


def batch_bin(observation: Observation) -> str:
    """Requests that run at a time, as a range."""
    edges = [edge for edge in BATCH_BINS if edge <= observation.batch_limit]
    later = BATCH_BINS[len(edges) :]
    return f"{edges[-1]} to {later[0] - 1}" if later else f"{edges[-1]} and more"


GROUPS: dict[str, Callable[[Observation], str]] = {
    "workload": lambda o: o.workload,
    "model": lambda o: o.model_name,
    "device": lambda o: o.device.name,
    "batch": batch_bin,
    "phase": phase,
}


def summary(part: Part, grouped: bool = False) -> dict[str, Any]:
    """Scores of each method: all rows, without the stalled ones, and when ``grouped`` those by group."""
    observations = part.predictions.observations
    steady = np.array([not o.stalled for o in observations])
    found: dict[str, Any] = {}
    for method in part.joules:
        found[method] = {
            "all": scores_of(part, method, np.ones(len(steady), dtype=np.bool_)),
            "without_stalled": scores_of(part, method, steady),
        }
        for group, key in GROUPS.items() if grouped else ():
            names = np.array([key(o) for o in observations])
            order = sorted(set(names[steady].tolist()), key=_order)
            found[method].setdefault("by", {})[group] = {
                name: scores_of(part, method, steady & (names == name)) for name in order
            }
    return found


def _order(name: str) -> tuple[int, str]:
    """Ranges of batches by their first number, other names by the alphabet."""
    first = name.split()[0]
    return (int(first), name) if first.isdigit() else (0, name)


def run(data: Data, recipe: Recipe, progress: Progress) -> dict[str, tuple[Part, ...]]:
    """(cross-validated, untouched) by split."""
    every = splits_of(data)
    fits = sum(split.fits for pair in every for split in pair)
    bar = progress.add_task("", total=fits * recipe.steps)
    found = {}
    for pair in every:
        progress.update(bar, description=pair[0].name)
        found[pair[0].name] = tuple(predict(data, split, recipe, lambda: progress.advance(bar)) for split in pair)
    return found


def both(parts: tuple[Part, ...]) -> Part:
    """Every row once: those of the folds and the untouched ones, which no fold learned from."""
    methods = parts[0].joules
    joules = {method: np.concatenate([part.joules[method] for part in parts]) for method in methods}
    return Part(joined([part.predictions for part in parts]), joules)


KINDS = ("cross_validated", "untouched")


def document(found: dict[str, tuple[Part, ...]], data: Data, recipe: Recipe) -> dict[str, Any]:
    """All scores, and what they were computed on."""
    observations = data.rows
    return {
        "target": "step energy, joules, all devices of the instance",
        "data": "mlenergy_v3.csv, text rows",
        "also_learned_from": [*OTHERS, "vidur_kernels.csv.gz", "vidur_network.csv.gz"],
        "rows": len(observations),
        "other_rows": len(data.others),
        "kernel_time_points": len(data.kernel_times),
        "stalled_rows": sum(o.stalled for o in observations),
        "architectures": len({o.architecture for o in observations}),
        "noise_floor_percent": NOISE_PERCENT,
        "recipe": vars(recipe),
        "splits": {
            name: {
                **{kind: summary(part) for kind, part in zip(KINDS[: len(parts)], parts, strict=True)},
                "every_row": summary(both(parts), grouped=True),
            }
            for name, parts in found.items()
        },
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores of all splits, and of ours by group."""
    columns = ("mape", "median_ape", "eba_5", "eba_10", "eba_30", "bias", "coverage_90")
    first = Table(
        "split", "method", "n", *columns, title="Step energy, %, stalled rows left out (MAPE with them in brackets)"
    )
    for name, split in result["splits"].items():
        for kind, methods in split.items():
            for method, scores in methods.items():
                row = scores["without_stalled"]
                cells = [f"{row['mape']:.1f} ({scores['all']['mape']:.1f})"]
                cells += ["" if row[column] is None else f"{row[column]:.1f}" for column in columns[1:]]
                shown = f"{name}, {kind.replace('_', ' ')}"
                first.add_row(shown, method, str(row["n"]), *cells)
    second = Table("group", *result["splits"], title="Ours, every row: MAPE % (rows), coverage %")
    ours = {name: split["every_row"][OURS]["by"] for name, split in result["splits"].items()}
    for group in GROUPS:
        for key in sorted({key for by in ours.values() for key in by[group]}, key=_order):
            found = [by[group].get(key) for by in ours.values()]
            cells = [f"{s['mape']:.1f} ({s['n']}), {s['coverage_90']:.0f}" if s else "" for s in found]
            second.add_row(f"{group}: {key}", *cells)
    return [first, second]


NEVER_SEEN = {
    "unseen architecture": "the architecture",
    "unseen device": "the device (H100 from B200 and others, and back)",
    "unseen configuration": "the configuration",
    OLDER_SPLIT: "the H100, engines of 2024 (from A100 and others; ML.ENERGY v2)",
}


def markdown(result: dict[str, Any]) -> str:
    """The table of the README: MAPE and coverage, stalled rows left out."""
    head = (
        "never seen",
        "every row once",
        "cross-validated part",
        "untouched part",
        "Roofline (NNLS)",
        "LightGBM on physics",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, meaning in NEVER_SEEN.items():
        split = result["splits"][name]
        every = {method: scores["without_stalled"] for method, scores in split["every_row"].items()}
        ours, *others = every.values()
        parts = [split[kind][OURS]["without_stalled"]["mape"] if kind in split else None for kind in KINDS]
        cells = [f"{ours['mape']:.1f} %, {ours['coverage_90']:.0f} % inside"]
        cells += ["-" if part is None else f"{part:.1f} %" for part in (*parts, *(o["mape"] for o in others))]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, result: dict[str, Any], found: dict[str, tuple[Part, ...]]) -> None:
    """accuracy.json and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "accuracy.md").write_text(markdown(result), encoding="utf-8")
    held = {name: both(parts).predictions for name, parts in found.items()}
    figures.parity(held, NOISE_PERCENT, folder / "parity.png")
    figures.residuals_by_batch(held, NOISE_PERCENT, folder / "residuals_by_batch.png")
    # Groups of rows are rows of the picture, so only splits of the same table stand side by side.
    alike = {name: predictions for name, predictions in held.items() if name != OLDER_SPLIT}
    figures.coverage(alike, folder / "coverage.png")
    first = result["splits"]["unseen architecture"]["every_row"]
    errors = {method: {k: v["mape"] for k, v in scores["by"]["model"].items()} for method, scores in first.items()}
    figures.by_model(errors, NOISE_PERCENT, folder / "by_model.png")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mlenergy_v3.csv and model_configs.json")
    parser.add_argument("--write", type=Path, help="folder for accuracy.json and the plots")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} training steps per fit: a check, no result"
    )
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    recipe = Recipe(steps=QUICK_STEPS) if options.quick else Recipe()
    data = data_of(options.data)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        found = run(data, recipe, progress)
    result = document(found, data, recipe)
    if options.write:
        write(options.write, result, found)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    console = Console()
    for table in tables(result):
        console.print(table)
    console.print(f"noise floor: one operating point measured twice differs by {NOISE_PERCENT} % in J/token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
