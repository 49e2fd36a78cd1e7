"""`POST /v1/chat/completions`: the request, and what it asks to generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.generation import Generation, Prompts
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.answer_grammar import answer_grammar
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.conversation import as_taught, shown_tools, with_objects, without_tools
from sfllm_gateway.openai.fields import TextFields, TopCount
from sfllm_gateway.openai.reading import reading_of
from sfllm_gateway.openai.reasoning import Effort, template_variables
from sfllm_gateway.openai.sampling import (
    BadWords,
    check_text_fields,
    encode_bad_words,
    limits_of,
    make_sampling,
    stop_strings,
    truncate,
)
from sfllm_gateway.openai.structured import form_of
from sfllm_gateway.openai.tool_fields import Tool, ToolCall, ToolChoice
from sfllm_gateway.openai.tools import calls_of
from sfllm_gateway.tokenize import TextPool, encode


class TemplateFields(Protocol):
    """The fields of a request that say how messages become a prompt."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: Effort | None
    tools: list[Tool] | None
    tool_choice: str | ToolChoice | None


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
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(TextFields, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: (
        Annotated[str | ToolChoice, Meta(description="auto, none, required, or a function")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[TopCount, Meta(description="only with logprobs")] | None = None


decoder = msgspec.json.Decoder(ChatRequest)


def check(request: ChatRequest) -> None:
    """Raise 400 or 501 for what can be told without the model."""
    check_text_fields(request)
    check_messages(request.messages, request)
    calls_of(request)
    if request.top_logprobs and not request.logprobs:
        raise bad_value("top_logprobs", "only allowed together with logprobs")


def check_messages(messages: Sequence[ChatMessage], fields: TemplateFields) -> None:
    """Raise 400 or 501 for messages that no template could render."""
    if not messages:
        raise bad_value("messages", "at least one message is needed")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    if fields.continue_final_message and fields.add_generation_prompt:
        raise bad_value("continue_final_message", "contradicts add_generation_prompt")


def _check_message(message: ChatMessage, path: str) -> None:
    if message.content is None and message.role != "assistant":
        raise bad_value(f"{path}.content", f"a message of role {message.role} needs content")
    for number, call in enumerate(message.tool_calls or ()):
        _check_call(call, f"{path}.tool_calls[{number}].function.arguments")
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


def _check_call(call: ToolCall, param: str) -> None:
    """Raise 400 for arguments that are no object, which no template could show as one."""
    arguments = call.function.arguments
    if not arguments or isinstance(arguments, dict):
        return
    try:
        value = msgspec.json.decode(arguments)
    except DECODE_ERRORS as error:
        raise bad_value(param, "must be the text of a JSON object") from error
    if not isinstance(value, dict):
        raise bad_value(param, "must be the text of a JSON object")


async def render(messages: Sequence[ChatMessage], fields: TemplateFields, model: LoadedModel) -> str:
    """The prompt of a conversation. Raises 400 for a model without template, or one that refuses."""
    template = model.text.template
    if template is None:
        raise ServiceError(
            ErrorCode.INVALID_REQUEST,
            f"the model {quote(model.card.name)} has no chat template: use /v1/completions",
            param="model",
        )
    continuing = bool(fields.continue_final_message)
    adds_prompt = not continuing if fields.add_generation_prompt is None else fields.add_generation_prompt
    shown = with_objects([msgspec.to_builtins(message) for message in messages])
    if template.knows_tools:
        shown = as_taught(shown, model.text.dialect.form)
    else:
        shown = without_tools(shown, None if fields.tool_choice == "none" else fields.tools)
    return await template.render(
        shown,
        add_generation_prompt=adds_prompt,
        continue_final_message=continuing,
        tools=shown_tools(fields.tools) if template.knows_tools else None,
        extra=template_variables(fields.reasoning_effort, fields.chat_template_kwargs),
    )


async def prepare(request: ChatRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Render, tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    text = await render(request.messages, request, model)
    reading = reading_of(request, text, model)
    limits = limits_of(request, None)

    def tokens() -> tuple[Prompts, BadWords]:
        tokenizer = model.text.tokenizer
        # The template writes the special tokens itself, the beginning of the text included.
        prompts = encode(tokenizer, [text], add_special_tokens=False)
        cut = [truncate(ids, request.truncate_prompt_tokens, limits, model.card) for ids in prompts]
        return cut, encode_bad_words(tokenizer, request.bad_words)

    prompts, bad_words = await pool.run(tokens)
    grammar = await answer_grammar(form_of(request), reading.calls, reading.form, reading.thinking, model)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = make_sampling(
        *(request, model.card, limits.resolve(model.card, len(prompts[0]), "messages"), bad_words),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        grammar=grammar,
    )
    return Generation(
        model=model,
        prompts=prompts,
        n=request.n or 1,
        samplings=[sampling],
        stops=stop_strings(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        stream=bool(request.stream),
        seeded=request.seed is not None,
        cache_salt=request.cache_salt or "",
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        parsers=reading.parsers(prompts[0]),
        shown_tokens=reading.marks,
    )
