"""Errors in Anthropic's shape, with Anthropic's statuses where it has one of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError

PREFIX = "/v1/messages"

_encode = msgspec.json.Encoder().encode


class MessagesError(NamedTuple):
    """How an `ErrorCode` looks on Anthropic's paths."""

    status: int
    type: str


ERRORS: dict[ErrorCode, MessagesError] = {
    ErrorCode.INVALID_REQUEST: MessagesError(400, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: MessagesError(400, "invalid_request_error"),
    ErrorCode.IDEMPOTENCY_KEY_REUSED: MessagesError(400, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: MessagesError(404, "not_found_error"),
    ErrorCode.NOT_FOUND: MessagesError(404, "not_found_error"),
    ErrorCode.METHOD_NOT_ALLOWED: MessagesError(405, "invalid_request_error"),
    ErrorCode.INVALID_API_KEY: MessagesError(401, "authentication_error"),
    ErrorCode.RATE_LIMIT_EXCEEDED: MessagesError(429, "rate_limit_error"),
    ErrorCode.QUEUE_FULL: MessagesError(529, "overloaded_error"),
    ErrorCode.BODY_TOO_LARGE: MessagesError(413, "request_too_large"),
    ErrorCode.SERVICE_UNAVAILABLE: MessagesError(503, "overloaded_error"),
    ErrorCode.DEADLINE_EXCEEDED: MessagesError(504, "timeout_error"),
    ErrorCode.ENGINE_FAILURE: MessagesError(500, "api_error"),
    ErrorCode.NOT_SUPPORTED: MessagesError(501, "invalid_request_error"),
}


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's errors."""
    return path == PREFIX or path.startswith(PREFIX + "/")


def error_fields(error: ServiceError) -> dict[str, Any]:
    """What an error says. The message names the field at fault, for which there is no other place."""
    return {"type": "error", "error": {"type": ERRORS[error.code].type, "message": error.message}}


def error_json(error: ServiceError, request_id: str) -> bytes:
    """The body of an error."""
    return _encode({**error_fields(error), "request_id": request_id})
