"""Which samples a store of bounded size keeps: one of every regime first, then the newer and the worse predicted.

The keeping side of focused energy data sampling (LLMCO2, arXiv:2410.02950); which steps to measure next is the other,
in training/sampling.py. The rules are ours in their detail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
# Half octaves: samples of one cell differ by at most 41 % in every count.
_CELLS_PER_OCTAVE = 2


def cells(regimes: ArrayLike) -> NDArray[np.int64]:
    """Cell of each sample, shape (n,), numbered from 0; regimes: counts of any kind, shape (n, k), 0 or more."""
    counts = np.asarray(regimes, dtype=np.float64)
    if not len(counts):
        return np.zeros(0, dtype=np.int64)
    levels = np.floor(_CELLS_PER_OCTAVE * np.log2(1 + counts)).astype(np.int64)
    # One number per cell: sorting rows would take far longer, and hold up all other threads.
    number = np.zeros(len(counts), dtype=np.int64)
    for level in levels.T:
        number = np.unique(number * (int(level.max()) + 1) + level, return_inverse=True)[1].reshape(-1)
    return number.astype(np.int64)


def coverage_scores(regimes: ArrayLike, errors: ArrayLike) -> FloatArray:
    """How much a store would lose with each sample, shape (n,), oldest sample first; higher is kept longer.

    Samples alike within half an octave of every count share a cell. The newest of a cell scores 1, the next 1/2, then
    1/3 ... so that rare steps outlive common ones; a cell counts for as much more as its mean absolute relative error
    is above that of all. errors: ratios of either sign, shape (n,); NaN where unknown, which speaks for no cell.
    """
    return _scores(cells(regimes), errors)[0]


def worth_keeping(
    regimes: ArrayLike, errors: ArrayLike, capacity: float, sizes: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Which of the samples (oldest first) a store pruned to ``capacity`` keeps, shape (n,).

    sizes: of each sample, in the unit of ``capacity``; without them samples are counted. The newest of every cell comes
    before the second of any, then the score decides, of two alike the newer stays. What does not fit is passed
    over for what does, so that no sample left out would fit in the room that is left.
    """
    scores, rank = _scores(cells(regimes), errors)
    taken = np.ones(len(scores)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    # The last key counts first.
    order = np.lexsort((-np.arange(len(scores)), -scores, rank > 1))
    kept = np.zeros(len(scores), dtype=bool)
    room = float(capacity)
    for index, size in zip(order.tolist(), taken[order].tolist(), strict=True):
        if size <= room:
            kept[index] = True
            room -= size
    return kept


def _scores(cell: NDArray[np.int64], errors: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    """Scores, and the rank of each sample in its cell: 1 for the newest."""
    if not len(cell):
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    order = np.argsort(cell, kind="stable")  # by cell, within it from old to new
    last = np.cumsum(np.bincount(cell))[cell[order]]
    rank = np.empty(len(cell), dtype=np.int64)
    rank[order] = last - np.arange(len(cell))
    scores: FloatArray = _weights(cell, np.abs(np.asarray(errors, dtype=np.float64)))[cell] / rank
    return scores, rank


def _weights(cell: NDArray[np.int64], errors: FloatArray) -> FloatArray:
    """Mean error of each cell over that of all, at least 1; 1 where no error is known."""
    known = np.isfinite(errors)
    count = int(cell.max()) + 1
    overall = float(errors[known].mean()) if known.any() else 0.0
    if not overall:
        return np.ones(count)
    numbers = np.bincount(cell[known], minlength=count)
    sums = np.bincount(cell[known], errors[known], minlength=count)
    weights: FloatArray = np.maximum(1.0, sums / np.maximum(numbers, 1) / overall)
    return weights
