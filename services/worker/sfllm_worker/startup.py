"""From settings to the parts of a worker that runs a model: model, cache, engine and card."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
import torch
from msgspec.structs import replace

from sfllm.asset_pull import asset_of
from sfllm.gpus import PART, VISIBLE
from sfllm.messages import GenerationDefaults, ModelCard, Pooling, Sampling
from sfllm.model_files import model_name, resolve_model
from sfllm.settings import WorkerSettings
from sfllm_worker.assembly import Gpu, Parts
from sfllm_worker.backends import has_triton
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.pending import TokenSampler
from sfllm_worker.engine.planner import MOST_REPORTED, Limits
from sfllm_worker.engine.sequence import Sequence as RequestSequence
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import GraphKey, GraphPlan, batch_buckets, context_bands, plan_graphs
from sfllm_worker.graphs.recorder import CudaRecorder
from sfllm_worker.graphs.reservation import Rehearsal, bytes_to_reserve
from sfllm_worker.graphs.runner import EagerRunner, GraphRunner
from sfllm_worker.kv.ahead import MemoryAhead
from sfllm_worker.kv.cache import KVCache, bytes_per_block
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.load.assets import TOKENIZER
from sfllm_worker.load.assets import GenerationDefaults as ModelDefaults
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.sizing import (
    LARGEST_AUTOMATIC_BATCH,
    USUAL_STEP_TOKENS,
    CudaMemory,
    automatic_batch_size,
    cache_blocks,
    choose_device,
    choose_dtype,
)
from sfllm_worker.structured.grammars import Grammars

_log = structlog.get_logger()

T = TypeVar("T")

WARM_UP_TOKENS = 16
_SAMPLED = Sampling(max_tokens=2, seed=0, ignore_eos=True)
WARM_UP = (_SAMPLED, _SAMPLED)
GPU_WARM_UP = (
    *WARM_UP,
    replace(_SAMPLED, temperature=0.0),
    replace(_SAMPLED, top_k=20, top_p=0.9, min_p=0.01),
    replace(_SAMPLED, repetition_penalty=1.1, presence_penalty=0.1, logit_bias=((0, 1.0),)),
    replace(_SAMPLED, logprobs=1, prompt_logprobs=1),
)
"""On a GPU every kind of request has kernels of its own, which are compiled or loaded when first used."""


def build(settings: WorkerSettings) -> Parts:
    """Load, size and warm up. Raises ModelLoadError, ValueError or OSError with what to mend."""
    phases: dict[str, float] = {}
    device = choose_device(settings.device)
    if device.type == "cpu" and settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = _timed(phases, "load", lambda: _load(settings, device))
    engine = build_engine(settings, model, device, phases)
    token_seconds = _timed(
        phases, "warm_up", lambda: warm_up(engine, GPU_WARM_UP if device.type == "cuda" else WARM_UP)
    )
    card = make_card(settings, model, engine)
    _log.info(
        "model loaded",
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        weight_bytes=model.weight_bytes,
    )
    step_tokens = engine.planner.limits.max_step_tokens
    return Parts(
        engine,
        card,
        model.assets,
        step_tokens,
        token_seconds * step_tokens,
        phases,
        gpu=Gpu(_gpu_uuid(device), engine.figures) if device.type == "cuda" else None,
        grammars=engine.grammar_figures,
    )


def _timed(phases: dict[str, float], name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    result = work()
    phases[name] = time.monotonic() - started
    return result


def _load(settings: WorkerSettings, device: torch.device) -> LoadedModel:
    path = settings.model if settings.load_format == "dummy" else resolve_model(settings.model)
    dtype = choose_dtype(settings.dtype, device)
    return load_model(
        path,
        dtype=dtype,
        device=device,
        load_format=settings.load_format,
        context_length=settings.max_context_length,
        quantization=settings.quantization,
        deterministic=settings.deterministic,
    )


def build_engine(
    settings: WorkerSettings,
    model: LoadedModel,
    device: torch.device,
    phases: dict[str, float] | None = None,
) -> Engine:
    """The engine with a KV cache sized for the memory that is left after weights, steps and graphs.

    Puts the seconds of the phases "cache" and, where graphs are captured, "graphs" into `phases`.
    """
    phases = {} if phases is None else phases
    context = min(settings.max_context_length or model.max_context_length, model.max_context_length)
    reserved = 0
    if device.type == "cuda" and settings.max_running_tokens is None:
        reserved = _timed(phases, "rehearsal", lambda: _bytes_to_reserve(settings, model, device, context))
    kv = _timed(phases, "cache", lambda: _cache(settings, model, device, context, reserved))
    cache_tokens = (kv.num_blocks - 1) * settings.block_size
    batch_size = settings.max_batch_size or automatic_batch_size(cache_tokens, context)
    limits = Limits(
        max_sequences=batch_size,
        max_step_tokens=_step_tokens(settings, device, batch_size),
        block_size=settings.block_size,
    )
    max_model_len = min(context, cache_tokens)
    runner: GraphRunner = EagerRunner(model.decoder, kv)
    if _captures(settings, model, device):
        plan = _graph_plan(settings, batch_size, max_model_len)
        memory = CudaMemory(device)
        recorder = CudaRecorder(device)
        runner = captured = CapturedRunner(model.decoder, kv, plan, recorder, memory.free, reserved or None)
        _timed(phases, "graphs", captured.capture_first)
    sampler = _device_sampler(device)
    # Only a sampler on the device lets the next step be launched before this one's tokens are read.
    overlap = sampler is not None
    grammars = Grammars(model.assets[TOKENIZER], model.config.vocab_size, model.eos_token_ids)
    return Engine(
        *(runner, kv, limits, model.eos_token_ids, max_model_len, device, sampler, overlap),
        grammars=grammars,
        memory_ahead=MemoryAhead(kv) if device.type == "cpu" else None,
    )


def _step_tokens(settings: WorkerSettings, device: torch.device, batch_size: int) -> int:
    """Most tokens of a step, which has room for one of each sequence."""
    return max(settings.max_step_tokens or USUAL_STEP_TOKENS[device.type], batch_size)


def _device_sampler(device: torch.device) -> TokenSampler | None:
    """The sampler in Triton's kernels; None where tokens are chosen in plain torch."""
    if device.type != "cuda" or not has_triton():
        return None
    from sfllm_worker.sampling.device import DeviceSampler  # noqa: PLC0415 - it imports triton

    return DeviceSampler(device)


def _cache(
    settings: WorkerSettings, model: LoadedModel, device: torch.device, context: int, reserved: int
) -> KVCache:
    blocks = cache_blocks(
        device=device,
        bytes_per_block=bytes_per_block(model.config, settings.block_size, model.dtype),
        block_size=settings.block_size,
        cache_tokens=settings.max_running_tokens,
        mem_fraction=settings.mem_fraction,
        useful_tokens=(settings.max_batch_size or LARGEST_AUTOMATIC_BATCH) * context,
        reserved_bytes=reserved,
    )
    return KVCache(model.config, blocks + 1, settings.block_size, model.dtype, device)


def _captures(settings: WorkerSettings, model: LoadedModel, device: torch.device) -> bool:
    """Whether steps are captured. Models of transformers may ask the device for values: theirs are not."""
    return device.type == "cuda" and not settings.disable_cuda_graph and isinstance(model.decoder, Decoder)


def _graph_plan(settings: WorkerSettings, batch_size: int, max_model_len: int) -> GraphPlan:
    buckets = batch_buckets(batch_size, settings.cuda_graph_max_bs, settings.cuda_graph_bs)
    return plan_graphs(buckets, context_bands(max_model_len))


def _bytes_to_reserve(
    settings: WorkerSettings, model: LoadedModel, device: torch.device, context: int
) -> int:
    """What the largest steps take beside weights and cache; the batch that fits is not known yet."""
    batch_size = settings.max_batch_size or LARGEST_AUTOMATIC_BATCH
    rehearsal = Rehearsal(
        step_tokens=min(context, _step_tokens(settings, device, batch_size)),
        logit_rows=batch_size + MOST_REPORTED,
        plan=_graph_plan(settings, batch_size, context),
        largest=GraphKey(batch_size, context_bands(context)[-1]),
        make_recorder=(lambda: CudaRecorder(device)) if _captures(settings, model, device) else None,
    )
    return bytes_to_reserve(model.decoder, rehearsal, settings.block_size, CudaMemory(device))


def _gpu_uuid(device: torch.device) -> str:
    """The GPU as NVML knows it. CUDA tells a part of a GPU (MIG) by numbers that fit neither of its names."""
    first = os.environ.get(VISIBLE, "").partition(",")[0].strip()
    return first if first.startswith(PART) else f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def warm_up(engine: Engine, requests: Sequence[Sampling] = WARM_UP) -> float:
    """Run prefills and decodes, so that the first request does not pay for lazy initialisation.

    Returns the seconds that a token took in the fastest step, which is a prefill after the first.
    """
    fastest = math.inf
    for token, sampling in enumerate(requests):
        prompt = [token] * min(WARM_UP_TOKENS, engine.max_model_len - 2)
        engine.add(RequestSequence("warm-up", 0, prompt, len(prompt), sampling))
        while engine.has_work:
            started = time.monotonic()
            result = engine.step()
            fastest = min(fastest, (time.monotonic() - started) / max(1, result.num_tokens))
    return fastest


def make_card(settings: WorkerSettings, model: LoadedModel, engine: Engine) -> ModelCard:
    """What gateways are told of the model."""
    names = settings.served_model_name or (model_name(settings.model),)
    defaults = model.generation if settings.generation_defaults else ModelDefaults()
    return ModelCard(
        name=names[0],
        aliases=tuple(names[1:]),
        root=model_name(settings.model),
        created=int(time.time()),
        max_model_len=engine.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.eos_token_ids,
        assets=tuple(asset_of(name, content) for name, content in sorted(model.assets.items())),
        defaults=GenerationDefaults(
            defaults.temperature,
            defaults.top_p,
            defaults.top_k,
            defaults.min_p,
            defaults.repetition_penalty,
        ),
        quantization=settings.quantization,
        pooling=_pooling(settings, model),
    )


def _pooling(settings: WorkerSettings, model: LoadedModel) -> Pooling | None:
    """As the model says, unless the operator says something else."""
    match settings.pooling:
        case "auto":
            return model.pooling
        case "none":
            return None
        case kind:
            normalizes = model.pooling is None or model.pooling.normalizes
            return Pooling(kind, model.config.hidden_size, normalizes)
