"""Every error that a client can be told about, and the HTTP status each one becomes.

A service raises `ServiceError` (or sends its `ErrorCode` over the wire) and the
gateway turns it into `{"error": {message, type, param, code}}`. The mapping is
here and nowhere else.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

ECHO_LIMIT_CHARACTERS = 200
"""Input quoted in a message is cut here: an uncut echo turns a small body into a huge answer."""


class ErrorCode(enum.StrEnum):
    """What went wrong. The value crosses the wire and appears as `error.code`."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    INVALID_API_KEY = "invalid_api_key"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    QUEUE_FULL = "queue_full"
    BODY_TOO_LARGE = "body_too_large"
    SERVICE_UNAVAILABLE = "service_unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    ENGINE_FAILURE = "engine_failure"
    NOT_SUPPORTED = "not_supported"


class HttpError(NamedTuple):
    """How an `ErrorCode` looks over HTTP."""

    status: int
    type: str


HTTP_ERRORS: dict[ErrorCode, HttpError] = {
    ErrorCode.INVALID_REQUEST: HttpError(400, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: HttpError(400, "invalid_request_error"),
    ErrorCode.IDEMPOTENCY_KEY_REUSED: HttpError(400, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: HttpError(404, "not_found_error"),
    ErrorCode.NOT_FOUND: HttpError(404, "not_found_error"),
    ErrorCode.METHOD_NOT_ALLOWED: HttpError(405, "invalid_request_error"),
    ErrorCode.INVALID_API_KEY: HttpError(401, "authentication_error"),
    ErrorCode.RATE_LIMIT_EXCEEDED: HttpError(429, "rate_limit_error"),
    ErrorCode.QUEUE_FULL: HttpError(429, "overloaded_error"),
    ErrorCode.BODY_TOO_LARGE: HttpError(413, "invalid_request_error"),
    ErrorCode.SERVICE_UNAVAILABLE: HttpError(503, "service_unavailable_error"),
    ErrorCode.DEADLINE_EXCEEDED: HttpError(504, "timeout_error"),
    ErrorCode.ENGINE_FAILURE: HttpError(500, "server_error"),
    ErrorCode.NOT_SUPPORTED: HttpError(501, "not_implemented_error"),
}


class ServiceError(Exception):
    """A failure with a code, a sentence for the client and, where it applies, the field at fault.

    `param` is the request field; `retry_after_seconds` becomes the `Retry-After` header.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    @property
    def http(self) -> HttpError:
        """Status and type of this error over HTTP."""
        return HTTP_ERRORS[self.code]


def quote(text: object) -> str:
    """`text` as it may appear inside an error message: `repr`, cut to a bounded length."""
    shown = repr(text if not isinstance(text, str) else text[: ECHO_LIMIT_CHARACTERS + 1])
    return shown if len(shown) <= ECHO_LIMIT_CHARACTERS else shown[: ECHO_LIMIT_CHARACTERS - 3] + "..."
