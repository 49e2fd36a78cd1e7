"""The gateway's spans of one generation request: the request itself, tokenizing, detokenizing, lost attempts.

Attributes are those of OpenTelemetry's conventions for HTTP servers and generative AI, and `sfllm.*`
where those have no name. Texts are in none of them.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import structlog
from starlette.types import Scope

from sfllm.errors import ServiceError
from sfllm.traceparent import parse
from sfllm_gateway.generation import Generation, Usage
from sfllm_gateway.http_io import header
from sfllm_gateway.streams import LostAttempt

if TYPE_CHECKING:
    from sfllm.otlp import Attributes, OpenSpan, Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
"""What the conventions call the work of each endpoint that generates; other requests are not traced."""


class UnsentSpan:
    """A client's own span where none are sent: its ids go on to the other services, for their logs."""

    def __init__(self, traceparent: str, trace_id: str) -> None:
        self.traceparent = traceparent
        self.trace_id = trace_id

    def rename(self, name: str) -> None:
        """Nobody is told of it."""

    def set(self, attributes: Attributes) -> None:
        """Nobody is told of it."""

    def child(
        self, name: str, started: float, ended: float, attributes: Attributes, problem: str = ""
    ) -> None:
        """Nobody is told of it."""

    def end(self, problem: str = "") -> None:
        """Nobody is told of it."""


class RequestTrace:
    """The trace of one request from its head to its last byte. Times are monotonic seconds."""

    def __init__(self, span: OpenSpan | UnsentSpan, operation: str, arrived: float) -> None:
        self._span = span
        self._operation = operation
        self._arrived = arrived
        self._streams = False
        self._first_text = self._last_text = arrived
        self._texts = 0
        self._text_seconds = 0.0
        self._failure = ""

    @property
    def traceparent(self) -> str:
        """What goes to other services with what they are to do for this request."""
        return self._span.traceparent

    def prepared(
        self, asked: str | None, generation: Generation, answer_id: str, began: float, ended: float
    ) -> None:
        """The client's prompts are token ids, which took from `began` to `ended`."""
        name = generation.model.card.name
        self._streams = generation.stream
        self._span.rename(f"{self._operation} {asked or name}")
        self._span.set(
            {
                "gen_ai.request.model": asked or name,
                "gen_ai.response.model": name,
                "gen_ai.response.id": answer_id,
                **_sampling(generation),
            }
        )
        count = sum(map(len, generation.prompts))
        self._span.child("tokenize", began, ended, {"sfllm.prompt_tokens": count})

    def made_text(self, began: float, ended: float) -> None:
        """Tokens that had come were made into text."""
        if not self._texts:
            self._first_text = began
        self._texts += 1
        self._last_text = ended
        self._text_seconds += ended - began

    def generated(self, usage: Usage, reasons: Sequence[str], lost: Iterable[LostAttempt]) -> None:
        """No more tokens come. `reasons` are why each choice ended."""
        if self._texts:
            if self._streams:
                self._span.set({"gen_ai.response.time_to_first_chunk": self._first_text - self._arrived})
            attributes: Attributes = {"sfllm.busy_seconds": self._text_seconds, "sfllm.pieces": self._texts}
            self._span.child("detokenize", self._first_text, self._last_text, attributes)
        for attempt in lost:
            attributes = {"sfllm.attempt": attempt.attempt, "sfllm.cause": attempt.cause}
            self._span.child("lost attempt", attempt.started, attempt.ended, attributes, attempt.cause)
        self._span.set(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.response.finish_reasons": list(reasons),
            }
        )

    def failed(self, error: ServiceError) -> None:
        """The client is told of this error, by its status or in a stream that had begun."""
        self._failure = error.code.value

    def ended(self, status: int) -> None:
        """The answer is over."""
        refused = 400 <= status < 500
        if self._failure or status >= 400:
            self._failure = self._failure or str(status)
            self._span.set({"error.type": self._failure})
        self._span.set({"http.response.status_code": status})
        # What is a client's own mistake is no failure of a server.
        self._span.end("" if refused else self._failure)


def begin_trace(tracer: Tracer | None, scope: Scope) -> RequestTrace | None:
    """The trace of a request that generates, whose id all logs about it carry; None for any other.

    Without a tracer only those have one that come with a header `traceparent`.
    """
    structlog.contextvars.clear_contextvars()  # of a request before it on the same connection
    operation = OPERATIONS.get(scope["path"])
    if operation is None or scope["method"] != "POST":
        return None
    given = header(scope, b"traceparent") or ""
    arrived = time.monotonic()
    span = _unsent(given) if tracer is None else _server_span(tracer, given, operation, scope, arrived)
    if span is None:
        return None
    structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
    return RequestTrace(span, operation, arrived)


def _unsent(given: str) -> UnsentSpan | None:
    parent = parse(given) if given else None
    return None if parent is None else UnsentSpan(str(parent), f"{parent.trace_id:032x}")


def _server_span(tracer: Tracer, given: str, operation: str, scope: Scope, arrived: float) -> OpenSpan:
    host, port = scope.get("server") or ("", None)
    return tracer.begin(
        operation,
        given,
        arrived,
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "sfllm",
            "http.request.method": "POST",
            "http.route": scope["path"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "server.address": host,
            "server.port": port or 0,
            "sfllm.request_id": scope["state"]["request_id"],
        },
    )


def _sampling(generation: Generation) -> Attributes:
    """How tokens are chosen, as the conventions name it."""
    sampling = generation.samplings[0]
    if sampling.pooling:
        return {}
    found: dict[str, str | bool | int | float | list[str]] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.stream": generation.stream,
    }
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if generation.seeded:
        found["gen_ai.request.seed"] = sampling.seed
    if generation.n > 1:
        found["gen_ai.request.choice.count"] = generation.n
    return found
