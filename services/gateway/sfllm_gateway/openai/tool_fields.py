"""The fields about tools, as clients of OpenAI give them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that the model may call. `parameters` is a JSON schema; without it there are none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool: always a function, which the client runs."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, kw_only=True):
    """Which function."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """Which of the tools."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(msgspec.Struct, kw_only=True):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct, kw_only=True):
    """A function that must be called, or the functions that may be."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """What an earlier answer called; `arguments` is the text of a JSON object."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, kw_only=True):
    """A call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
