"""From an engine and its card to a worker that is ready to run: link, protocol, metrics, admin server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import structlog

from sfllm.admin import AdminServer
from sfllm.link_keys import ClientKeys
from sfllm.messages import Capacity, ModelCard, WorkerHello
from sfllm.metrics import Metrics
from sfllm.scheduler_choice import SchedulerChoice
from sfllm.settings import WorkerSettings
from sfllm.sockets import random_identity
from sfllm.tracing import open_tracer
from sfllm_worker.engine.interface import EngineInterface
from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.link import SchedulerLink
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.protocol import WorkerProtocol
from sfllm_worker.service import WorkerService
from sfllm_worker.structured.figures import GrammarFigures
from sfllm_worker.telemetry import GpuTelemetry
from sfllm_worker.traces import StageSpans
from sfllm_worker.watchdog import Watchdog

if TYPE_CHECKING:
    from sfllm.otlp import Tracer

_log = structlog.get_logger()


class Gpu(NamedTuple):
    """The GPU that an engine runs on: its UUID as the driver spells it, and what the runner has done."""

    uuid: str
    figures: GraphFigures


class Parts(NamedTuple):
    """What a worker needs of a model, or of what stands in for one.

    `assets` are the files that gateways need, by name. `step_seconds` is how long a step of
    `step_tokens` tokens is expected to take, `phases` how long each phase of the start took.
    """

    engine: EngineInterface
    card: ModelCard
    assets: Mapping[str, bytes]
    step_tokens: int
    step_seconds: float
    phases: Mapping[str, float] = {}
    gpu: Gpu | None = None
    grammars: GrammarFigures | None = None


class Worker(NamedTuple):
    """A worker that is ready to run, and its admin server and tracer if it has them."""

    service: WorkerService
    admin: AdminServer | None
    tracer: Tracer | None


def assemble(
    settings: WorkerSettings,
    parts: Parts,
    claimed_gpu: str | None = None,
    keys: ClientKeys | None = None,
) -> Worker:
    """Connect. Raises OSError when the admin port is taken, ValueError when it cannot trace.

    `claimed_gpu` is the UUID of the GPU that this worker claimed, if it did; `keys` are those of its links.
    """
    engine, card = parts.engine, parts.card
    if settings.target_itl_ms is not None:
        engine.keep_within(settings.target_itl_ms / 1000)
    identity = random_identity(b"w-")
    hello = WorkerHello(
        worker_id=identity.decode(),
        card=card,
        capacity=Capacity(engine.max_sequences, engine.kv_tokens, parts.step_tokens),
    )
    tracer = open_tracer(settings, "worker", hello.worker_id)
    registry = Metrics(settings.metrics_prefix)
    registry.links(encrypted=keys is not None)
    metrics = WorkerMetrics(registry, card.name, hello.worker_id)
    metrics.model(card)
    for phase, seconds in parts.phases.items():
        metrics.startup(phase, seconds)
    gpu = claimed_gpu or (parts.gpu.uuid if parts.gpu is not None else None)
    if gpu is not None:
        metrics.gpu(gpu)
    if parts.gpu is not None:
        metrics.watch_graphs(parts.gpu.figures)
        telemetry = GpuTelemetry.open(parts.gpu.uuid)
        if telemetry is not None:
            metrics.watch_gpu(telemetry)
    if parts.grammars is not None:
        metrics.watch_grammars(parts.grammars)
    metrics.state(engine)
    service = WorkerService(
        engine,
        _protocol(engine, hello, settings.drain_seconds, tracer),
        SchedulerLink(settings.worker_address, settings.asset_address, identity, parts.assets, keys),
        metrics,
        Watchdog(settings.step_timeout_seconds, parts.step_seconds),
        SchedulerChoice(hello.worker_id, settings.worker_address, time.monotonic()),
    )
    admin = None
    if settings.admin_port:
        admin = AdminServer(
            settings.admin_host, settings.admin_port, registry, service.problem, service.unready
        )
    _log.info(
        "worker ready",
        model=card.name,
        worker_id=hello.worker_id,
        kv_tokens=engine.kv_tokens,
        max_model_len=card.max_model_len,
        **{f"{phase}_seconds": round(seconds, 2) for phase, seconds in parts.phases.items()},
    )
    return Worker(service, admin, tracer)


def _protocol(
    engine: EngineInterface, hello: WorkerHello, drain_seconds: float, tracer: Tracer | None
) -> WorkerProtocol:
    if tracer is None:
        return WorkerProtocol(engine, hello, drain_seconds)
    return WorkerProtocol(engine, hello, drain_seconds, StageSpans(tracer, hello.worker_id).ended)
