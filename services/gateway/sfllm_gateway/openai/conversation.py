"""Messages for chat templates: calls as templates expect them, and tools for those that know none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm_gateway.openai.tool_fields import Tool
from sfllm_gateway.parsing.formats import HERMES, LLAMA3, MISTRAL, CallFormat

MISTRAL_ID_LENGTH = 9

TOOLS_TEXT = """You can call functions to help with what the user asks.
These are the functions, as JSON in <tools></tools>:
<tools>
{tools}
</tools>
To call a function, answer with a JSON object with its name and arguments in <tool_call></tool_call>:
<tool_call>
{{"name": "function name", "arguments": {{...}}}}
</tool_call>"""
"""What Hermes tells its models of tools, in our words."""

_encode = msgspec.json.Encoder().encode

Messages = list[dict[str, Any]]


def shown_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools as templates show them."""
    return [msgspec.to_builtins(tool) for tool in tools] if tools else None


def with_objects(messages: Messages) -> Messages:
    """Arguments of calls as objects instead of their text, which is what templates are written for."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments") or "{}"
            if isinstance(arguments, str):
                call["function"]["arguments"] = msgspec.json.decode(arguments)
    return messages


def as_taught(messages: Messages, form: CallFormat) -> Messages:
    """The conversation as a family's templates take it.

    Llama's refuse several calls in a message, Mistral's refuse ids that are not nine letters and digits.
    """
    if form is LLAMA3:
        return [single for message in messages for single in _single_calls(message)]
    if form is MISTRAL:
        for message in messages:
            for call in message.get("tool_calls") or ():
                call["id"] = _nine(call.get("id"))
            if message.get("tool_call_id") is not None:
                message["tool_call_id"] = _nine(message["tool_call_id"])
    return messages


def _single_calls(message: dict[str, Any]) -> Messages:
    calls = message.get("tool_calls") or ()
    if len(calls) < 2:
        return [message]
    first, *others = ({**message, "tool_calls": [call]} for call in calls)
    return [first, *({**other, "content": None} for other in others)]


def _nine(name: str | None) -> str:
    """An id of nine letters and digits, the same for the same id."""
    if name is not None and len(name) == MISTRAL_ID_LENGTH and name.isascii() and name.isalnum():
        return name
    return hashlib.sha256((name or "").encode("utf-8", "surrogatepass")).hexdigest()[:MISTRAL_ID_LENGTH]


def without_tools(messages: Messages, tools: Sequence[Tool] | None) -> Messages:
    """The conversation for a template that knows no tools: said in text, as models of Hermes read it."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(_encode(tool).decode() for tool in tools)
    text = TOOLS_TEXT.format(tools=lines)
    if plain[0]["role"] in {"system", "developer"}:
        first = {**plain[0], "content": f"{_text(plain[0].get('content'))}\n\n{text}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls")
    if not calls:
        return message
    parts = [_text(message.get("content"))] if message.get("content") else []
    for call in calls:
        function = {"name": call["function"]["name"], "arguments": call["function"].get("arguments") or {}}
        parts.append(f"{HERMES.opener}\n{_encode(function).decode()}\n{HERMES.closer}")
    return {
        **{name: value for name, value in message.items() if name != "tool_calls"},
        "content": "\n".join(parts),
    }


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""
