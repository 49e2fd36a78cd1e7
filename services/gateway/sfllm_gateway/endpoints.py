"""The endpoints that generate text: what differs between them, and the way that they share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm.settings import GatewaySettings
from sfllm_gateway import native, openapi
from sfllm_gateway.anthropic import messages
from sfllm_gateway.anthropic.answer import ID_PREFIX
from sfllm_gateway.anthropic.fields import MessagesRequest
from sfllm_gateway.budget import JournalBudget
from sfllm_gateway.changes import Changes
from sfllm_gateway.generation import Answer, Generation
from sfllm_gateway.idempotency_store import AnswerMemory, Turns
from sfllm_gateway.links import SchedulerLinks
from sfllm_gateway.metrics import GatewayMetrics
from sfllm_gateway.models import LoadedModel, ModelRegistry
from sfllm_gateway.openai import chat, completions, embeddings
from sfllm_gateway.openai.body import Body, decode_body
from sfllm_gateway.openai.chunks import ChatAnswer, CompletionAnswer
from sfllm_gateway.openai.fields import StreamOptions, TextFields
from sfllm_gateway.openai.responses import AnswerForm
from sfllm_gateway.openai.token_json import TokenNames
from sfllm_gateway.responses_api import answer as response
from sfllm_gateway.responses_api import endpoint as responses
from sfllm_gateway.responses_api.fields import ResponsesRequest
from sfllm_gateway.session import Session
from sfllm_gateway.tokenize import TextPool

if TYPE_CHECKING:
    from sfllm.otlp import Tracer


class GatewayState:
    """What the endpoints of one gateway process share."""

    def __init__(
        self,
        settings: GatewaySettings,
        links: SchedulerLinks,
        registry: ModelRegistry,
        changes: Changes,
        metrics: GatewayMetrics,
        pool: TextPool,
        tracer: Tracer | None = None,
    ) -> None:
        self.settings = settings
        self.tracer = tracer
        self.links = links
        self.registry = registry
        self.changes = changes
        self.metrics = metrics
        self.pool = pool
        self.draining = False
        self.open_requests = 0
        self.sessions: set[Session] = set()
        self.journals = JournalBudget(settings.max_journal_bytes)
        self.turns = Turns(AnswerMemory(settings.max_idempotency_bytes, settings.idempotency_seconds))
        metrics.journal_bytes.set_function(lambda: self.journals.reserved)
        metrics.schedulers.set_function(lambda: links.connected)

    def problem(self) -> str | None:
        """Why no request can be served now, None if one can."""
        if self.draining:
            return "this gateway is shutting down"
        if not self.links.connected:
            return self.links.trouble()
        return self.registry.problem()

    async def model_to_serve(self, name: str | None) -> LoadedModel:
        """The model of a request, as soon as it can be submitted.

        While the scheduler is restarted, or this gateway has just been, requests wait for up to
        `connect_wait_seconds`. Raises 404 for a model that does not exist, 503 after the wait.
        """
        until = time.monotonic() + self.settings.connect_wait_seconds
        while True:
            try:
                self.links.check_connected()
                return self.registry.resolve(name)
            except ServiceError as error:
                left = until - time.monotonic()
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE or left <= 0:
                    raise
            await self.changes.wait(left)

    def fail_all(self, error: ServiceError) -> None:
        """End every open request."""
        for session in list(self.sessions):
            session.fail(error)


class Endpoint(NamedTuple):
    """One generation endpoint. `check` needs no model, `prepare` does; `answer` writes what comes.

    `responses` are those of the OpenAPI document.
    """

    path: str
    name: str
    summary: str
    request_type: type[msgspec.Struct]
    id_prefix: str
    decode: Callable[[bytes], Body[Any]]
    check: Callable[[Any], None]
    prepare: Callable[[Any, LoadedModel, TextPool], Awaitable[Generation]]
    answer: Callable[[Any, Generation, str, float], Answer]
    responses: Mapping[int | str, dict[str, Any]] = openapi.GENERATION_RESPONSES


def _chat_answer(request: chat.ChatRequest, generation: Generation, name: str, _arrived: float) -> Answer:
    return ChatAnswer(_form(request, generation, name), *_usage_options(request), generation.parsers)


def _completion_answer(
    request: completions.CompletionRequest, generation: Generation, name: str, _arrived: float
) -> Answer:
    return CompletionAnswer(_form(request, generation, name), *_usage_options(request))


def _native_answer(
    request: native.GenerateRequest, generation: Generation, name: str, arrived: float
) -> Answer:
    return native.NativeAnswer(request.rid or name, arrived, generation.n)


def _embedding_answer(
    request: embeddings.EmbeddingRequest, generation: Generation, _name: str, _arrived: float
) -> Answer:
    return embeddings.EmbeddingAnswer(request, generation)


def _form(request: TextFields, generation: Generation, name: str) -> AnswerForm:
    return AnswerForm(
        id=name,
        created=int(time.time()),
        model=generation.model.card.name,
        names=TokenNames(
            generation.model.text.detokenizers.token_bytes, bool(request.return_tokens_as_token_ids)
        ),
        prompts=generation.prompts if request.return_token_ids else None,
        n=generation.n,
    )


def _usage_options(request: TextFields) -> tuple[bool, bool]:
    options = request.stream_options or StreamOptions()
    return bool(options.include_usage), bool(options.continuous_usage_stats)


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        "chat_completions",
        "Answer a conversation",
        chat.ChatRequest,
        "chatcmpl-",
        lambda body: decode_body(body, chat.decoder),
        chat.check,
        chat.prepare,
        _chat_answer,
    ),
    Endpoint(
        "/v1/completions",
        "completions",
        "Continue texts or token ids",
        completions.CompletionRequest,
        "cmpl-",
        lambda body: decode_body(body, completions.decoder),
        completions.check,
        completions.prepare,
        _completion_answer,
    ),
    Endpoint(
        "/generate",
        "generate",
        "Continue a text or token ids, in the native form",
        native.GenerateRequest,
        "gen-",
        native.decode,
        native.check,
        native.prepare,
        _native_answer,
    ),
    Endpoint(
        "/v1/embeddings",
        "embeddings",
        "Turn texts or token ids into rows of numbers",
        embeddings.EmbeddingRequest,
        "embd-",
        lambda body: decode_body(body, embeddings.decoder),
        embeddings.check,
        embeddings.prepare,
        _embedding_answer,
        openapi.WHOLE_RESPONSES,
    ),
    Endpoint(
        "/v1/messages",
        "messages",
        "Answer a conversation, in Anthropic's form",
        MessagesRequest,
        ID_PREFIX,
        messages.decode,
        messages.check,
        messages.prepare,
        messages.answer,
        openapi.MESSAGES_RESPONSES,
    ),
    Endpoint(
        "/v1/responses",
        "responses",
        "Answer a conversation, in the form of OpenAI's responses",
        ResponsesRequest,
        response.ID_PREFIX,
        responses.decode,
        responses.check,
        responses.prepare,
        responses.answer,
        openapi.RESPONSES_RESPONSES,
    ),
)
