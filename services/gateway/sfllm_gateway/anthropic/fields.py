"""Bodies of `POST /v1/messages` and `/v1/messages/count_tokens`. null means absent, for every field.

One struct stands for every kind of content block: which fields a kind needs is checked in
`translate.py`, so that a known kind that is not served is told from one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sfllm.errors import ErrorCode, ServiceError
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.openai.body import decode_fields, invalid

NO_EFFECT = frozenset(
    {
        *("cache_control", "diagnostics", "inference_geo", "service_tier", "speed"),
        *("user_profile_id", "workspace_id"),
    }
)
"""Fields about billing, places and caching by request (here every prefix is cached): nothing is ignored."""

REFUSED = {
    "container": "there is no place to run code",
    "context_management": "conversations are taken as they are",
    "mcp_servers": "no tools are run here: the client runs them",
}
"""Fields that ask for something which is not served, and why."""


class ContentBlock(msgspec.Struct, kw_only=True):
    """A block of a message. Types text, tool_use, tool_result and thinking are served."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the client runs. Only type "custom", the default, is served."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """Whether a tool has to be used, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model thinks before it answers, where its chat template leaves the choice."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1, description="taken, without effect")] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    """A JSON schema that the text of the answer follows."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    """How much the model thinks, and the form of its text."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(msgspec.Struct, kw_only=True):
    """About the request."""

    user_id: Annotated[str, Meta(description="taken, without effect")] | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`: what makes the prompt."""

    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    model: str | None = None
    system: str | list[ContentBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, description="0: all tokens")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    metadata: Metadata | None = None
    # Beyond Anthropic's API, as on the other endpoints.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None


_messages_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountRequest)


def decode_messages(body: bytes) -> tuple[MessagesRequest, list[str]]:
    """A request and the names of fields that had no effect. Raises 400 or 501 naming the field at fault."""
    fields = decode_fields(body)
    _refuse(fields)
    try:
        request = _messages_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error
    known = {*MessagesRequest.__struct_fields__, *NO_EFFECT, *REFUSED}
    ignored = [name for name in fields if name not in known]
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        ignored.append("thinking.budget_tokens")
    return request, ignored


def decode_count(body: bytes) -> CountRequest:
    """A request to count. Raises 400 or 501 naming the field at fault."""
    _refuse(decode_fields(body))
    try:
        return _count_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error


def _refuse(fields: Mapping[str, msgspec.Raw]) -> None:
    for name, reason in REFUSED.items():
        if bytes(fields.get(name, b"null")).strip() not in {b"null", b"[]", b"{}"}:
            raise ServiceError(ErrorCode.NOT_SUPPORTED, f"{name}: not supported, {reason}", param=name)
