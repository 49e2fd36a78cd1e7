"""Decoding request bodies: the fields, what is refused, what is ignored, and how a 400 names its field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from sfllm.errors import ECHO_LIMIT_CHARACTERS, ErrorCode, ServiceError
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.openai.unbuilt import UNBUILT, refuse_unbuilt

MAX_IGNORED_NAMES = 10

NO_EFFECT = frozenset({"metadata", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields about the client's own bookkeeping: nothing here could heed them, so nothing is ignored."""

T = TypeVar("T", bound=msgspec.Struct)


class Body(NamedTuple, Generic[T]):
    """A decoded request body, and the names of fields that mean nothing here."""

    request: T
    ignored: Sequence[str]


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> Body[T]:
    """A request of the decoder's type. Raises 400 naming the field at fault, 501 for what is not built."""
    fields = decode_fields(body)
    refuse_unbuilt(fields)
    try:
        request = decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error
    known = decoder.type.__struct_encode_fields__
    ignored = [name for name in fields if name not in known and name not in {*UNBUILT, *NO_EFFECT}]
    return Body(request, ignored)


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_fields(body: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, their values undecoded. Raises 400."""
    try:
        return _fields_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error


def invalid(error: Exception) -> ServiceError:
    """The 400 for a body that does not decode; `param` is the path that msgspec names."""
    text = str(error) or type(error).__name__
    if isinstance(error, msgspec.ValidationError):
        text, _, path = text.partition(" - at `$")
        param = path.rstrip("`").lstrip(".").partition("[...]")[0] or None  # a key of an object has no name
        missing = re.search(r"missing required field `(\w+)`", text)
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
        param = None if param is None else param[:ECHO_LIMIT_CHARACTERS]
        message = f"{param}: {text}" if param else f"the body is not what is expected here: {text}"
        return ServiceError(ErrorCode.INVALID_REQUEST, message[: 2 * ECHO_LIMIT_CHARACTERS], param=param)
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    return ServiceError(
        ErrorCode.INVALID_REQUEST, f"the body is not valid JSON: {text[:ECHO_LIMIT_CHARACTERS]}"
    )


def bad_value(param: str, message: str) -> ServiceError:
    """The 400 for a value that its type allows and its meaning does not."""
    return ServiceError(ErrorCode.INVALID_REQUEST, f"{param}: {message}", param=param)


def about_field(error: ServiceError, param: str) -> ServiceError:
    """The same error about the field `param`: what an API of another kind calls the one at fault."""
    message = error.message
    if error.param is not None and message.startswith(error.param):
        message = param + message[len(error.param) :]
    return ServiceError(error.code, message, param=param, retry_after_seconds=error.retry_after_seconds)
