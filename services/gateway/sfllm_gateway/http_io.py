"""Reading request bodies within bounds, and writing plain answers and errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from sfllm.errors import ErrorCode, ServiceError

BODY_TIMEOUT_SECONDS = 60.0

Headers = Sequence[tuple[bytes, bytes]]

ABORT = "sfllm.abort"
"""ASGI extension: `scope["extensions"][ABORT]["abort"]()` cuts the connection off, unsent bytes and all."""

JSON_HEADERS: Headers = ((b"content-type", b"application/json"),)
EVENT_HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

DONE = b"data: [DONE]\n\n"
"""Ends the streams of OpenAI's older endpoints and of the native one, after an error too."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment that tells a client, and whatever is between, that a silent stream is alive."""

_encode = msgspec.json.Encoder().encode


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request header (lower-case `name`), None if absent."""
    value = next((value for key, value in scope["headers"] if key == name), None)
    return None if value is None else value.decode("latin-1")


async def read_body(scope: Scope, receive: Receive, limit: int, reserve: Callable[[int], None]) -> bytes:
    """The request body. Raises 400 for another content type, 413 beyond `limit` bytes.

    `reserve` is asked for room before each part is kept; what it raises is passed on.
    """
    kind = (header(scope, b"content-type") or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServiceError(ErrorCode.INVALID_REQUEST, "the content type must be application/json")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                reserve(len(part))
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise ServiceError(
            ErrorCode.INVALID_REQUEST, f"the body did not arrive in {BODY_TIMEOUT_SECONDS:.0f} s"
        ) from error


def _too_large(limit: int) -> ServiceError:
    return ServiceError(ErrorCode.BODY_TOO_LARGE, f"the body is larger than {limit} bytes")


def error_json(error: ServiceError) -> bytes:
    """The one shape of every error."""
    return _encode(
        {
            "error": {
                "message": error.message,
                "type": error.http.type,
                "param": error.param,
                "code": error.code.value,
            }
        }
    )


def failed_stream(error: ServiceError) -> bytes:
    """The end of a stream that `DONE` ends and that failed."""
    return b"data: %s\n\n%s" % (error_json(error), DONE)


def error_headers(error: ServiceError) -> Headers:
    """The headers of an error answer: how long to wait or what to present, where that helps."""
    if error.code is ErrorCode.INVALID_API_KEY:
        return (*JSON_HEADERS, (b"www-authenticate", b"Bearer"))
    if error.retry_after_seconds is None:
        return JSON_HEADERS
    seconds = max(1, math.ceil(error.retry_after_seconds))
    return (*JSON_HEADERS, (b"retry-after", b"%d" % seconds))


async def send_answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """A whole answer."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
