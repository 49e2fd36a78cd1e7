"""The one place where whatever was raised becomes the error that a client is told."""

from __future__ import annotations

import structlog
from starlette.exceptions import HTTPException

from sfllm.errors import ErrorCode, ServiceError

KNOWN: dict[int, tuple[ErrorCode, str]] = {
    404: (ErrorCode.NOT_FOUND, "there is nothing at this path"),
    405: (ErrorCode.METHOD_NOT_ALLOWED, "this path does not answer this method"),
    413: (ErrorCode.BODY_TOO_LARGE, "the body is too large"),
}

log = structlog.get_logger()


def as_service_error(error: Exception, request_id: str) -> ServiceError:
    """The error for the client. What nobody foresaw is logged, and told without internals."""
    if isinstance(error, ServiceError):
        if error.http.status in {500, 504}:
            log.warning("request failed", request_id=request_id, code=error.code.value, reason=error.message)
        return error
    if isinstance(error, HTTPException):
        code, message = KNOWN.get(error.status_code, (ErrorCode.INVALID_REQUEST, str(error.detail)))
        return ServiceError(code, message)
    log.error("unexpected failure", request_id=request_id, exc_info=error)
    return ServiceError(ErrorCode.ENGINE_FAILURE, f"internal error; request id {request_id}")
