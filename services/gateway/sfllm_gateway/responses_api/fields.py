"""Body of `POST /v1/responses`. null means absent, for every field.

One struct stands for every kind of item and of tool: which fields a kind needs is checked in
`items.py` and `tools.py`, so that a known kind that is not served is told from one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from sfllm.errors import ErrorCode, ServiceError
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.openai.body import NO_EFFECT, bad_value, decode_fields, invalid
from sfllm_gateway.openai.fields import Penalty, Repetition, TopCount
from sfllm_gateway.openai.forms import StructuredOutputs

KEEPS_NOTHING = "this server keeps no responses"

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "background": (f"{KEEPS_NOTHING}, so there would be none to ask for later", (False,)),
    "background_options": (f"{KEEPS_NOTHING}, so there would be none to ask for later", ({},)),
    "context_management": ("conversations are taken as they are", ([],)),
    "conversation": (f"{KEEPS_NOTHING}: send the items of the conversation as input", ()),
    "moderation": ("nothing is moderated here", ()),
    "previous_response_id": (f"{KEEPS_NOTHING}: send the items of the conversation as input", ()),
    "prompt": ("no prompt templates are kept here: send its text as instructions and input", ()),
    "store": (f"{KEEPS_NOTHING}: leave store out, or send false", (False,)),
    "truncation": ("items that do not fit are never dropped", ("disabled",)),
}
"""Fields that ask for something which is not served, why, and the values that ask for nothing."""

BOOKKEEPING = frozenset({*NO_EFFECT, "image", "prompt_cache_options", "prompt_cache_retention"})
"""Fields about billing, caching by request (here every prefix is cached) and images, of which there are
none: nothing here could heed them, so nothing is ignored."""

LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    # A model's reasoning is in plain text in its items, so that it needs no encrypted form.
    "reasoning.encrypted_content",
    # About items that never are: there is nothing to include.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class Part(msgspec.Struct, kw_only=True):
    """A part of an item. Types input_text, output_text, refusal, reasoning_text, summary_text are served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, kw_only=True):
    """An item of the input: message (the default), reasoning, function_call or function_call_output."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool. Only type "function", which the client runs, is served."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of the tools that may be called."""

    type: str
    name: str | None = None


class ToolChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Type "function": the tool that has to be called. Type "allowed_tools": those that may be."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = None


class Format(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """What the text is to be like."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct, kw_only=True):
    """How much the model thinks."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides its events."""

    include_obfuscation: bool | None = None


MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/responses`."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Include] | None = None
    top_logprobs: TopCount | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    user: str | None = None
    max_tool_calls: (
        Annotated[int, Meta(description="of tools that the server runs: there are none")] | None
    ) = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Beyond OpenAI's API, as on the other endpoints.
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None


class Decoded(NamedTuple):
    """A request, `tools` and `text.format` as the response shows them, and what had no effect."""

    request: ResponsesRequest
    tools: msgspec.Raw
    format: msgspec.Raw
    ignored: list[str]


_decoder = msgspec.json.Decoder(ResponsesRequest)
_NESTED = {"text": TextConfig, "reasoning": Reasoning}


def decode(body: bytes) -> Decoded:
    """The request. Raises 400 naming the field at fault, 501 for what is not served."""
    fields = decode_fields(body)
    _refuse(fields)
    try:
        request = _decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error
    _check(request)
    known = {*ResponsesRequest.__struct_fields__, *BOOKKEEPING, *REFUSED}
    ignored = [name for name in fields if name not in known]
    for name, kind in _NESTED.items():
        if getattr(request, name) is not None:
            inner = decode_fields(fields[name])
            ignored += [f"{name}.{field}" for field in inner if field not in kind.__struct_fields__]
    form = (request.text or TextConfig()).format or Format(type="text")
    return Decoded(request, _shown("tools", request.tools or []), _shown("text.format", form), ignored)


def unsupported(param: str, message: str) -> ServiceError:
    """The 501 for what is known and not served."""
    return ServiceError(ErrorCode.NOT_SUPPORTED, f"{param}: {message}", param=param)


def _refuse(fields: Mapping[str, msgspec.Raw]) -> None:
    for name, (reason, neutral) in REFUSED.items():
        raw = fields.get(name)
        if raw is None:
            continue
        try:
            value = msgspec.json.decode(raw)
        except DECODE_ERRORS as error:
            raise bad_value(name, "is malformed") from error
        # By type as well: 0 is not false.
        if value is not None and not any(type(value) is type(same) and value == same for same in neutral):
            raise unsupported(name, f"not supported, {reason}")


def _check(request: ResponsesRequest) -> None:
    """What values mean that their types allow."""
    if request.input == []:
        raise bad_value("input", "at least one item is needed")
    options = request.stream_options
    if options is not None and not request.stream:
        raise bad_value("stream_options", "only allowed together with stream")
    if options is not None and options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "events are never padded here")
    if request.text is not None and request.text.verbosity in {"low", "high"}:
        raise unsupported("text.verbosity", "not supported: ask for it in the instructions")
    reasoning = request.reasoning or Reasoning()
    for name in ("summary", "generate_summary"):
        if getattr(reasoning, name) in {"concise", "detailed"}:
            raise unsupported(f"reasoning.{name}", "reasoning is shown as it is, and not summarized")


def _shown(param: str, value: Any) -> msgspec.Raw:
    """As JSON. Raises 400 for what is nested so deeply that it can only just be read."""
    try:
        return msgspec.Raw(msgspec.json.encode(value))
    except RecursionError as error:
        raise bad_value(param, "is nested too deeply") from error
