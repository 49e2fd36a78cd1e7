"""The HTTP surface: routes, request ids, and the one place where failures become answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfllm.errors import ErrorCode, ServiceError
from sfllm.metrics import CONTENT_TYPE
from sfllm.version import VERSION, VERSIONS
from sfllm_gateway import native, openapi, text_api
from sfllm_gateway.anthropic import messages
from sfllm_gateway.anthropic.errors import speaks_anthropic
from sfllm_gateway.anthropic.fields import CountRequest
from sfllm_gateway.budget import Share
from sfllm_gateway.endpoints import ENDPOINTS, Endpoint, GatewayState
from sfllm_gateway.error_answers import error_answer, send_error
from sfllm_gateway.failures import as_service_error
from sfllm_gateway.http_io import (
    ClientGoneError,
    Headers,
    header,
    read_body,
)
from sfllm_gateway.keys import ApiKeys
from sfllm_gateway.openai.responses import model_json
from sfllm_gateway.responses_api import stored
from sfllm_gateway.serving import serve_generation
from sfllm_gateway.tenant import KeyCheck
from sfllm_gateway.text_api import DetokenizeRequest, TokenizeRequest
from sfllm_gateway.traces import begin_trace

METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})

CLIENT_GONE = 499
"""The status that nobody sees, of a request whose client left before it was read (as nginx counts it)."""


EXPOSED_HEADERS = ("X-Request-Id", "Retry-After", "X-Sfllm-Ignored-Fields", "Idempotent-Replayed")
"""What a page of another origin may read of an answer's head, beside what every page may."""


class GenerationResponse(Response):
    """Hands the raw connection to a generation endpoint: nothing lies between a token and the socket."""

    def __init__(self, state: GatewayState, endpoint: Endpoint) -> None:
        super().__init__()
        self._state = state
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request that the endpoint was called with."""
        connection: Send = scope["state"]["connection"]

        def direct(message: Message) -> Awaitable[None]:
            # The layers between look at how an answer begins. Each would cost every token a coroutine.
            return (send if message["type"] == "http.response.start" else connection)(message)

        # A task of its own for the same reason: each token resumes all that awaits it, in turn.
        work = serve_generation(self._state, self._endpoint, scope, receive, direct)
        await asyncio.get_running_loop().create_task(work)


def build(state: GatewayState, keys: ApiKeys) -> ASGIApp:
    """The application of a gateway that lets in who has one of `keys`."""
    app = FastAPI(title="sfllm", version=VERSION, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(ServiceError, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_failure)
    app.add_exception_handler(Exception, _answer_failure)

    async def count_lost(_request: Request, _error: Exception) -> Response:
        state.metrics.disconnected.inc()
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientGoneError, count_lost)
    for endpoint in ENDPOINTS:
        _add_generation(app, state, endpoint)
    _add_models(app, state)
    _add_text(app, state)
    _add_count(app, state)
    stored.add_routes(app)
    _add_status(app, state)
    _add_info(app, state)
    types = [endpoint.request_type for endpoint in ENDPOINTS]
    openapi.install(app, [*types, TokenizeRequest, DetokenizeRequest, CountRequest])
    return HttpFront(_with_cors(KeyCheck(app, keys), state.settings.cors_origins), state)


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Lets pages of these origins read the answers, refusals included."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )


def _add_generation(app: FastAPI, state: GatewayState, endpoint: Endpoint) -> None:
    async def generate(request: Request) -> Response:  # noqa: ARG001 - FastAPI gives it
        return GenerationResponse(state, endpoint)

    app.add_api_route(
        endpoint.path,
        generate,
        methods=["POST"],
        name=endpoint.name,
        summary=endpoint.summary,
        openapi_extra=openapi.request_body(endpoint.request_type)
        | {"parameters": [openapi.TIMEOUT_PARAMETER]},
        responses=dict(endpoint.responses),
    )


def _add_models(app: FastAPI, state: GatewayState) -> None:
    @app.get("/v1/models", summary="The models that can be asked for, under all their names")
    async def models() -> JSONResponse:
        cards = [model_json(name, card) for name, card in state.registry.named_cards()]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model_id:path}", summary="One model", responses=openapi.error_responses(404, 503))
    async def model(model_id: str) -> JSONResponse:
        return JSONResponse(model_json(model_id, state.registry.card(model_id)))


async def _body_of(request: Request, state: GatewayState, share: Share) -> bytes:
    return await read_body(request.scope, request.receive, state.settings.max_body_bytes, share.grow)


def _add_text(app: FastAPI, state: GatewayState) -> None:
    errors = openapi.error_responses(400, 404, 413, 429, 501, 503)

    @app.post(
        "/tokenize",
        summary="The token ids of a text or a conversation",
        openapi_extra=openapi.request_body(TokenizeRequest),
        responses=errors,
    )
    async def tokenize(request: Request) -> Response:
        with state.journals.share() as share:
            wanted = text_api.decode_tokenize(await _body_of(request, state, share))
            model = state.registry.resolve(wanted.model)
            return _json(await text_api.tokenize(wanted, model, state.pool))

    @app.post(
        "/detokenize",
        summary="The text of token ids",
        openapi_extra=openapi.request_body(DetokenizeRequest),
        responses=errors,
    )
    async def detokenize(request: Request) -> Response:
        with state.journals.share() as share:
            wanted = text_api.decode_detokenize(await _body_of(request, state, share))
            model = state.registry.resolve(wanted.model)
            return _json(await text_api.detokenize(wanted, model, state.pool))

    @app.get(
        "/tokenizer_info",
        summary="Special tokens, chat template and class of a model's tokenizer",
        responses=openapi.error_responses(400, 404, 503),
    )
    async def tokenizer_info(model: str | None = None) -> Response:
        return _json(text_api.tokenizer_info(state.registry.resolve(model)))


def _add_count(app: FastAPI, state: GatewayState) -> None:
    @app.post(
        "/v1/messages/count_tokens",
        summary="How many tokens the prompt of a message has, in Anthropic's form",
        openapi_extra=openapi.request_body(CountRequest),
        responses=openapi.COUNT_RESPONSES,
    )
    async def count_tokens(request: Request) -> Response:
        with state.journals.share() as share:
            wanted = messages.decode_count(await _body_of(request, state, share))
            model = state.registry.resolve(wanted.model)
            return _json(await messages.count_tokens(wanted, model, state.pool))


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _add_status(app: FastAPI, state: GatewayState) -> None:
    @app.get("/health", summary="Whether this process lives; never waits for a model")
    @app.get("/ping", summary="The same as /health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "healthy", "timestamp": int(time.time())})

    @app.get("/ready", summary="Whether a request can be served now", responses=openapi.error_responses(503))
    async def ready() -> JSONResponse:
        problem = state.problem()
        if problem is not None:
            raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE, problem, retry_after_seconds=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="Prometheus metrics of this process", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(state.metrics.registry.render(), media_type=CONTENT_TYPE)

    @app.get("/version", summary="The versions of sfllm and of its protocol")
    async def version() -> JSONResponse:
        return JSONResponse(VERSIONS)


def _add_info(app: FastAPI, state: GatewayState) -> None:
    @app.get("/load", summary="How many generation requests are open in this process")
    async def load() -> Response:
        return _json({"server_load": state.open_requests})

    @app.get(
        "/get_model_info",
        summary="What is known of a model, in the native form",
        responses=openapi.error_responses(400, 404, 503),
    )
    async def model_info(model: str | None = None) -> Response:
        return _json(native.model_info(state.registry.resolve(model).card))

    @app.get("/get_server_info", summary="Version, limits and models of this server, in the native form")
    async def server_info() -> Response:
        return _json(
            {
                "version": VERSION,
                "status": state.problem() or "ready",
                "open_requests": state.open_requests,
                "max_streams": state.settings.max_streams,
                "max_body_bytes": state.settings.max_body_bytes,
                "request_timeout_seconds": state.settings.request_timeout_seconds,
                "max_request_timeout_seconds": state.settings.max_request_timeout_seconds,
                "max_journal_bytes": state.settings.max_journal_bytes,
                "models": state.registry.overview(),
            }
        )


class HttpFront:
    """The outermost layer: gives every request an id, counts it, and lets no failure through."""

    def __init__(self, app: ASGIApp, state: GatewayState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        scope.setdefault("state", {})["request_id"] = _client_id(scope) or secrets.token_hex(16)
        scope["state"]["connection"] = send
        trace = scope["state"]["trace"] = begin_trace(self._state.tracer, scope)
        status = 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = _id_headers(scope)
                message["headers"] = [*message.get("headers", ()), *names, *self._farewell()]
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        except Exception as error:  # noqa: BLE001 - the last place where a failure can be answered
            # Layers within answered what could be answered; they pass on what nobody foresaw.
            failure = as_service_error(error, scope["state"]["request_id"])
            if status == 0:
                await send_error(scope, counted_send, failure)
        finally:
            route = scope.get("route")
            method = scope["method"] if scope["method"] in METHODS else "other"
            handler = getattr(route, "path", "unmatched")
            self._state.metrics.http_requests.labels(method, str(status), handler).inc()
            if trace is not None:
                trace.ended(status)

    def _farewell(self) -> Headers:
        """A gateway that leaves tells each client to come back on another connection."""
        return ((b"connection", b"close"),) if self._state.draining else ()


def _id_headers(scope: Scope) -> Headers:
    """The request's id, under the name that its clients look for."""
    value = scope["state"]["request_id"].encode("latin-1")
    ids: Headers = ((b"x-request-id", value),)
    return (*ids, (b"request-id", value)) if speaks_anthropic(scope["path"]) else ids


def _client_id(scope: Scope) -> str | None:
    """The request id that the client chose, if it can be a header of the answer."""
    value = header(scope, b"x-request-id")
    return value if value and len(value) <= 128 and value.isascii() and value.isprintable() else None


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Whatever was raised, as an answer in the one shape."""
    failure = as_service_error(error, request.scope["state"]["request_id"])
    trace = request.scope["state"]["trace"]
    if trace is not None:
        trace.failed(failure)
    status, lines, body = error_answer(request.scope, failure)
    headers = {name.decode(): value.decode() for name, value in lines}
    if isinstance(error, HTTPException) and error.headers:
        headers |= {name: value for name, value in error.headers.items() if name.lower() == "allow"}
    return Response(body, status_code=status, headers=headers)
