"""The gateway process: what it is made of, how it starts, and how it leaves."""

from __future__ import annotations

import structlog
import zmq

from sfllm.admin import AdminServer
from sfllm.link_keys import read_client_keys
from sfllm.metrics import Metrics
from sfllm.settings import GatewaySettings
from sfllm.sockets import random_identity
from sfllm.tracing import open_tracer
from sfllm_gateway import app
from sfllm_gateway.assets import AssetLinks
from sfllm_gateway.changes import Changes
from sfllm_gateway.dialect import DialectChoice
from sfllm_gateway.endpoints import GatewayState
from sfllm_gateway.grammars import GrammarPool
from sfllm_gateway.http_server import check_certificate, listen, serve_http
from sfllm_gateway.keys import ApiKeys
from sfllm_gateway.links import SchedulerLinks
from sfllm_gateway.metrics import GatewayMetrics, LoopDelayProbe
from sfllm_gateway.models import ModelRegistry
from sfllm_gateway.rendering import RenderPool
from sfllm_gateway.tokenize import TextPool

log = structlog.get_logger()


class UnusableSettingError(Exception):
    """What a setting names cannot be used; the text says which and why, without any secret."""


async def serve(settings: GatewaySettings) -> None:
    """Run a gateway until SIGTERM or SIGINT, then finish what is open and leave.

    Raises UnusableSettingError for a certificate or a file of keys that cannot be used, and for traces that
    nothing is installed for; OSError for a port that cannot be had.
    """
    identity = random_identity(b"g-")
    try:
        tracer = open_tracer(settings, "gateway", identity.decode())
        keys = ApiKeys(settings.api_key, settings.api_key_file)
        link_keys = read_client_keys(settings.link_keys, "gateway") if settings.link_keys else None
        check_certificate(settings)
    except ValueError as error:
        raise UnusableSettingError(str(error)) from error
    listener = listen(settings.host, settings.port)
    if not keys.needed:
        log.info("no API keys are set: whoever reaches this port may use it")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    exposed = Metrics(settings.metrics_prefix)
    exposed.links(encrypted=link_keys is not None)
    metrics = GatewayMetrics(exposed)
    pool = TextPool()
    assets = AssetLinks(context, settings.asset_address, identity, link_keys)
    renderers, grammars = RenderPool(), GrammarPool()
    changes = Changes()
    registry = ModelRegistry(
        lambda asset: assets.pull(asset, links.holders(asset)),
        pool,
        renderers,
        grammars,
        changes.tell,
        DialectChoice(settings.tool_call_parser, settings.reasoning_parser),
    )
    links = SchedulerLinks(
        *(context, settings.gateway_address, identity),
        *(registry.update, changes.tell),
        max_attempts=settings.max_attempts,
        keys=link_keys,
    )
    state = GatewayState(settings, links, registry, changes, metrics, pool, tracer)
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
        await serve_http(app.build(state, keys), state, listener)
    finally:
        listener.close()
        probe.close()
        await registry.close()
        await renderers.close()
        await grammars.close()
        links.close()
        assets.close()
        pool.close()
        if admin is not None:
            admin.close()
        context.term()
        if tracer is not None:
            tracer.close()
        log.info("gateway stopped")
