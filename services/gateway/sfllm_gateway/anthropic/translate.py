"""From Anthropic's messages to the chat that the model is given. Pure.

Results of tools become messages of the role tool, turns of one role in a row become one, and an
answer that the client began (a last message of the assistant) is gone on with. Whatever the chat would
refuse about messages is refused here, under the name that the client gave it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.anthropic.fields import (
    ContentBlock,
    CountRequest,
    InputMessage,
    MessagesRequest,
    OutputConfig,
    Tool,
)
from sfllm_gateway.openai.body import about_field, bad_value, invalid
from sfllm_gateway.openai.chat import ChatMessage, ChatRequest, ContentPart
from sfllm_gateway.openai.sampling import stop_strings
from sfllm_gateway.openai.tool_fields import CalledFunction, ToolCall

SERVED = {
    "user": {"text", "tool_result"},
    "assistant": {"text", "thinking", "tool_use"},
    "system": {"text"},
}
"""The content blocks that a message of each role may have."""

NEEDED = {
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
"""The fields that a block of each type must have."""

SAME = ("max_tokens", "stream", "temperature", "top_k", "top_p", "seed", "priority", "cache_salt")
"""Fields that mean the same in both."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}

EFFORTS = {"max": "xhigh"}
"""What chats call those that they name otherwise."""

RENAMED = (
    (r"tools\[(\d+)\]\.function\.parameters\b", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"tool_choice\.function\b", "tool_choice"),
    (r"parallel_tool_calls\b", "tool_choice.disable_parallel_tool_use"),
    (r"response_format\.json_schema\b", "output_config.format"),
    (r"response_format\b", "output_config.format"),
    (r"reasoning_effort\b", "output_config.effort"),
    (r"stop\b", "stop_sequences"),
)
"""What the chat calls fields, as patterns, and what the client called them."""

ERROR_MARK = "Error: "
"""Goes before the result of a tool that failed: chat templates have no other place for it."""


def chat_request(request: CountRequest) -> ChatRequest:
    """The chat that a request stands for. Raises 400 or 501 naming the request's own field."""
    messages = _messages(request)
    continues = _continues(messages, request.messages[-1])
    fields: dict[str, Any] = {"messages": messages, "model": request.model}
    fields["continue_final_message"] = continues or None
    fields |= _tools(request)
    if request.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": request.thinking.type != "disabled"}
    if request.output_config is not None:
        fields |= _output(request.output_config)
    if isinstance(request, MessagesRequest):
        fields |= _sampling(request)
    try:
        return msgspec.convert(fields, ChatRequest)
    except DECODE_ERRORS as error:
        raise renamed(invalid(error)) from error


def renamed(error: ServiceError) -> ServiceError:
    """An error about a field of the chat, with the name that the client knows."""
    return error if error.param is None else about_field(error, _own_name(error.param))


def _own_name(param: str) -> str:
    for pattern, name in RENAMED:
        if found := re.match(pattern, param):
            return found.expand(name) + param[found.end() :]
    return param


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    stop_strings(request.stop_sequences, "stop_sequences")
    fields: dict[str, Any] = {name: getattr(request, name) for name in SAME}
    fields["stop"] = request.stop_sequences
    fields["user"] = None if request.metadata is None else request.metadata.user_id
    return fields


def _output(config: OutputConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config.effort is not None:
        fields["reasoning_effort"] = EFFORTS.get(config.effort, config.effort)
    if config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _messages(request: CountRequest) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    if isinstance(request.system, str):
        found.append(ChatMessage(role="system", content=request.system))
    elif request.system:
        found += _from_blocks("system", request.system, "system")
    for index, message in enumerate(request.messages):
        path = f"messages[{index}].content"
        if isinstance(message.content, str):
            found.append(ChatMessage(role=message.role, content=message.content))
        elif not message.content and message.role != "assistant":
            raise bad_value(path, "at least one content block is needed")
        else:
            found += _from_blocks(message.role, message.content, path)
    return _merged(found)


def _from_blocks(role: str, blocks: Sequence[ContentBlock], path: str) -> list[ChatMessage]:
    for number, block in enumerate(blocks):
        _check_block(block, SERVED[role], f"{path}[{number}]")
    if role == "assistant":
        return [_assistant(blocks, path)]
    if role == "system":
        return [ChatMessage(role="system", content=_parts(blocks))]
    found = []
    for number, block in enumerate(blocks):
        if block.type == "text":
            found.append(ChatMessage(role="user", content=_parts([block])))
        else:
            text = _result_text(block, f"{path}[{number}].content")
            found.append(ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id))
    return found


def _check_block(block: ContentBlock, served: set[str], path: str) -> None:
    if block.type not in NEEDED:
        raise ServiceError(
            ErrorCode.NOT_SUPPORTED,
            f"{path}.type: blocks of type {quote(block.type)} are not supported, only "
            f"{', '.join(sorted(served))}",
            param=f"{path}.type",
        )
    if block.type not in served:
        raise bad_value(
            f"{path}.type", f"a {block.type} block cannot be here, only {', '.join(sorted(served))}"
        )
    for name in NEEDED[block.type]:
        if getattr(block, name) is None:
            raise bad_value(f"{path}.{name}", f"a {block.type} block needs it")


def _assistant(blocks: Sequence[ContentBlock], path: str) -> ChatMessage:
    texts = [block for block in blocks if block.type == "text"]
    thoughts = [block.thinking for block in blocks if block.thinking and block.type == "thinking"]
    calls = [
        _call(block, f"{path}[{number}].input")
        for number, block in enumerate(blocks)
        if block.type == "tool_use"
    ]
    return ChatMessage(
        role="assistant",
        content=_parts(texts) if texts else None,
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _call(block: ContentBlock, path: str) -> ToolCall:
    try:
        arguments = msgspec.json.encode(block.input).decode()
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise bad_value(path, f"cannot be passed on ({error})") from error
    assert block.name is not None
    return ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=arguments))


def _result_text(block: ContentBlock, path: str) -> str:
    if isinstance(block.content, list):
        for number, part in enumerate(block.content):
            _check_block(part, SERVED["system"], f"{path}[{number}]")
        text = "\n".join(part.text or "" for part in block.content)
    else:
        text = block.content or ""
    return ERROR_MARK + text if block.is_error else text


def _parts(blocks: Sequence[ContentBlock]) -> str | list[ContentPart]:
    """One text as it is, several as parts, which the chat template or `prompt.py` joins."""
    if len(blocks) == 1:
        return blocks[0].text or ""
    return [ContentPart(type="text", text=block.text) for block in blocks]


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Turns of one role in a row as one turn: there are templates that refuse anything else."""
    found: list[ChatMessage] = []
    for message in messages:
        if found and found[-1].role == message.role != "tool":
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    return found


def _joined(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    parts = [*_as_parts(first.content), *_as_parts(second.content)]
    thoughts = [text for text in (first.reasoning_content, second.reasoning_content) if text]
    return ChatMessage(
        role=first.role,
        content=parts or "",
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=[*(first.tool_calls or ()), *(second.tool_calls or ())] or None,
    )


def _as_parts(content: str | list[ContentPart] | None) -> list[ContentPart]:
    if isinstance(content, list):
        return content
    return [ContentPart(type="text", text=content)] if content else []


def _continues(messages: list[ChatMessage], last: InputMessage) -> bool:
    """Whether the client began the answer. One that it began without any text is taken out."""
    if last.role != "assistant":
        return False
    if messages[-1].tool_calls:
        raise bad_value(
            "messages", "the last message has tool_use blocks: their tool_result blocks must follow"
        )
    if any(part.text for part in _as_parts(messages[-1].content)):
        return True
    del messages[-1]
    if not messages:
        raise bad_value("messages", "there is nothing to answer")
    return False


def _tools(request: CountRequest) -> dict[str, Any]:
    tools = [_function(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or ())]
    fields: dict[str, Any] = {"tools": tools or None, "tool_choice": None}
    choice = request.tool_choice
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use is not None and tools:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if choice.type != "tool":
        fields["tool_choice"] = CHOICES[choice.type]
    elif choice.name is None:
        raise bad_value("tool_choice.name", 'type "tool" needs the name of one')
    else:
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if choice.type in {"any", "tool"} and not tools:
        raise bad_value("tool_choice", "there are no tools to choose from")
    return fields


def _function(tool: Tool, path: str) -> dict[str, Any]:
    if tool.type not in {None, "custom"}:
        raise ServiceError(
            ErrorCode.NOT_SUPPORTED,
            f"{path}.type: tools of type {quote(tool.type)} are not supported: no tools are run here",
            param=f"{path}.type",
        )
    if tool.input_schema is None:
        raise bad_value(f"{path}.input_schema", "a tool needs it")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}
