"""From a request for a response to the chat that it stands for, and back from the chat's errors. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from sfllm.errors import ServiceError, quote
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.openai.body import about_field, bad_value, invalid
from sfllm_gateway.openai.chat import ChatRequest
from sfllm_gateway.responses_api.fields import (
    LOGPROBS,
    AllowedTool,
    Format,
    Reasoning,
    ResponsesRequest,
    TextConfig,
    Tool,
    ToolChoice,
    unsupported,
)
from sfllm_gateway.responses_api.items import conversation

SAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "stream", "user"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "stop", "ignore_eos"),
    *("chat_template_kwargs", "cache_salt", "priority", "parallel_tool_calls", "structured_outputs"),
)
"""Fields that mean the same in both."""

RENAMED = (
    (r"tools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"tool_choice\.function\b", "tool_choice"),
    (r"response_format\.json_schema\b", "text.format"),
    (r"response_format\b", "text.format"),
    (r"reasoning_effort\b", "reasoning.effort"),
    (r"max_completion_tokens\b", "max_output_tokens"),
    (r"messages$", "input"),
)
"""What the chat calls fields, as patterns, and what the client called them."""


class Translation(NamedTuple):
    """A chat, and where its messages and tools came from."""

    chat: ChatRequest
    origins: Sequence[str]
    tool_numbers: Sequence[int]

    def renamed(self, error: ServiceError) -> ServiceError:
        """The error with the names that the client knows."""
        return error if error.param is None else about_field(error, self._rename(error.param))

    def _rename(self, param: str) -> str:
        if found := re.match(r"messages\[(\d+)\]", param):
            return self.origins[int(found[1])] + param[found.end() :]
        if found := re.match(r"tools\[(\d+)\]", param):
            param = f"tools[{self.tool_numbers[int(found[1])]}]{param[found.end() :]}"
        for pattern, name in RENAMED:
            if found := re.match(pattern, param):
                return found.expand(name) + param[found.end() :]
        return param


def translate(request: ResponsesRequest) -> Translation:
    """The chat that a request stands for. Raises 400 or 501 naming the request's own field."""
    messages, origins = conversation(request)
    fields: dict[str, Any] = {name: getattr(request, name) for name in SAME}
    fields |= {"messages": messages, "max_completion_tokens": request.max_output_tokens}
    if LOGPROBS in (request.include or ()) or request.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    fields["response_format"] = _response_format((request.text or TextConfig()).format)
    fields["reasoning_effort"] = (request.reasoning or Reasoning()).effort
    numbers, choice = _choose(request.tools or [], request.tool_choice)
    tools = request.tools or []
    fields["tools"] = [_function(tools[number], f"tools[{number}]") for number in numbers] or None
    fields["tool_choice"] = choice
    translation = Translation(ChatRequest(messages=messages), origins, numbers)
    try:
        return translation._replace(chat=msgspec.convert(fields, ChatRequest))
    except DECODE_ERRORS as error:
        raise translation.renamed(invalid(error)) from error


def _function(tool: Tool, path: str) -> dict[str, Any]:
    if tool.type != "function":
        raise unsupported(
            f"{path}.type", f"tools of type {quote(tool.type)} are not supported: no tools are run here"
        )
    if tool.name is None:
        raise bad_value(f"{path}.name", "a function needs it")
    fields = ("name", "description", "parameters", "strict")
    found = {name: getattr(tool, name) for name in fields if getattr(tool, name) is not None}
    return {"type": "function", "function": found}


def _choose(tools: Sequence[Tool], choice: str | ToolChoice | None) -> tuple[list[int], Any]:
    """The numbers of the tools that may be called, and the chat's `tool_choice`."""
    numbers = list(range(len(tools)))
    if not isinstance(choice, ToolChoice):
        return numbers, choice
    if choice.type == "function":
        if choice.name is None:
            raise bad_value("tool_choice.name", 'type "function" needs the name of one')
        return numbers, {"type": "function", "function": {"name": choice.name}}
    if choice.type != "allowed_tools":
        raise unsupported(
            "tool_choice.type", f"tools of type {quote(choice.type)} are not supported: no tools are run here"
        )
    if not choice.tools:
        raise bad_value("tool_choice.tools", "at least one tool is needed")
    allowed = {_allowed(tool, tools, f"tool_choice.tools[{n}]") for n, tool in enumerate(choice.tools)}
    return [number for number in numbers if tools[number].name in allowed], choice.mode or "auto"


def _allowed(wanted: AllowedTool, tools: Sequence[Tool], path: str) -> str:
    if wanted.type != "function":
        raise unsupported(f"{path}.type", f"tools of type {quote(wanted.type)} are not supported")
    if wanted.name is None or wanted.name not in {tool.name for tool in tools}:
        raise bad_value(f"{path}.name", "there is no such tool")
    return wanted.name


def _response_format(wanted: Format | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.schema is None or wanted.name is None:
        missing = "name" if wanted.name is None else "schema"
        raise bad_value(f"text.format.{missing}", "a json_schema needs it")
    fields = ("name", "description", "schema", "strict")
    found = {name: getattr(wanted, name) for name in fields if getattr(wanted, name) is not None}
    return {"type": "json_schema", "json_schema": found}
