"""From settings to the parts of a worker that runs a model: model, cache, engine and card."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
import torch

from sfllm.asset_pull import asset_of
from sfllm.messages import GenerationDefaults, ModelCard, Sampling
from sfllm.model_files import model_name, resolve_model
from sfllm.settings import WorkerSettings
from sfllm_worker.assembly import Parts
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache, bytes_per_block
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.load.assets import GenerationDefaults as ModelDefaults
from sfllm_worker.sizing import (
    LARGEST_AUTOMATIC_BATCH,
    automatic_batch_size,
    cache_blocks,
    choose_device,
    choose_dtype,
)

_log = structlog.get_logger()

T = TypeVar("T")

WARM_UP_TOKENS = 16


def build(settings: WorkerSettings) -> Parts:
    """Load, size and warm up. Raises ModelLoadError, ValueError or OSError with what to mend."""
    phases: dict[str, float] = {}
    device = choose_device(settings.device)
    if device.type == "cpu" and settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = _timed(phases, "load", lambda: _load(settings, device))
    engine = _timed(phases, "cache", lambda: build_engine(settings, model, device))
    token_seconds = _timed(phases, "warm_up", lambda: warm_up(engine))
    card = make_card(settings, model, engine)
    _log.info(
        "model loaded",
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        weight_bytes=model.weight_bytes,
    )
    step_tokens = engine.planner.limits.max_step_tokens
    return Parts(engine, card, model.assets, step_tokens, token_seconds * step_tokens, phases)


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
    )


def build_engine(settings: WorkerSettings, model: LoadedModel, device: torch.device) -> Engine:
    """The engine with a KV cache sized for the memory that is left after the weights."""
    context = min(settings.max_context_length or model.max_context_length, model.max_context_length)
    blocks = cache_blocks(
        device=device,
        bytes_per_block=bytes_per_block(model.config, settings.block_size, model.dtype),
        block_size=settings.block_size,
        cache_tokens=settings.max_running_tokens,
        mem_fraction=settings.mem_fraction,
        useful_tokens=(settings.max_batch_size or LARGEST_AUTOMATIC_BATCH) * context,
    )
    kv = KVCache(model.config, blocks + 1, settings.block_size, model.dtype, device)
    batch_size = settings.max_batch_size or automatic_batch_size(blocks * settings.block_size, context)
    limits = Limits(
        max_sequences=batch_size,
        max_step_tokens=max(settings.max_step_tokens, batch_size),
        block_size=settings.block_size,
    )
    max_model_len = min(context, blocks * settings.block_size)
    return Engine(EagerRunner(model.decoder, kv), kv, limits, model.eos_token_ids, max_model_len, device)


def warm_up(engine: Engine) -> float:
    """Run prefills and decodes, so that the first request does not pay for lazy initialisation.

    Returns the seconds that a token took in the fastest step, which is a prefill after the first.
    """
    fastest = math.inf
    for token in range(2):
        prompt = [token] * min(WARM_UP_TOKENS, engine.max_model_len - 2)
        sampling = Sampling(max_tokens=2, seed=0, ignore_eos=True)
        engine.add(Sequence("warm-up", 0, prompt, len(prompt), sampling))
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
    )
