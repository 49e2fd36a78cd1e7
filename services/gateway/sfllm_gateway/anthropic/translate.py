"""From Anthropic's messages to the chat that the model is given. Pure.

Results of tools become messages of the role tool, turns of one role in a row become one, and an
answer that the client began (a last message of the assistant) is gone on with. Whatever the chat would
refuse about messages is refused here, under the name that the client gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm_gateway.anthropic.fields import ContentBlock, CountRequest, InputMessage, MessagesRequest, Tool
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.chat import ChatMessage, ChatRequest, ContentPart
from sfllm_gateway.openai.sampling import stop_strings

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

CHOICES = {"auto": "auto", "any": "required", "none": "none"}

ERROR_MARK = "Error: "
"""Goes before the result of a tool that failed: chat templates have no other place for it."""


def chat_request(request: CountRequest) -> ChatRequest:
    """The chat that a request stands for. Raises 400 or 501 naming the request's own field."""
    messages = _messages(request)
    chat = ChatRequest(messages=messages, model=request.model)
    _continue(chat, request.messages[-1])
    _choose_tools(chat, request)
    if request.thinking is not None:
        chat.chat_template_kwargs = {"enable_thinking": request.thinking.type != "disabled"}
    if isinstance(request, MessagesRequest):
        _sample(chat, request)
    return chat


def _sample(chat: ChatRequest, request: MessagesRequest) -> None:
    stop_strings(request.stop_sequences, "stop_sequences")
    chat.stop = request.stop_sequences
    chat.max_tokens = request.max_tokens
    chat.stream = request.stream
    chat.temperature, chat.top_k, chat.top_p = request.temperature, request.top_k, request.top_p
    chat.seed, chat.priority, chat.cache_salt = request.seed, request.priority, request.cache_salt
    chat.user = None if request.metadata is None else request.metadata.user_id


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


def _call(block: ContentBlock, path: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.encode(block.input).decode()
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise bad_value(path, f"cannot be passed on ({error})") from error
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


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


def _continue(chat: ChatRequest, last: InputMessage) -> None:
    """An answer that the client began is continued; one without any text begins anew."""
    if last.role != "assistant":
        return
    path = "messages"
    message = chat.messages[-1]
    if message.tool_calls:
        raise bad_value(path, "the last message has tool_use blocks: their tool_result blocks must follow")
    if any(part.text for part in _as_parts(message.content)):
        chat.continue_final_message = True
        return
    del chat.messages[-1]
    if not chat.messages:
        raise bad_value(path, "there is nothing to answer")


def _choose_tools(chat: ChatRequest, request: CountRequest) -> None:
    chat.tools = [
        _function(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or ())
    ] or None
    choice = request.tool_choice
    if chat.tools and (choice is None or choice.type != "none"):
        raise ServiceError(ErrorCode.NOT_SUPPORTED, "tools: calls are not found yet", param="tools")
    if choice is None:
        return
    if choice.type == "tool" and choice.name is None:
        raise bad_value("tool_choice.name", 'type "tool" needs the name of one')
    if choice.type in {"any", "tool"} and not chat.tools:
        raise bad_value("tool_choice", "there are no tools to choose from")


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
