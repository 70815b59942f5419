"""Observation: one measured operating point of a model on devices, and the steps it consisted of on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmco2_vllm.core.batch import EMPTY_PHASE, BatchShape, PhaseShape
from llmco2_vllm.core.hardware import DeviceSpec, Topology
from llmco2_vllm.core.model import ModelSpec

# A mean step above this many median decode steps waited for something else than decoding.
STALLED_RATIO = 3.0
# Share of steps, and what each of them computes. Counts are means, so fractions of a request are meant.
StepMix = tuple[tuple[float, BatchShape], ...]


class Architecture(NamedTuple):
    """Sizes that all checkpoints and precisions of one architecture share; names and vocabularies differ.

    width: of one expert, or of the MLP of a model without experts. The MLP width in the config of a model whose
    layers all have experts is unused, and published ones differ.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    width: int

    @classmethod
    def of(cls, model: ModelSpec) -> Architecture:
        """The architecture of a model."""
        width = model.moe_intermediate if model.moe_layers else model.intermediate
        experts = model.experts if model.moe_layers else 0
        return cls(model.layers, model.hidden, model.heads, model.kv_heads, experts, width)


class Deployment(NamedTuple):
    """What was served, on what, and for which workload; ``device`` is a name of the device catalog."""

    model_name: str
    device: str
    n_gpu: int
    tensor_parallel: int
    pipeline_parallel: int
    expert_parallel: int
    data_parallel: int
    precision: str
    workload: str


@dataclass(frozen=True)
class Observation:
    """One row of a table of measurements. Targets are None where the table has none.

    source, line: where it was read; lines count from 1, header included. fold: a split named by the source, or "".
    era: year of the engine; eras do not mix (an engine of 2024 waited on the host where one of 2025 does not).
    block_quantised: fp8 weights with a scale per block of 128 x 128, not per channel.
    batch_limit: max_num_seqs of a served row, batch size of a generation.
    prompt_tokens, output_tokens: per request; means or assumed where the source has no more.
    step_mix: steps of ONE data-parallel engine and, under pipeline parallelism, of one batch in flight.
    multimodal: an encoder ran too, whose work the batch only counts as encoder_tokens.
    step_seconds: from one mean step of a request to the next, prefills of others included.
    decode_step_seconds: of a step without prefill, as far as the source can tell (its median inter-token latency).
    prefill_seconds: of the prefill of the whole batch. power_watts, peak_power_watts: of one device.
    raw_prefill, raw_decode: labels of unknown unit, of one generation; never joules.
    """

    source: str
    line: int
    architecture: Architecture
    deployment: Deployment
    model: ModelSpec
    device: DeviceSpec
    topology: Topology
    era: str
    block_quantised: bool
    batch_limit: int
    prompt_tokens: float
    output_tokens: float
    step_mix: StepMix
    multimodal: bool = False
    fold: str = ""
    step_seconds: float | None = None
    decode_step_seconds: float | None = None
    prefill_seconds: float | None = None
    power_watts: float | None = None
    peak_power_watts: float | None = None
    raw_prefill: float | None = None
    raw_decode: float | None = None

    @property
    def model_name(self) -> str:
        """Name of the checkpoint."""
        return self.deployment.model_name

    @property
    def workload(self) -> str:
        """The kind of requests: column ``task`` of the ML.ENERGY tables."""
        return self.deployment.workload

    @property
    def devices(self) -> int:
        """Devices of the instance, all data-parallel engines together."""
        return self.topology.engine_devices * self.topology.data_parallel

    @property
    def stalled(self) -> bool:
        """Whether the mean step is far longer than a decode step: bound by prefill, or waiting."""
        if self.step_seconds is None or self.decode_step_seconds is None:
            return False
        return self.step_seconds > STALLED_RATIO * self.decode_step_seconds

    @property
    def step_energy_joules(self) -> float | None:
        """Measured energy of one mean step on all devices; None without power or step time.

        With p pipeline stages p steps are in flight during ``step_seconds``.
        """
        if self.step_seconds is None or self.power_watts is None:
            return None
        return self.power_watts * self.devices * self.step_seconds / self.topology.pipeline_parallel

    @property
    def decode_batch(self) -> BatchShape:
        """The decode part of a step alone; empty when nothing is decoded."""
        shapes = (batch.decode for _, batch in self.step_mix if batch.decode.tokens)
        return BatchShape(decode=next(shapes, EMPTY_PHASE))

    @property
    def prefill_batch(self) -> BatchShape:
        """The prefill of a step alone; empty when nothing is prefilled."""
        found = ((batch.prefill, batch.encoder_tokens) for _, batch in self.step_mix if batch.prefill.tokens)
        prefill, encoder_tokens = next(found, (EMPTY_PHASE, 0))
        return BatchShape(prefill=prefill, encoder_tokens=encoder_tokens)


# In steady state long answers are over-represented among the running ones: a mean position of
# (1 + cv^2) / 2 x mean length, with a coefficient of variation of 0.7.
POSITION_RATIO = 0.75


class Request(NamedTuple):
    """Mean tokens of one request; encoder: of prompt, those that an encoder of images or video made."""

    prompt: float
    output: float
    encoder: float = 0.0


def serving_mix(requests: float, request: Request) -> StepMix:
    """Steps of an engine that keeps ``requests`` running: each decodes one token, and freed places are refilled.

    a = requests / output prompts arrive per step. A share min(1, a) of the steps prefills max(1, a) whole prompts
    besides decoding; the others only decode.
    """
    decode = _decode(requests, request.prompt + POSITION_RATIO * request.output)
    arrivals = requests / request.output
    share = min(1.0, arrivals)
    count = arrivals / share
    mixed = BatchShape._make((_prefill(count, request.prompt), decode, count * request.encoder))
    pure = ((1.0 - share, BatchShape(decode=decode)),) if share < 1.0 else ()
    return (*pure, (share, mixed))


def generation_mix(requests: float, request: Request) -> StepMix:
    """Steps of one batch generated together: its prefill, which yields the first token, then its decode steps."""
    prefill = BatchShape(prefill=_prefill(requests, request.prompt))
    if request.output <= 1:
        return ((1.0, prefill),)
    decode = BatchShape(decode=_decode(requests, request.prompt + request.output / 2))
    return ((1 / request.output, prefill), (1 - 1 / request.output, decode))


def _prefill(requests: float, prompt: float) -> PhaseShape:
    pairs = prompt * (prompt + 1) / 2
    return PhaseShape._make((requests, requests * prompt, requests * pairs, requests * prompt, requests))


def _decode(requests: float, context: float) -> PhaseShape:
    return PhaseShape._make((requests, requests, requests * context, requests * context, requests))
