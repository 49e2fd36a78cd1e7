"""The gateway process: what it is made of, how it starts, and how it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn
import zmq
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sfllm.admin import AdminServer
from sfllm.errors import ErrorCode, ServiceError
from sfllm.metrics import Metrics
from sfllm.settings import GatewaySettings
from sfllm.sockets import random_identity
from sfllm_gateway import app
from sfllm_gateway.assets import AssetLink
from sfllm_gateway.endpoints import GatewayState
from sfllm_gateway.http_io import ABORT
from sfllm_gateway.link import SchedulerLink
from sfllm_gateway.metrics import GatewayMetrics, LoopDelayProbe
from sfllm_gateway.models import ModelRegistry
from sfllm_gateway.rendering import RenderPool
from sfllm_gateway.tokenize import TextPool

SEND_BUFFER_BYTES = 64 * 2**10
"""What the kernel keeps for a client that does not read; unset it would be megabytes each."""

BACKLOG = 2048
FAREWELL_SECONDS = 1.0

log = structlog.get_logger()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose port further gateway processes may share. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


async def serve(settings: GatewaySettings) -> None:
    """Run a gateway until SIGTERM or SIGINT, then finish what is open and leave."""
    listener = listen(settings.host, settings.port)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    identity = random_identity(b"g-")
    metrics = GatewayMetrics(Metrics(settings.metrics_prefix))
    pool = TextPool()
    assets = AssetLink(context, settings.asset_address, identity)
    renderers = RenderPool()
    registry = ModelRegistry(assets.pull, pool, renderers)
    link = SchedulerLink(context, settings.gateway_address, identity, registry.update, settings.max_attempts)
    state = GatewayState(settings, link, registry, metrics, pool)
    probe = LoopDelayProbe(metrics)
    admin = None
    try:
        if settings.admin_port:
            admin = AdminServer(
                settings.admin_host,
                settings.admin_port,
                metrics.registry,
                problem=lambda: None,
                unready=state.problem,
            )
        registry.start()
        await _serve_http(state, listener)
    finally:
        listener.close()
        probe.close()
        await registry.close()
        await renderers.close()
        link.close()
        assets.close()
        pool.close()
        if admin is not None:
            admin.close()
        context.term()
        log.info("gateway stopped")


async def _serve_http(state: GatewayState, listener: socket.socket) -> None:
    settings = state.settings
    server = _Server(
        uvicorn.Config(
            app.build(state),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(settings.drain_seconds + 2 * FAREWELL_SECONDS),
        )
    )
    loop = asyncio.get_running_loop()

    def leave() -> None:
        if state.draining:
            server.force_exit = True  # asked twice
            return
        log.info("draining", open_requests=state.open_requests)
        state.draining = True
        server.should_exit = True
        farewell = ServiceError(
            ErrorCode.SERVICE_UNAVAILABLE, "this gateway is shutting down", retry_after_seconds=1
        )
        loop.call_later(settings.drain_seconds, state.fail_all, farewell)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    host, port = listener.getsockname()[:2]
    log.info("gateway listening", host=host, port=port)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, whose requests can cut their connection off."""

    def on_message_begin(self) -> None:
        """A request begins: tell it how to abort."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process decides how to leave."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield
