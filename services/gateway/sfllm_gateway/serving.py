"""How a request to one of the endpoints that generate is served, from its first byte to its last."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import structlog
from starlette.types import Receive, Scope, Send

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.budget import Share
from sfllm_gateway.client import Client, request_timeout
from sfllm_gateway.echo import answer_echo
from sfllm_gateway.endpoints import Endpoint, GatewayState
from sfllm_gateway.http_io import ABORT, Headers, header, read_body
from sfllm_gateway.idempotency import KEY_HEADER, Attempt, attempt_of
from sfllm_gateway.idempotency_store import Recorder, replay
from sfllm_gateway.openai.body import MAX_IGNORED_NAMES, bad_value
from sfllm_gateway.session import Session, SessionContext
from sfllm_gateway.traces import RequestTrace

log = structlog.get_logger()


async def serve_generation(
    state: GatewayState, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve one request from its first body byte to its last answer byte. Raises `ServiceError`."""
    arrived = time.monotonic()
    if state.open_requests >= state.settings.max_streams:
        raise ServiceError(
            ErrorCode.QUEUE_FULL, "this gateway has as many requests open as it may", retry_after_seconds=1
        )
    client = Client(receive, arrived + request_timeout(scope, state.settings))
    state.open_requests += 1
    state.metrics.open_requests.inc()
    try:
        with state.journals.share() as share:
            await _serve_client(state, endpoint, scope, client, send, arrived, share)
    finally:
        client.close()
        state.open_requests -= 1
        state.metrics.open_requests.dec()


async def _serve_client(
    state: GatewayState,
    endpoint: Endpoint,
    scope: Scope,
    client: Client,
    send: Send,
    arrived: float,
    share: Share,
) -> None:
    limit = state.settings.max_body_bytes
    body = await client.wait_for(read_body(scope, client.receive, limit, share.grow))
    client.watch()
    request, ignored = endpoint.decode(body)
    key = header(scope, KEY_HEADER.lower().encode())
    attempt = attempt_of(key, scope["state"]["tenant"], endpoint.path, body)
    del body
    _take_request_id(request.request_id, scope)
    endpoint.check(request)
    work = _Work(endpoint, request, client, arrived, share, _ignored_header(state, ignored), attempt)
    if attempt is None:
        await _generate(state, work, scope, send)
        return
    kept = await client.wait_for(state.turns.wait(attempt))
    if kept is not None:
        state.metrics.idempotent_replays.inc()
        await replay(kept, send)
        return
    async with state.turns.take(attempt):
        recorder = Recorder(send)
        await _generate(state, work, scope, recorder)
        state.turns.keep(attempt, recorder.kept)


class _Work(NamedTuple):
    """One request whose body is understood: what is asked, who waits for it, and what is told beside it."""

    endpoint: Endpoint
    request: Any
    client: Client
    arrived: float
    share: Share
    headers: Headers
    attempt: Attempt | None


async def _generate(state: GatewayState, work: _Work, scope: Scope, send: Send) -> None:
    endpoint, request, client = work.endpoint, work.request, work.client
    model = await client.wait_for(state.model_to_serve(request.model))
    began = time.monotonic()
    generation = await client.wait_for(endpoint.prepare(request, model, state.pool))
    prepared = time.monotonic()
    generation = generation._replace(tenant=scope["state"]["tenant"])
    request_id = scope["state"]["request_id"]
    name = request_id
    if work.attempt is not None:
        generation, name = work.attempt.seeded(generation), work.attempt.name
    answer = endpoint.answer(request, generation, endpoint.id_prefix + name, work.arrived)
    trace: RequestTrace | None = scope["state"]["trace"]
    if trace is not None:
        trace.prepared(request.model, generation, endpoint.id_prefix + name, began, prepared)
    log.debug("request accepted", request_id=request_id)
    if not generation.needs_worker:
        await answer_echo(generation, answer, send, work.headers)
        return
    await client.wait_for(state.model_to_serve(model.card.name))  # tokenizing took a while
    abort = scope["extensions"][ABORT]["abort"]
    context = SessionContext(state.links, state.metrics, state.settings)
    session = Session(context, generation, answer, request_id, work.arrived, abort, trace)
    work.share.exchange(generation)
    state.sessions.add(session)
    try:
        await session.run(client, send, work.headers)
    finally:
        state.sessions.discard(session)


def _take_request_id(value: str | None, scope: Scope) -> None:
    """A request id in the body goes before the header's. It is echoed, so it must fit a header."""
    if value is None:
        return
    if not value or not value.isascii() or not value.isprintable():
        raise bad_value("request_id", "must be printable ASCII")
    scope["state"]["request_id"] = value


def _ignored_header(state: GatewayState, ignored: Any) -> Headers:
    """Names the fields that had no effect, as far as they are fit for a header."""
    if not ignored:
        return ()
    state.metrics.ignored_fields.inc(len(ignored))
    shown = sorted(name for name in ignored if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII))
    return ((b"x-sfllm-ignored-fields", ", ".join(shown[:MAX_IGNORED_NAMES] or ["?"]).encode()),)
