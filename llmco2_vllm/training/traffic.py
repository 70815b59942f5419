"""What a deployment can compute in one step, and which of these steps its traffic asks for.

A Candidate is a step that can be measured, a Space holds the limits of a deployment, Traffic says how often the
neighbourhood of a candidate occurs. Everything is deterministic: what is drawn is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.training.table import RowError, read_table

FloatArray = NDArray[np.float64]
# Steps that stand for a traffic; the error of a share of one half is then 1.6 points.
NODES = 1000
# vLLM 0.32 gives this share of the device memory to weights, activations and cache (gpu_memory_utilization).
MEMORY_UTILIZATION = 0.92
# Assumed where no predictor says how long a step takes; Qwen3-14B on a B200 takes 0.034 s (ML.ENERGY v3).
STEP_SECONDS = 0.03
# How often the time of a step and the number of running requests, which depends on it, are matched.
_MATCHING_ROUNDS = 4
TRACE_COLUMNS = ("t_s", "input_tokens", "output_tokens")


class Candidate(NamedTuple):
    """A step of like requests; counts.

    prefill_sequences, prefill_tokens: requests that prefill, and tokens each of them computes in this step.
    decode_sequences: requests that decode one token each.
    context_tokens: cached tokens of each decoding request; in a step without decode, of each prefilling one
    (a prefix that was found in the cache, or earlier chunks of the prompt). Prefill beside decode starts at zero.
    """

    prefill_sequences: int
    prefill_tokens: int
    decode_sequences: int
    context_tokens: int

    @property
    def batch(self) -> BatchShape:
        """The step as predictors see it; every sequence yields a sample."""
        sequences, each, decoding, context = self
        prefill = decode = EMPTY_PHASE
        if sequences:
            known = 0 if decoding else context
            pairs = sequences * (each * known + each * (each + 1) // 2)
            prefill = PhaseShape(sequences, sequences * each, pairs, sequences * (known + each), sequences)
        if decoding:
            decode = PhaseShape(decoding, decoding, decoding * (context + 1), decoding * (context + 1), decoding)
        return BatchShape(prefill, decode)

    @classmethod
    def from_batch(cls, batch: BatchShape) -> Candidate:
        """The step of like requests with the means of ``batch``; drafts count as further context."""
        prefill, decode, _ = batch
        each = round(prefill.tokens / prefill.sequences) if prefill.sequences else 0
        context = 0
        if decode.sequences:
            context = max(1, round(decode.kv_tokens / decode.sequences) - 1)
        elif prefill.sequences:
            context = max(0, round(prefill.kv_tokens / prefill.sequences) - each)
        return cls(int(prefill.sequences), each, int(decode.sequences), context)


@dataclass(frozen=True)
class Space:
    """Limits of a deployment, named as vLLM's options; ``kv_capacity_tokens`` is what its log calls KV cache size."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_capacity_tokens: int

    def __post_init__(self) -> None:
        self._at_least("max_num_seqs", 1, "1 or more")
        self._at_least("max_model_len", 3, "3 or more")
        self._at_least("max_num_batched_tokens", self.max_num_seqs, f"max_num_seqs={self.max_num_seqs} or more")
        allowed = f"max_model_len={self.max_model_len} or more, as one request must fit"
        self._at_least("kv_capacity_tokens", self.max_model_len, allowed)

    def _at_least(self, name: str, least: int, allowed: str) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name}={getattr(self, name)!r} is not possible; allowed: {allowed}")

    def valid(self, candidate: Candidate) -> bool:
        """Whether the deployment can run the step: limits on requests, tokens, length and cache all hold.

        A request must stay below max_model_len with the tokens of the step, as it ends when it gets there.
        """
        sequences, each, decoding, context = candidate
        known = 0 if decoding else context
        cached = sequences * (each + known) + decoding * (context + 1)
        return (
            min(candidate) >= 0
            and 1 <= sequences + decoding <= self.max_num_seqs
            and (sequences > 0) == (each > 0)
            and (context > 0 or not decoding)
            and sequences * each + decoding <= self.max_num_batched_tokens
            and max(each + known, (context + 1) * (decoding > 0)) < self.max_model_len
            and cached <= self.kv_capacity_tokens
        )

    def clip(self, candidate: Candidate) -> Candidate:
        """The candidate shrunk until it is valid; tokens of prefill are kept at the expense of the context."""
        sequences, each, decoding, context = (max(0, value) for value in candidate)
        room, capacity = self.max_model_len - 1, self.kv_capacity_tokens
        if not each:
            sequences = 0
        decoding = min(decoding, self.max_num_seqs) if decoding or sequences else 1
        sequences = min(sequences, self.max_num_seqs - decoding, capacity // 2)
        decoding = min(decoding, (capacity - sequences) // 2)
        if not sequences:
            context = min(max(1, context), room - 1, capacity // decoding - 1)
            return Candidate(0, 0, decoding, context)
        each = min(each, room, (self.max_num_batched_tokens - decoding) // sequences)
        each = min(each, (capacity - 2 * decoding) // sequences)
        if decoding:
            context = min(max(1, context), room - 1, (capacity - sequences * each) // decoding - 1)
        else:
            context = min(context, room - each, capacity // sequences - each)
        return Candidate(sequences, each, decoding, context)

    def grid(self, levels: int) -> list[Candidate]:
        """Distinct valid candidates, up to ``levels`` log-spaced values per axis and none of a phase; sorted.

        Tokens and context are spaced up to what the requests of the step leave of them, so the edges are there.
        """
        counts = (0, *_spaced(self.max_num_seqs, levels))
        found = set()
        for sequences in counts:
            for decoding in counts:
                if sequences + decoding:
                    found |= set(self._row(sequences, decoding, levels))
        return sorted(found)

    def _row(self, sequences: int, decoding: int, levels: int) -> Iterable[Candidate]:
        longest = self.clip(Candidate(sequences, self.max_model_len, decoding, 1)).prefill_tokens
        for each in _spaced(longest, levels) if longest else (0,):
            deepest = self.clip(Candidate(sequences, each, decoding, self.max_model_len)).context_tokens
            for context in (*_spaced(deepest, levels), *(() if decoding else (0,))):
                yield self.clip(Candidate(sequences, each, decoding, context))

    def coordinates(self, candidates: Sequence[Candidate]) -> FloatArray:
        """Log features in the unit cube, shape (n, 4): log(1 + count), each axis scaled to its limit."""
        limits = (self.max_num_seqs, self.max_model_len - 1, self.max_num_seqs, self.max_model_len - 1)
        counts = np.array(candidates, dtype=np.float64).reshape(len(candidates), 4)
        scaled: FloatArray = np.log1p(counts) / np.log1p(np.array(limits, dtype=np.float64))
        return scaled


class Served(NamedTuple):
    """Requests of a trace in the order of their arrival, arrays of one length: seconds, tokens, tokens."""

    arrival_seconds: FloatArray
    input_tokens: FloatArray
    output_tokens: FloatArray


@dataclass(frozen=True)
class Traffic:
    """Steps that stand for what a deployment serves. shares: of the steps of each kind, sum 1. source: for people."""

    candidates: tuple[Candidate, ...]
    shares: FloatArray
    source: str

    @classmethod
    def from_steps(cls, space: Space, steps: Iterable[Sequence[float]], source: str) -> Traffic:
        """Traffic of equally frequent steps, each with the fields of a Candidate, clipped to ``space``."""
        counted: dict[Candidate, int] = {}
        for step in steps:
            candidate = space.clip(Candidate(*(round(value) for value in step)))
            counted[candidate] = counted.get(candidate, 0) + 1
        if not counted:
            raise ValueError(f"{source}: no step to estimate the traffic from")
        order = sorted(counted)
        shares = np.array([counted[candidate] for candidate in order], dtype=np.float64)
        return cls(tuple(order), shares / shares.sum(), source)

    @classmethod
    def uniform(cls, space: Space, seed: int = 0, nodes: int = NODES) -> Traffic:
        """Nothing known: a quarter of the steps prefill only, a quarter decode only, all counts log-uniform."""
        draws = np.random.default_rng(seed).random((nodes, 5))
        limits = np.array([space.max_num_seqs, space.max_num_batched_tokens, space.max_num_seqs, space.max_model_len])
        steps = np.exp(draws[:, :4] * np.log(limits))
        # A prefill of many requests has short prompts: the token budget is drawn, not the prompt.
        steps[:, 1] = np.maximum(1.0, steps[:, 1] / steps[:, 0])
        steps[draws[:, 4] < 0.25, 2] = 0
        steps[draws[:, 4] > 0.75, :2] = 0
        return cls.from_steps(space, steps, "uniform: no traffic given")

    @classmethod
    def observed(cls, space: Space, lengths: FloatArray, concurrency: FloatArray, seed: int = 0) -> Traffic:
        """Steady state from observed requests. lengths: (n, 2) prompt and output tokens; concurrency: (k,) running.

        A running request is met in proportion to its output, at any point of it; one in its output leaves per step
        and is replaced, so prefills per step are Poisson with mean concurrency / mean output.
        """
        draw = np.random.default_rng(seed)
        prompt, output = lengths.astype(np.float64).T
        running = draw.choice(np.atleast_1d(concurrency), NODES)
        arrivals = draw.poisson(running / output.mean())
        steps = np.zeros((NODES, 4))
        for step, requests, joining in zip(steps, running, arrivals, strict=True):
            joined = prompt[draw.integers(len(prompt), size=max(1, joining))]
            met = draw.choice(len(prompt), size=max(1, round(requests)), p=output / output.sum())
            context = (prompt[met] + draw.random(len(met)) * output[met]).mean()
            step[:] = joining, joined.mean() if joining else 0, len(met), context
        return cls.from_steps(space, steps, "observed requests")

    @classmethod
    def replayed(
        cls, space: Space, served: Served, seconds: Callable[[BatchShape], float] | None = None, source: str = "trace"
    ) -> Traffic:
        """Steps of a trace with an engine whose steps take ``seconds`` (of a batch; STEP_SECONDS when not given).

        All steps take their mean time, which is matched to the steps it leads to; queueing is left out.
        """
        length = STEP_SECONDS
        for _ in range(_MATCHING_ROUNDS):
            traffic = cls.from_steps(space, _steps(served, length), source)
            if seconds is None:
                break
            each = [seconds(candidate.batch) for candidate in traffic.candidates]
            length = float(np.array(each) @ traffic.shares)
        return traffic

    @classmethod
    def from_trace(cls, space: Space, path: Path, seconds: Callable[[BatchShape], float] | None = None) -> Traffic:
        """As :meth:`replayed`, from a CSV file, plain or gzipped, with the columns of TRACE_COLUMNS."""
        return cls.replayed(space, read_trace(path), seconds, path.name)


def read_trace(path: Path) -> Served:
    """Requests of a CSV file with columns t_s (seconds), input_tokens and output_tokens, as the Azure traces of 2023.

    Raises ValueError that names the line and column, or the missing column.
    """
    table = read_table(path)
    missing = [name for name in TRACE_COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: column {missing[0]} is missing; expected {', '.join(TRACE_COLUMNS)}")
    if table.bad_rows:
        raise ValueError(f"{path}: {table.bad_rows[0]}")
    if not table.rows:
        raise ValueError(f"{path}: holds no request")
    found = []
    for row in table.rows:
        try:
            found.append((row.number_or_zero("t_s"), row.number("input_tokens"), row.number("output_tokens")))
        except RowError as error:
            raise ValueError(f"{path}: line {row.line}, {error}") from None
    columns = np.array(sorted(found), dtype=np.float64).T
    return Served(*columns)


def _steps(served: Served, seconds: float) -> FloatArray:
    """NODES busy steps spread evenly over a trace, fields of a Candidate; shape (n, 4)."""
    start, prompt, output = served
    end = start + output * seconds
    last = np.argsort(end, kind="stable")
    # Evenly over the steps in which something runs; those of an idle night do not count.
    busy = np.unique(np.concatenate([np.floor(start / seconds), *_spans(start, end, seconds)]))
    chosen = busy[np.unique(np.linspace(0, len(busy) - 1, NODES).round().astype(int))]
    begin = chosen * seconds
    started, ended = np.searchsorted(start, begin), np.searchsorted(end[last], begin)
    joined = np.searchsorted(start, begin + seconds)
    offset = prompt - start / seconds  # context minus the number of the step
    running = (started - ended).astype(np.float64)
    context = _before(offset, started) - _before(offset[last], ended) + running * chosen
    prompts = _before(prompt, joined) - _before(prompt, started)
    joining = (joined - started).astype(np.float64)
    steps = [joining, prompts / np.maximum(1, joining), running, context / np.maximum(1, running)]
    return np.column_stack(steps)


def _spans(start: FloatArray, end: FloatArray, seconds: float) -> list[FloatArray]:
    """Numbers of the steps of each stretch of time in which requests run without a pause."""
    reach = np.maximum.accumulate(end)
    breaks = np.flatnonzero(start[1:] > reach[:-1])
    begins = start[np.concatenate([[0], breaks + 1])]
    ends = reach[np.concatenate([breaks, [len(start) - 1]])]
    return [np.arange(np.ceil(a / seconds), b / seconds) for a, b in zip(begins, ends, strict=True)]


def _before(values: FloatArray, count: NDArray[np.intp]) -> FloatArray:
    """Sum of the first ``count`` values, for each count."""
    sums: FloatArray = np.concatenate([[0.0], np.cumsum(values)])[count]
    return sums


def _spaced(limit: int, levels: int) -> tuple[int, ...]:
    """Up to ``levels`` whole numbers from 1 to ``limit``, evenly spaced in their logarithm."""
    if limit < 1:
        return ()
    return tuple(sorted({int(value) for value in np.geomspace(1, limit, levels).round()}))


def kv_capacity_tokens(model: ModelSpec, device: DeviceSpec, topology: Topology) -> int:
    """Tokens the cache of one engine holds: what the weights leave of the memory vLLM takes; zero or more.

    Activations, CUDA graphs and savings by sliding windows are left out. Key heads are replicated, and latent
    caches whole, on every tensor-parallel rank.
    """
    head = model.parameters - model.non_embedding_parameters
    weights = model.non_embedding_parameters * model.weight_bytes + head * model.activation_bytes
    ranks = 1 if model.latent else min(topology.tensor_parallel, model.kv_heads)
    per_token = model.cache_width * model.attention_layers * model.kv_bytes / ranks
    devices = topology.engine_devices
    left = MEMORY_UTILIZATION * device.memory_bytes - weights / devices
    return max(0, int(left * topology.pipeline_parallel / per_token)) if per_token else 2**31
