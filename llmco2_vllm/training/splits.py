"""Splits of observations into folds without leaks: near-copies of a held-out row are held out with it.

Positions index the sequence of observations that was given. Nothing is drawn at random: groups are ordered by a
hash of their key and a seed, so a split depends neither on the order of the rows nor on the process.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import ceil

from llmco2_vllm.training.observation import Observation

Observations = Sequence[Observation]
Group = Callable[[Observation], Hashable]


@dataclass(frozen=True)
class Fold:
    """Positions to learn from and positions to predict, both ascending and disjoint."""

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]

    def rows(self, observations: Observations) -> tuple[list[Observation], list[Observation]]:
        """(observations to learn from, observations to predict)."""
        return [observations[position] for position in self.train], [observations[position] for position in self.test]


def architecture(observation: Observation) -> Hashable:
    """Group of all checkpoints and precisions of one architecture."""
    return observation.architecture


def configuration(observation: Observation) -> Hashable:
    """Group of one operating point: deployment and batch limit.

    Checkpoints that differ only in weights count as one, their rows are repeats of each other.
    """
    return observation.architecture, observation.deployment._replace(model_name=""), observation.batch_limit


def device(observation: Observation) -> Hashable:
    """Group of all rows of one kind of device."""
    return observation.device.name


def leave_one_architecture_out(observations: Observations) -> list[Fold]:
    """One fold per architecture, in which no checkpoint of it is learned from."""
    groups = _positions(observations, architecture)
    found = sorted({observation.architecture for observation in observations})
    return [_fold(str(tuple(group)), groups[group], observations) for group in found]


def unseen_configurations(observations: Observations, folds: int = 5, seed: int = 0) -> list[Fold]:
    """Folds of about equal size in which no operating point is on both sides. ValueError for too few of them."""
    groups = _positions(observations, configuration)
    if not 2 <= folds <= len(groups):
        raise ValueError(f"folds={folds!r} is not possible with {len(groups)} configurations; allowed: 2 to as many")
    parts: list[list[int]] = [[] for _ in range(folds)]
    for group in _shuffled(groups, seed):
        min(parts, key=len).extend(groups[group])
    return [_fold(f"part {number} of {folds}", part, observations) for number, part in enumerate(parts, 1)]


def across_devices(observations: Observations) -> list[Fold]:
    """For every ordered pair of devices one fold that learns from the first and predicts the second."""
    groups = _positions(observations, device)
    names = sorted(str(name) for name in groups)
    pairs = [(one, other) for one in names for other in names if one != other]
    return [Fold(f"{one} -> {other}", tuple(groups[one]), tuple(groups[other])) for one, other in pairs]


def with_more(fold: Fold, observations: Observations, more: Sequence[int], group: Group) -> Fold:
    """``fold`` that also learns from the positions ``more``, but for those of a group that it predicts."""
    held = {group(observations[position]) for position in fold.test}
    added = (position for position in more if group(observations[position]) not in held)
    return Fold(fold.name, tuple(sorted({*fold.train, *added})), fold.test)


def hold_out(observations: Observations, group: Group, share: float = 0.15, seed: int = 0) -> Fold:
    """A fold to be reported once: whole groups, about ``share`` of them, at least one on each side.

    Everything that is tuned is tuned on ``train`` alone, by folds of its own.
    """
    groups = _positions(observations, group)
    if not 0 < share < 1 or len(groups) < 2:
        raise ValueError(f"share={share!r} of {len(groups)} groups is not possible; allowed: 0 to 1, of two or more")
    count = min(ceil(share * len(groups)), len(groups) - 1)
    held = [position for key in _shuffled(groups, seed)[:count] for position in groups[key]]
    return _fold("hold-out", held, observations)


def _positions(observations: Observations, group: Group) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, observation in enumerate(observations):
        groups[group(observation)].append(position)
    return dict(groups)


def _shuffled(groups: dict[Hashable, list[int]], seed: int) -> list[Hashable]:
    """Keys in the order of a hash that is the same in every process."""
    return sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}|{key!r}".encode(), digest_size=16).digest())


def _fold(name: str, held: Sequence[int], observations: Observations) -> Fold:
    test = set(held)
    return Fold(name, tuple(p for p in range(len(observations)) if p not in test), tuple(sorted(test)))
