"""Drives vLLM's real scheduler classes without a model: what the workers would answer is scripted."""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

from llmco2_vllm.config import Settings
from llmco2_vllm.vllm_plugin import compat
from llmco2_vllm.vllm_plugin.compat import ATTRIBUTE

BLOCK_SIZE = 16
EOS = 2
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "tie_word_embeddings": True,
}


def call(function: Callable[..., Any], **kwargs: Any) -> Any:
    """Call with those of ``kwargs`` that this version's signature knows."""
    known = inspect.signature(function).parameters
    return function(**{key: value for key, value in kwargs.items() if key in known})


def model_folder(folder: Path, **changes: Any) -> Path:
    """A folder with the configuration of a small Llama, or of what ``changes`` make of it, and nothing else."""
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **changes}))
    return folder


def take_wrappers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is without the plugin, until the end of the test."""
    for key, symbol in compat.SYMBOLS.items():
        owner = compat.resolve(key)
        if owner is None:
            continue
        static = inspect.getattr_static(owner, symbol.name)
        plain = getattr(static, "__func__", static)
        if hasattr(plain, "__llmco2__"):
            kind = type(static) if plain is not static else None
            monkeypatch.setattr(owner, symbol.name, kind(plain.__wrapped__) if kind else plain.__wrapped__)


def make_config(
    folder: Path, settings: Settings | None, *, speculative: dict[str, Any] | None = None, **scheduler: Any
) -> VllmConfig:
    """A VllmConfig as the plugin leaves it: settings as an attribute, or nothing when off."""
    options = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 8192, **scheduler}
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=8192)
    scheduler_config = SchedulerConfig(enable_chunked_prefill=True, is_encoder_decoder=False, **options)
    cache = call(CacheConfig, block_size=BLOCK_SIZE, gpu_memory_utilization=0.9, enable_prefix_caching=True)
    speculative_config = None
    if speculative is not None:
        from vllm.config import ParallelConfig, SpeculativeConfig

        speculative_config = SpeculativeConfig(
            target_model_config=model, target_parallel_config=ParallelConfig(), **speculative
        )
    config = VllmConfig(
        model_config=model, scheduler_config=scheduler_config, cache_config=cache, speculative_config=speculative_config
    )
    # The CPU platform turns it off; the scheduler class itself does not care.
    config.scheduler_config.async_scheduling = bool(options.get("async_scheduling", False))
    if settings is not None:
        setattr(config, ATTRIBUTE, settings)
        setattr(config.scheduler_config, ATTRIBUTE, settings)
    return config


def make_scheduler(config: VllmConfig, blocks: int = 20000, base: type | None = None) -> Any:
    """The scheduler the engine core would build from ``config``."""
    if base is not None:
        config.scheduler_config.scheduler_cls = base
    config.cache_config.num_gpu_blocks = blocks
    spec = call(FullAttentionSpec, block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    init_none_hash(sha256)
    cls = config.scheduler_config.get_scheduler_cls()
    options = {
        "vllm_config": config,
        "kv_cache_config": kv_cache,
        "structured_output_manager": StructuredOutputManager(config),
        "log_stats": True,
        "block_size": BLOCK_SIZE,
        "hash_block_size": BLOCK_SIZE,
    }
    known = set()
    for ancestor in cls.__mro__:
        if "__init__" in vars(ancestor):
            known |= set(inspect.signature(ancestor.__init__).parameters)
    return cls(**{key: value for key, value in options.items() if key in known})


def make_request(request_id: str, prompt: int | list[int], max_tokens: int = 16, **sampling: Any) -> Request:
    """A request with ``prompt`` tokens (a number makes distinct ones)."""
    seed = crc32(request_id.encode())
    tokens = prompt if isinstance(prompt, list) else [(seed + i) % 1000 + 10 for i in range(prompt)]
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    call(params.update_from_generation_config, generation_config={}, eos_token_id=EOS, model_eos_token_id=EOS)
    return call(
        Request,
        request_id=request_id,
        client_index=0,
        prompt_token_ids=tokens,
        sampling_params=params,
        pooling_params=None,
        eos_token_id=EOS,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def make_core_request(request_id: str, prompt: int | list[int], max_tokens: int = 16, **options: Any) -> Any:
    """A request as the front end sends it to the engine; ``pooling``, ``delta`` and ``resumable`` are switches.

    Other options are fields of EngineCoreRequest, or else of SamplingParams.
    """
    pooling, delta = options.pop("pooling", False), options.pop("delta", False)
    fields = {key: options.pop(key) for key in list(options) if key in EngineCoreRequest.__struct_fields__}
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY
    plain = make_request(request_id, prompt, max_tokens, output_kind=kind, **options)
    return call(
        EngineCoreRequest,
        request_id=request_id,
        external_req_id=f"external-{request_id}",
        prompt_token_ids=list(plain.prompt_token_ids),
        mm_features=None,
        sampling_params=None if pooling else plain.sampling_params,
        pooling_params=PoolingParams(task="embed") if pooling else None,
        eos_token_id=EOS,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **fields,
    )


class Engine:
    """The engine core's loop around a scheduler, with ``depth`` batches in flight.

    sample: what the workers answer for (request id, tokens it has): a list of token ids. tells: it asks for the
    grammar bitmask while the step runs, as it does not for pooling models.
    """

    def __init__(
        self,
        scheduler: Any,
        depth: int = 1,
        sample: Callable[[Request], list[int]] | None = None,
        tells: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.tells = tells
        self.sample = sample or (lambda _request: [7])
        self.queue: deque[Any] = deque()
        self.outputs: list[Any] = []
        self.returned: deque[Any] = deque()
        self.steps: list[Any] = []

    def step(self) -> None:
        """Schedule one batch and, when the queue is full, bring one back."""
        output = self.scheduler.schedule()
        if self.tells:
            self.scheduler.get_grammar_bitmask(output)
        self.steps.append(output)
        self.queue.append((output, self._answer(output)))
        if len(self.queue) >= self.depth:
            self.collect()

    def collect(self) -> None:
        """Bring back the oldest batch."""
        output, answer = self.queue.popleft()
        result = self.scheduler.update_from_output(output, answer)
        for engine_outputs in result.values():
            self.outputs.extend(engine_outputs.outputs)
            self.returned.append(engine_outputs)

    def run(self, limit: int = 1000) -> None:
        """Step until nothing is left to do."""
        for _ in range(limit):
            if not self.scheduler.has_requests():
                break
            self.step()
        while self.queue:
            self.collect()

    def _answer(self, output: Any) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        pooled: list[torch.Tensor | None] = []
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            ready = request.num_computed_tokens >= request.num_tokens
            sampled.append(self.sample(request) if ready and request.pooling_params is None else [])
            pooled.append(torch.ones(4) if ready and request.pooling_params is not None else None)
        return call(
            ModelRunnerOutput,
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=pooled,
        )


class Server:
    """An engine and a front end; what they send each other goes through vLLM's msgpack.

    tamper: may change the outputs on their way to the front end. received: those that came.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any = None, tamper: Callable[[list[Any]], None] = lambda outputs: None
    ) -> None:
        self.engine = engine
        self.processor = call(OutputProcessor, tokenizer=tokenizer, log_stats=False)
        self.received: list[Any] = []
        self.delivered: list[Any] = []
        self._tamper = tamper
        self._encoder = MsgpackEncoder()
        self._outputs = MsgpackDecoder(EngineCoreOutputs)
        self._requests = MsgpackDecoder(EngineCoreRequest)

    def add(self, request: Any, parent: ParentRequest | None = None, index: int = 0) -> None:
        """Register a request in the front end and hand it to the engine."""
        self.processor.add_request(request, None, parent, index)
        received = self._requests.decode(self._encoder.encode(request))
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.engine.scheduler.add_request(Request.from_engine_core_request(received, hasher))

    def add_parallel(self, request: Any) -> None:
        """The ``n`` sequences of a request, as AsyncLLM and LLMEngine fan it out."""
        parent = ParentRequest(request)
        for index in range(request.sampling_params.n):
            child = copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self.add(child, parent, index)

    def step(self) -> list[Any]:
        """One step of the engine; the request outputs that came of it."""
        self.engine.step()
        return self.deliver()

    def deliver(self) -> list[Any]:
        """Take what the engine has returned into the front end."""
        delivered = []
        while self.engine.returned:
            message = self._encoder.encode(self.engine.returned.popleft())
            outputs = self._outputs.decode(message)
            self._tamper(outputs.outputs)
            self.received.extend(outputs.outputs)
            answer = self.processor.process_outputs(outputs.outputs, outputs.timestamp, None)
            delivered.extend(answer.request_outputs)
            self.engine.scheduler.finish_requests(answer.reqs_to_abort, RequestStatus.FINISHED_ABORTED)
        self.delivered.extend(delivered)
        return delivered

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        ids = self.processor.abort_requests([request_id], internal=True)
        self.engine.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)

    def run(self, limit: int = 1000) -> list[Any]:
        """Step until nothing is left to do; all request outputs so far."""
        for _ in range(limit):
            if not self.engine.scheduler.has_requests():
                break
            self.step()
        while self.engine.queue:
            self.engine.collect()
            self.deliver()
        return self.delivered
