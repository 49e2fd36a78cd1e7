"""What failures look like as answers of their own: in OpenAI's shape, or in Anthropic's on its paths."""

from __future__ import annotations

from typing import NamedTuple

from starlette.types import Scope, Send

from sfllm.errors import ServiceError
from sfllm_gateway.anthropic import errors as anthropic
from sfllm_gateway.http_io import Headers, error_headers, error_json, send_answer


class ErrorAnswer(NamedTuple):
    """An error over HTTP."""

    status: int
    headers: Headers
    body: bytes


def error_answer(scope: Scope, error: ServiceError) -> ErrorAnswer:
    """The answer to a request that failed before anything was sent."""
    headers = error_headers(error)
    if not anthropic.speaks_anthropic(scope["path"]):
        return ErrorAnswer(error.http.status, headers, error_json(error))
    body = anthropic.error_json(error, scope["state"]["request_id"])
    return ErrorAnswer(anthropic.ERRORS[error.code].status, headers, body)


async def send_error(scope: Scope, send: Send, error: ServiceError) -> None:
    """Answer a request that failed before anything was sent."""
    await send_answer(send, *error_answer(scope, error))
