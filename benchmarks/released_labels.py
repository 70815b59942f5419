"""Compare predictors on the LLMCO2 released labels, which are not energy.

    python -m benchmarks.released_labels --data DIR [--json] [--seeds N] [--draws N] [--epochs N]

DIR holds llmco2_a100.csv. Two settings:

a  the authors' split: learn from their train rows, score the others.
b  leave one model out: learn from train rows of the other models; score the rows of the model left out as they are
   predicted (zero-shot), and with one scale per phase, the median ratio over ten of its train rows, which are then
   not scored. Repeated for several draws of the ten.

Scores are MAPE in percent of the raw total (prefill + decode label) and of each label. Everything that is chosen is
chosen inside the rows that are learned from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmco2_vllm.core.scores import eba, mape, median_ape
from llmco2_vllm.training.released import (
    NOT_ENERGY,
    PHASES,
    ReleasedPredictor,
    ReleasedRows,
    Transfer,
    read_released,
)

FloatArray = NDArray[np.float64]
SHOTS = 10


class Predictor(Protocol):
    """Learns from rows, predicts labels of shape (n, 2)."""

    def fit(self, rows: ReleasedRows) -> Any: ...

    def predict(self, rows: ReleasedRows) -> FloatArray: ...


class Method(NamedTuple):
    """A predictor by name; ``make`` takes a seed, ``seeded`` says whether it matters."""

    name: str
    make: Callable[[int], Predictor]
    seeded: bool


class Options(NamedTuple):
    """Seeds of methods that draw at random, draws of ten requests, epochs of the networks."""

    seeds: int = 3
    draws: int = 10
    epochs: int = 30


class FourCoefficients:
    """prefill = a + b prompt; decode = (output - 1) (c + d mean context); for an unknown model, fitted on all rows."""

    def __init__(self) -> None:
        self._coefficients: dict[str, list[FloatArray]] = {}

    def fit(self, rows: ReleasedRows) -> FourCoefficients:
        """Least squares of relative errors, by model and over all."""
        for name in [*rows.models, ""]:
            own = rows.where(rows.model == name) if name else rows
            pairs = zip(self._terms(own), own.labels.T, strict=True)
            self._coefficients[name] = [
                np.linalg.lstsq(terms / labels[:, None], np.ones(len(own)), rcond=None)[0] for terms, labels in pairs
            ]
        return self

    def predict(self, rows: ReleasedRows) -> FloatArray:
        """Prefill and decode label, shape (n, 2)."""
        found = np.empty((len(rows), 2))
        for name in rows.models:
            own = rows.model == name
            coefficients = self._coefficients.get(name, self._coefficients[""])
            for column, terms in enumerate(self._terms(rows.where(own))):
                found[own, column] = np.maximum(terms @ coefficients[column], 1e-9)
        return found

    @staticmethod
    def _terms(rows: ReleasedRows) -> tuple[FloatArray, FloatArray]:
        steps = rows.output - 1.0
        prefill = np.column_stack([np.ones(len(rows)), rows.prompt])
        return prefill, np.column_stack([steps, steps * (rows.prompt + rows.output / 2)])


class Forest:
    """A random forest of scikit-learn on the raw columns and the model's parameters, logarithms of labels."""

    def __init__(self, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        self._forest = RandomForestRegressor(200, random_state=seed, n_jobs=1)

    def fit(self, rows: ReleasedRows) -> Forest:
        """Learn both labels."""
        self._forest.fit(self._columns(rows), np.log(rows.labels))
        return self

    def predict(self, rows: ReleasedRows) -> FloatArray:
        """Prefill and decode label, shape (n, 2)."""
        predicted: FloatArray = np.exp(self._forest.predict(self._columns(rows)))
        return predicted

    @staticmethod
    def _columns(rows: ReleasedRows) -> FloatArray:
        from llmco2_vllm.training.paper_networks import served

        sizes = {name: served(name).model.parameters for name in rows.models}
        parameters = np.array([sizes[str(name)] for name in rows.model], dtype=np.float64)
        return np.column_stack([rows.prompt, rows.output, rows.batch, parameters])


def methods(options: Options) -> list[Method]:
    """All methods, ours first."""
    import torch

    from llmco2_vllm.training.paper_networks import Training, llmco2_network, nnlqp_network

    torch.set_num_threads(1)

    def training(seed: int) -> Training:
        return Training(epochs=options.epochs, seed=seed)

    return [
        Method("ours: curves over tokens", lambda seed: ReleasedPredictor(), False),
        Method("LLMCO2 network (our code)", lambda seed: llmco2_network(training(seed)), True),
        Method("NNLQP-like network (our code)", lambda seed: nnlqp_network(training(seed)), True),
        Method("random forest", Forest, True),
        Method("four coefficients per model", lambda seed: FourCoefficients(), False),
    ]


def errors(predicted: FloatArray, rows: ReleasedRows) -> dict[str, float]:
    """MAPE of the raw total and of each label, and more of the total, all in percent."""
    guess, truth = predicted.sum(axis=1), rows.labels.sum(axis=1)
    found = {"total": mape(guess, truth), "median": median_ape(guess, truth), "eba_5": eba(guess, truth, 5.0)}
    for column, phase in enumerate(PHASES):
        found[str(phase)] = mape(predicted[:, column], rows.labels[:, column])
    return found


def summary(trials: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over trials, and the standard deviation of the total."""
    mean = {name: round(float(np.mean([trial[name] for trial in trials])), 3) for name in trials[0]}
    return {**mean, "total_spread": round(float(np.std([trial["total"] for trial in trials])), 3)}


def authors_split(method: Method, rows: ReleasedRows, options: Options) -> dict[str, Any]:
    """Setting a; spread over seeds."""
    learn, held = rows.where(rows.split == "train"), rows.where(rows.split != "train")
    trials: list[dict[str, float]] = []
    by_model: dict[str, float] = {}
    for seed in range(options.seeds if method.seeded else 1):
        predicted = method.make(seed).fit(learn).predict(held)
        trials.append(errors(predicted, held))
        if not by_model:
            masks = {name: held.model == name for name in held.models}
            by_model = {n: round(errors(predicted[m], held.where(m))["total"], 3) for n, m in masks.items()}
    return {**summary(trials), "total_by_model_first_seed": by_model}


def left_out(method: Method, rows: ReleasedRows, name: str, options: Options) -> dict[str, Any]:
    """Setting b for one model; spread over draws of ten requests, with the first seed."""
    learn = rows.where((rows.split == "train") & (rows.model != name))
    own = rows.where(rows.model == name)
    fitted = method.make(0).fit(learn)
    transfer = Transfer(fitted, learn) if isinstance(fitted, ReleasedPredictor) else None
    zero = transfer.zero_shot(own) if transfer else fitted.predict(own)
    trials = []
    for draw in range(options.draws):
        candidates = np.flatnonzero(own.split == "train")
        few = np.random.default_rng(draw).choice(candidates, SHOTS, replace=False)
        rest = np.setdiff1d(np.arange(len(own)), few)
        if transfer:
            predicted = transfer.scaled(own.where(rest), own.where(few))
        else:
            predicted = zero[rest] * np.median(own.labels[few] / zero[few], axis=0)
        trials.append(errors(predicted, own.where(rest)))
    return {"zero_shot": summary([errors(zero, own)]), "ten_requests": summary(trials)}


def repeats(rows: ReleasedRows) -> dict[str, dict[str, float]]:
    """How far repeated requests lie from the median of their own group, in percent of the total: a lower bound.

    Groups of three or more equal requests.
    """
    found = {}
    for name in rows.models:
        own = rows.where(rows.model == name)
        total = own.labels.sum(axis=1)
        keys = np.stack([own.prompt, own.output], axis=1)
        group, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)[1:]
        group = group.ravel()
        off = [np.abs(np.median(total[group == key]) / total[group == key] - 1) for key in np.flatnonzero(size >= 3)]
        if off:
            every = np.concatenate(off) * 100
            found[name] = {"rows": float(len(every)), "mean": round(float(every.mean()), 3)}
    return found


def run(rows: ReleasedRows, options: Options, progress: Progress) -> dict[str, Any]:
    """All methods in both settings."""
    result: dict[str, Any] = {"note": NOT_ENERGY, "repeats": repeats(rows), "options": options._asdict()}
    result |= {"authors_split": {}, "leave_one_model_out": {}}
    chosen = methods(options)
    bar = progress.add_task("methods", total=len(chosen) * (1 + len(rows.models)))
    for method in chosen:
        progress.update(bar, description=method.name)
        result["authors_split"][method.name] = authors_split(method, rows, options)
        progress.advance(bar)
        models = result["leave_one_model_out"].setdefault(method.name, {})
        for name in rows.models:
            models[name] = left_out(method, rows, name, options)
            progress.advance(bar)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """Both settings as tables."""
    first = Table("method", "total", "spread over seeds", "prefill", "decode", title="a  authors' split, MAPE %")
    for name, scores in result["authors_split"].items():
        columns = ("total", "total_spread", "prefill", "decode")
        first.add_row(name, *(f"{scores[column]:.2f}" for column in columns))
    models = list(next(iter(result["leave_one_model_out"].values())))
    title = (
        f"b  model left out, total MAPE %: zero-shot > one scale per phase from {SHOTS} requests (spread over draws)"
    )
    second = Table("method", *(model.split("/")[-1] for model in models), "mean", title=title)
    for name, by_model in result["leave_one_model_out"].items():
        cells = [(by_model[model]["zero_shot"], by_model[model]["ten_requests"]) for model in models]
        shown = [f"{zero['total']:.0f} > {ten['total']:.2f} ({ten['total_spread']:.2f})" for zero, ten in cells]
        means = [float(np.mean([pair[side]["total"] for pair in cells])) for side in (0, 1)]
        second.add_row(name, *shown, f"{means[0]:.0f} > {means[1]:.2f}")
    return [first, second]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with llmco2_a100.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    for name, value in Options()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    given = parser.parse_args(arguments)
    options = Options(given.seeds, given.draws, given.epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        result = run(read_released(given.data / "llmco2_a100.csv"), options, progress)
    if given.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    console = Console()
    for table in tables(result):
        console.print(table)
    for name, floor in result["repeats"].items():
        console.print(f"{name}: {floor['rows']:.0f} repeated requests lie {floor['mean']} % from their group's median")
    console.print(NOT_ENERGY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
