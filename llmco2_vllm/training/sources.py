"""The four tables of measurements that are understood, each recognised by its header and read row by row.

Columns, units and caveats as their publishers give them: the ML.ENERGY Benchmark v3 and Leaderboard v2
(ml.energy), SplitwiseSim (Patel et al., ISCA 2024) and the data released with LLMCO2 (arXiv:2410.02950).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llmco2_vllm.core.hardware import DeviceSpec, Topology, device_by_name, find_device
from llmco2_vllm.training.configs import PRECISIONS, ModelSizes, block_quantised
from llmco2_vllm.training.observation import (
    Architecture,
    Deployment,
    Observation,
    Request,
    generation_mix,
    serving_mix,
)
from llmco2_vllm.training.table import LeftOutError, Row, RowError

V3, V2, SPLITWISE, LLMCO2 = "mlenergy-v3", "mlenergy-v2", "splitwise", "llmco2-a100"
# (all tokens, tokens from an encoder) of a prompt. No ML.ENERGY table has them: these are assumed means.
# Text of v3: gpqa questions with choices and instructions, short chat turns, code around a gap. image-chat: one
# image, which these models turn into 256 to 1300 tokens, and a question. video-chat: frames of a short clip; its
# steps spend 44 % of their time beyond decoding. v2: chats of a few turns, function signatures with docstrings,
# one image of 576 tokens (CLIP ViT-L/14 at 336 x 336, LLaVA-1.5, arXiv:2310.03744) and a question.
PROMPTS = {
    "gpqa": (300.0, 0.0),
    "lm-arena-chat": (200.0, 0.0),
    "sourcegraph-fim": (1000.0, 0.0),
    "image-chat": (800.0, 700.0),
    "video-chat": (4000.0, 3900.0),
    "llm_text_generation/chat": (300.0, 0.0),
    "llm_text_generation/code": (200.0, 0.0),
    "mllm_text_generation/chat": (650.0, 576.0),
}
PROMPT_TOKENS = {workload: prompt for workload, (prompt, _) in PROMPTS.items()}
# No device draws more on average; rows above were mixed up.
_POWER_MARGIN = 1.2
_BATCH_MARGIN = 1.01
_SPLITWISE_DEVICES = {"a100-80gb": "a100-80", "h100-80gb": "h100-sxm"}
# The released LLMCO2 rows name neither GPU nor count. The labels of Llama-2-70b, read as seconds, would need
# more than six A100 at peak in prefill; the two smaller models fit on one.
_LLMCO2_DEVICE = "a100-80"
_LLMCO2_TENSOR_PARALLEL = {"meta-llama/Llama-2-70b-hf": 8}

Reader = Callable[[Row, ModelSizes], Observation]


class Source(NamedTuple):
    """A table: columns its reader needs, and those that no other table has (all of them are needed)."""

    name: str
    columns: frozenset[str]
    signature: frozenset[str]
    read: Reader


def recognise(columns: tuple[str, ...]) -> Source:
    """The source whose signature is in the header; ValueError that says what is missing or lists the sources."""
    for source in SOURCES:
        if source.signature <= set(columns):
            missing = sorted(source.columns - set(columns))
            if missing:
                raise ValueError(f"line 1, column {missing[0]}: is missing; a table of {source.name} has it")
            return source
    known = "; ".join(f"{source.name}: {', '.join(sorted(source.signature))}" for source in SOURCES)
    raise ValueError(f"line 1: the header fits no known table, which are told by their columns ({known})")


def _read_v3(row: Row, sizes: ModelSizes) -> Observation:
    workload, request = _request(row, "avg_out_len")
    device = _device(row, "gpu", row.text("gpu"))
    deployment = Deployment(
        model_name=row.text("model"),
        device=device.name,
        n_gpu=row.count("n_gpu"),
        tensor_parallel=row.count("tp"),
        pipeline_parallel=1,
        expert_parallel=row.count("ep"),
        data_parallel=row.count("dp"),
        precision=row.text("precision"),
        workload=workload,
    )
    base = _served(row, sizes, deployment, device)
    requests = _running(row, "avg_batch", row.count("max_num_seqs") * base.topology.data_parallel)
    return base._replace(
        source=V3,
        era="2025",
        batch_limit=row.count("max_num_seqs"),
        request=request,
        requests=requests,
        step_seconds=requests / row.number("tok_s"),
        decode_step_seconds=row.number("itl_med_ms") / 1e3,
        power_watts=_power(row, "power_w", row.number("power_w"), base),
    ).observation()


def _read_v2(row: Row, sizes: ModelSizes) -> Observation:
    workload, request = _request(row, "avg_out")
    device = _device(row, "gpu", row.text("gpu"))
    ranks = row.count("tp"), row.count("pp")
    deployment = Deployment(
        model_name=row.text("model"),
        device=device.name,
        n_gpu=ranks[0] * ranks[1],
        tensor_parallel=ranks[0],
        pipeline_parallel=ranks[1],
        expert_parallel=1,
        data_parallel=1,
        precision="bfloat16",
        workload=workload,
    )
    base = _served(row, sizes, deployment, device)
    requests = _running(row, "avg_bs", row.count("max_bs"))
    power = row.number("j_req") / request.output * row.number("tok_s")
    return base._replace(
        source=V2,
        era="2024",
        batch_limit=row.count("max_bs"),
        request=request,
        requests=requests,
        step_seconds=requests / row.number("tok_s"),
        decode_step_seconds=row.number("tpot_s"),
        power_watts=_power(row, "j_req", power, base),
    ).observation()


def _read_splitwise(row: Row, sizes: ModelSizes) -> Observation:
    hardware, ranks, batch = row.text("hardware"), row.count("tensor_parallel"), row.count("batch_size")
    prompt, output = row.count("prompt_size"), row.count("token_size")
    device = _device(row, "hardware", _SPLITWISE_DEVICES.get(hardware, hardware))
    name = row.text("model")
    deployment = Deployment(name, device.name, ranks, ranks, 1, 1, 1, "float16", "generation")
    if batch == 64 and ranks == 2:
        raise LeftOutError("token_ms", "batch 64 at tensor parallel 2: memory overflowed, 15 to 17 times too long")
    mean, peak = row.number_or_zero("avg_power_frac"), row.number_or_zero("peak_power_frac")
    # Zero: not measured. Llama at 8192 prompt tokens: 0.17 to 0.18 is below what an idle engine draws while decoding.
    measured = mean > 0 and not (prompt == 8192 and mean < 0.2)
    limit = device.power_limit_watts
    base = _served(row, sizes, deployment, device)
    if max(mean, peak) > _POWER_MARGIN:
        raise RowError("avg_power_frac", f"{max(mean, peak):g} of the power limit is not possible")
    return base._replace(
        source=SPLITWISE,
        era="2023",
        batch_limit=batch,
        request=Request(prompt, output),
        requests=batch,
        generation=True,
        decode_step_seconds=row.number("token_ms") / 1e3,
        prefill_seconds=row.number("prompt_ms") / 1e3,
        power_watts=mean * limit if measured else None,
        peak_power_watts=peak * limit if measured else None,
    ).observation()


def _read_llmco2(row: Row, sizes: ModelSizes) -> Observation:
    name, batch = row.text("model"), row.count("batch_size")
    ranks = _LLMCO2_TENSOR_PARALLEL.get(name, 1)
    deployment = Deployment(name, _LLMCO2_DEVICE, ranks, ranks, 1, 1, 1, "float16", "generation")
    return (
        _served(row, sizes, deployment, device_by_name(_LLMCO2_DEVICE))
        ._replace(
            source=LLMCO2,
            era="2024",
            batch_limit=batch,
            request=Request(row.count("prompt_tokens"), row.count("output_tokens")),
            requests=batch,
            generation=True,
            fold=row.text("split"),
            raw_prefill=row.number("prefill_energy_raw"),
            raw_decode=row.number("decode_energy_raw"),
        )
        .observation()
    )


class _Draft(NamedTuple):
    """An observation being read. requests: of the whole instance."""

    line: int
    sizes: ModelSizes
    deployment: Deployment
    device: DeviceSpec
    topology: Topology
    source: str = ""
    era: str = ""
    batch_limit: int = 0
    request: Request = Request(0.0, 0.0)
    requests: float = 0.0
    generation: bool = False
    fold: str = ""
    step_seconds: float | None = None
    decode_step_seconds: float | None = None
    prefill_seconds: float | None = None
    power_watts: float | None = None
    peak_power_watts: float | None = None
    raw_prefill: float | None = None
    raw_decode: float | None = None

    def observation(self) -> Observation:
        """The observation; data-parallel engines and pipeline stages share the requests equally."""
        deployment = self.deployment
        model = self.sizes.spec(deployment.model_name, deployment.precision)
        requests = self.requests / (self.topology.data_parallel * self.topology.pipeline_parallel)
        mix = generation_mix if self.generation else serving_mix
        same = set(_Draft._fields) & set(Observation.__dataclass_fields__)
        return Observation(
            architecture=Architecture.of(model),
            model=model,
            block_quantised=block_quantised(deployment.model_name, deployment.precision),
            prompt_tokens=self.request.prompt,
            output_tokens=self.request.output,
            step_mix=mix(requests, self.request),
            multimodal=self.request.encoder > 0,
            **{name: getattr(self, name) for name in same},
        )


def _served(row: Row, sizes: ModelSizes, deployment: Deployment, device: DeviceSpec) -> _Draft:
    """Model, device and topology of a deployment, checked.

    Expert-parallel rows split attention over all GPUs, or over those of a data-parallel engine.
    """
    if deployment.precision not in PRECISIONS:
        raise RowError("precision", f"{deployment.precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    try:
        model = sizes.spec(deployment.model_name, deployment.precision)
    except ValueError as error:
        raise RowError("model", str(error)) from None
    experts, engines = deployment.expert_parallel, deployment.data_parallel
    parallel = deployment.tensor_parallel * deployment.pipeline_parallel * engines
    if deployment.n_gpu != (parallel if experts == 1 else experts) or deployment.n_gpu % engines:
        raise RowError("n_gpu", f"{deployment.n_gpu} is not possible with the parallel sizes of the row")
    if experts > 1 and not model.moe_layers:
        raise RowError("ep", f"{experts} is not possible: {deployment.model_name} has no experts")
    topology = Topology(
        tensor_parallel=deployment.tensor_parallel if experts == 1 else deployment.n_gpu // engines,
        pipeline_parallel=deployment.pipeline_parallel,
        data_parallel=engines,
        expert_parallel=experts > 1,
    )
    return _Draft(row.line, sizes, deployment, device, topology)


def _request(row: Row, output_column: str) -> tuple[str, Request]:
    workload = row.text("task")
    if workload not in PROMPTS:
        raise RowError("task", f"{workload!r} is not known, nor are its prompts; allowed: {', '.join(PROMPTS)}")
    prompt, encoder = PROMPTS[workload]
    return workload, Request(prompt, row.number(output_column), encoder)


def _device(row: Row, column: str, name: str) -> DeviceSpec:
    device = find_device(name)
    if device is None:
        raise RowError(column, f"unknown GPU {row.text(column)!r}: it is not in the device catalog")
    return device


def _running(row: Row, column: str, limit: int) -> float:
    requests = row.number(column)
    if requests > limit * _BATCH_MARGIN:
        raise RowError(column, f"{requests:g} is not possible: at most {limit} requests run at a time")
    return requests


def _power(row: Row, column: str, watts: float, draft: _Draft) -> float:
    """Power of one device from that of the instance."""
    power, limit = watts / draft.deployment.n_gpu, draft.device.power_limit_watts
    if power > limit * _POWER_MARGIN:
        raise RowError(column, f"{power:.0f} W per GPU is not possible: the limit is {limit:.0f} W")
    return power


def _source(name: str, read: Reader, signature: str, others: str) -> Source:
    told = frozenset(signature.split())
    return Source(name, told | frozenset(others.split()), told, read)


SOURCES = (
    _source(
        V3,
        _read_v3,
        "itl_med_ms avg_out_len n_gpu",
        "task model gpu tp ep dp precision max_num_seqs avg_batch power_w tok_s",
    ),
    _source(V2, _read_v2, "tpot_s avg_bs j_req", "task gpu model tp pp max_bs avg_out tok_s"),
    _source(
        SPLITWISE,
        _read_splitwise,
        "prompt_ms token_ms token_size",
        "model hardware tensor_parallel prompt_size batch_size avg_power_frac peak_power_frac",
    ),
    _source(
        LLMCO2,
        _read_llmco2,
        "prefill_energy_raw decode_energy_raw",
        "split model batch_size prompt_tokens output_tokens",
    ),
)
