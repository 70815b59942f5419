"""Steady continuous batching: what an engine whose batch is always full does per step, priced by a predictor.

Every request takes part in ``c`` prefill steps (one, unless its prompt is longer than a step may hold) and in o - 1
decode steps, as its prefill yields the first output token. With B requests running, B c / (c + o - 1) of them prefill
in the mean step and the others decode; whole numbers of them are mixed so that the mean holds. Prefill and decode share
a step, as under vLLM's chunked prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmco2_vllm.advice.workload import Workload
from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.estimate import Predictor


@dataclass(frozen=True)
class Steady:
    """One engine at full batch, predicted.

    running: requests in the batch. requests_per_second, output_tokens_per_second: throughput.
    ttft_seconds: of a request that finds a free slot: the rest of the running step, then its own prefill steps.
    tpot_seconds: mean time between output tokens; None when no request has a second one.
    latency_seconds: TTFT + (mean output - 1) TPOT.
    joules_per_request, lower_joules, upper_joules: all devices of the engine, and its 90 % interval.
    """

    running: int
    requests_per_second: float
    output_tokens_per_second: float
    ttft_seconds: float
    tpot_seconds: float | None
    latency_seconds: float
    joules_per_request: float
    lower_joules: float
    upper_joules: float
    in_distribution: bool


def steady(predictor: Predictor, workload: Workload, batch_limit: int, token_budget: int) -> Steady:
    """The engine at ``batch_limit`` requests, at most ``token_budget`` tokens a step (vLLM's max_num_batched_tokens).

    Fewer run when prompts would not fit the budget: each step computes B (p + o - 1) / (c + o - 1) tokens in the mean.
    By Little's law running requests / throughput is their time in the batch, which is the latency less the first wait.
    """
    prefill_steps = workload.prefill_steps(max(1, token_budget - batch_limit))
    decode_steps = workload.output_mean - 1
    visits = prefill_steps + decode_steps
    fitting = math.floor(token_budget * visits / (workload.prompt_mean + decode_steps))
    running = max(1, min(batch_limit, fitting))
    seconds = squared = joules = low = high = 0.0
    prefilling = decoding = prefill_seconds = decode_seconds = 0.0
    known = True
    for share, count in _mix(running, running * prefill_steps / visits):
        found = predictor.estimate(_batch(workload, count, running - count, prefill_steps))
        duration = found.duration_seconds
        seconds += share * duration
        squared += share * duration**2
        joules += share * found.energy_joules
        low += share * found.energy_joules * found.lower_ratio
        high += share * found.energy_joules * found.upper_ratio
        prefilling, decoding = prefilling + share * count, decoding + share * (running - count)
        prefill_seconds += share * count * duration
        decode_seconds += share * (running - count) * duration
        known &= found.in_distribution
    per_step = running / visits
    # A request arrives at any moment of a step: what is left of it is E[T^2] / 2 E[T]. Alone it finds none.
    wait = squared / (2 * seconds) if running > 1 else 0.0
    ttft = wait + prefill_steps * prefill_seconds / prefilling
    tpot = decode_seconds / decoding if decoding > 0 else None
    rate = per_step / seconds
    return Steady(
        running, rate, rate * workload.output_mean, ttft, tpot, ttft + decode_steps * (tpot or 0.0),
        joules / per_step, low / per_step, high / per_step, known,
    )  # fmt: skip


def _mix(running: int, prefilling: float) -> list[tuple[float, int]]:
    """(share of steps, requests that prefill in them): the two whole numbers around ``prefilling``."""
    whole = min(running, math.floor(prefilling))
    more = min(1.0, prefilling - whole)
    steps = [(1 - more, whole), (more, whole + 1)]
    return [(share, count) for share, count in steps if share > 0 and count <= running]


def _batch(workload: Workload, prefilling: int, decoding: int, prefill_steps: float) -> BatchShape:
    """A step with mean requests; of a prompt in chunks the mean chunk."""
    prefill = decode = EMPTY_PHASE
    if prefilling:
        tokens = max(prefilling, round(prefilling * workload.prompt_mean / prefill_steps))
        pairs = max(tokens, round(prefilling * workload.prefill_pairs / prefill_steps))
        # Chunk j of c ends at p j / c: the mean over the chunks is p (c + 1) / 2 c.
        cached = max(tokens, round(prefilling * workload.prompt_mean * (prefill_steps + 1) / (2 * prefill_steps)))
        prefill = PhaseShape(prefilling, tokens, pairs, cached, math.ceil(prefilling / prefill_steps))
    if decoding:
        context = round(decoding * workload.decode_context)
        decode = PhaseShape(decoding, decoding, context, context, decoding)
    return BatchShape(prefill, decode)
