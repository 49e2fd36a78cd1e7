"""From settings to a worker that is ready: model, cache, engine, card and link."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import structlog
import torch

from sfllm.admin import AdminServer
from sfllm.asset_pull import asset_of
from sfllm.messages import Capacity, GenerationDefaults, ModelCard, Sampling
from sfllm.metrics import Metrics
from sfllm.model_files import model_name, resolve_model
from sfllm.settings import WorkerSettings
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache, bytes_per_block
from sfllm_worker.link import SchedulerLink
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.load.assets import GenerationDefaults as ModelDefaults
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.service import WorkerService
from sfllm_worker.sizing import (
    LARGEST_AUTOMATIC_BATCH,
    automatic_batch_size,
    cache_blocks,
    choose_device,
    choose_dtype,
)

_log = structlog.get_logger()

T = TypeVar("T")

HEALTH_STALL_SECONDS = 60.0
"""A loop that has not come around for so long is stuck: no step of a working model takes it."""


class Worker(NamedTuple):
    """A worker that is ready to run, and its admin server if it has one."""

    service: WorkerService
    admin: AdminServer | None


def start(settings: WorkerSettings) -> Worker:
    """Load, size, warm up and connect. Raises ModelLoadError, ValueError or OSError with what to mend."""
    phases: dict[str, float] = {}
    device = choose_device(settings.device)
    if device.type == "cpu" and settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = _timed(phases, "load", lambda: _load(settings, device))
    engine = _timed(phases, "cache", lambda: build_engine(settings, model, device))
    _timed(phases, "warm_up", lambda: warm_up(engine))
    card = make_card(settings, model, engine)
    capacity = Capacity(
        slots=engine.planner.limits.max_sequences,
        kv_tokens=engine.kv_tokens,
        step_tokens=engine.planner.limits.max_step_tokens,
    )
    link = SchedulerLink(settings.worker_address, settings.asset_address, card, capacity, model.assets)
    registry = Metrics(settings.metrics_prefix)
    metrics = WorkerMetrics(registry, card.name, link.worker_id)
    for phase, seconds in phases.items():
        metrics.startup(phase, seconds)
    metrics.state(engine)
    service = WorkerService(engine, link, metrics, card.vocab_size, settings.drain_seconds)
    admin = None
    if settings.admin_port:
        admin = AdminServer(settings.admin_host, settings.admin_port, registry, lambda: _problem(service))
    _log.info(
        "worker ready",
        model=card.name,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_tokens=engine.kv_tokens,
        max_model_len=card.max_model_len,
        **{f"{phase}_seconds": round(seconds, 2) for phase, seconds in phases.items()},
    )
    return Worker(service, admin)


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


def warm_up(engine: Engine) -> None:
    """Run a prefill and a decode, so that the first request does not pay for lazy initialisation."""
    prompt = [0] * min(16, engine.max_model_len - 2)
    engine.add(Sequence("warm-up", 0, prompt, len(prompt), Sampling(max_tokens=2, seed=0, ignore_eos=True)))
    while engine.has_work:
        engine.step()


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
    )


def _problem(service: WorkerService) -> str | None:
    silent = time.monotonic() - service.turned_at
    return f"the loop has not turned for {silent:.0f} s" if silent > HEALTH_STALL_SECONDS else None
