"""`POST /v1/chat/completions`: the request, and what it asks to generate."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm_gateway.generation import Generation, Prompts
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.common import (
    TextFields,
    bad_value,
    check_stream_options,
    sampling_of,
    stop_strings,
)
from sfllm_gateway.prompt import template_messages
from sfllm_gateway.tokenize import TextPool, encode


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message's content. Only type "text" is served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(TextFields, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


decoder = msgspec.json.Decoder(ChatRequest)


def check(request: ChatRequest) -> None:
    """Raise 400 or 501 for what can be told without the model."""
    check_stream_options(request)
    stop_strings(request.stop)
    if not request.messages:
        raise bad_value("messages", "at least one message is needed")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_value("continue_final_message", "contradicts add_generation_prompt")


def _check_message(message: ChatMessage, path: str) -> None:
    if message.content is None and message.role != "assistant":
        raise bad_value(f"{path}.content", f"a message of role {message.role} needs content")
    if not isinstance(message.content, list):
        return
    for number, part in enumerate(message.content):
        where = f"{path}.content[{number}]"
        if part.type != "text":
            raise ServiceError(
                ErrorCode.NOT_SUPPORTED,
                f"{where}.type: only text parts are supported, got {quote(part.type)}",
                param=f"{where}.type",
            )
        if part.text is None:
            raise bad_value(f"{where}.text", "a text part needs text")


async def prepare(request: ChatRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Render, tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    template = model.text.template
    if template is None:
        raise ServiceError(
            ErrorCode.INVALID_REQUEST,
            f"the model {quote(model.card.name)} has no chat template: use /v1/completions",
            param="model",
        )
    messages = template_messages([msgspec.to_builtins(message) for message in request.messages])
    continuing = bool(request.continue_final_message)
    adds_prompt = not continuing if request.add_generation_prompt is None else request.add_generation_prompt

    def tokens() -> Prompts:
        text = template.render(
            messages,
            add_generation_prompt=adds_prompt,
            continue_final_message=continuing,
            extra=request.chat_template_kwargs,
        )
        # The template writes the special tokens itself, the beginning of the text included.
        return encode(model.text.tokenizer, [text], add_special_tokens=False)

    prompts = await pool.run(tokens)
    return Generation(
        model=model,
        prompts=prompts,
        n=request.n or 1,
        samplings=[sampling_of(request, model.card, len(prompts[0]), None, "messages")],
        stops=stop_strings(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        stream=bool(request.stream),
    )
