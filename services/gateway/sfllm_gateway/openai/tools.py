"""Which tools an answer may or must call, and the grammar of an answer that must."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from sfllm_gateway.grammars import JSON_SPACE
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.tool_fields import Function, Tool, ToolChoice
from sfllm_gateway.parsing.formats import LLAMA3, MISTRAL, CallFormat
from sfllm_gateway.parsing.tool_calls import MAX_CALLS

LINE_BREAK = "\n"

NO_PARAMETERS: dict[str, Any] = {"type": "object", "additionalProperties": False}


class ToolFields(Protocol):
    """The fields of a request about tools."""

    tools: list[Tool] | None
    tool_choice: str | ToolChoice | None
    parallel_tool_calls: bool | None


class Calls(NamedTuple):
    """What may be called: these functions, at their places among the tools.

    `required`: one of them must be. `named`: the client said which. `parallel`: there may be several calls.
    """

    functions: Sequence[tuple[int, Function]]
    required: bool = False
    named: bool = False
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """What the functions are called."""
        return frozenset(function.name for _, function in self.functions)


def calls_of(fields: ToolFields) -> Calls | None:
    """What a request lets the model call, None for nothing. Raises 400 for a choice that makes no sense."""
    tools, choice = fields.tools or [], fields.tool_choice
    functions = list(enumerate(tool.function for tool in tools))
    names = [function.name for _, function in functions]
    for index, (_, function) in enumerate(functions):
        if parameters_of(function)["type"] != "object":
            raise bad_value(f"tools[{index}].function.parameters", "arguments are of type object")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise bad_value(f"tools[{index}].function.name", "another function has this name")
    parallel = fields.parallel_tool_calls is not False
    if isinstance(choice, ToolChoice):
        return _chosen(choice, functions, parallel)
    if choice not in {None, "auto", "none", "required"}:
        raise bad_value("tool_choice", "must be auto, none, required or an object that names a function")
    if choice == "required" and not tools:
        raise bad_value("tool_choice", "there are no tools to choose from")
    if choice == "none" or not tools:
        return None
    return Calls(functions, required=choice == "required", parallel=parallel)


def _chosen(choice: ToolChoice, functions: list[tuple[int, Function]], parallel: bool) -> Calls:
    if choice.type == "function":
        if choice.function is None:
            raise bad_value("tool_choice.function", "needed for the type function")
        only = _named([choice.function.name], functions, "tool_choice.function.name")
        return Calls(only, required=True, named=True, parallel=parallel)
    allowed = choice.allowed_tools
    if allowed is None or not allowed.tools:
        raise bad_value("tool_choice.allowed_tools", "at least one tool is needed")
    wanted = [tool.function.name for tool in allowed.tools]
    found = _named(wanted, functions, "tool_choice.allowed_tools.tools")
    return Calls(found, required=allowed.mode == "required", parallel=parallel)


def _named(
    names: Sequence[str], functions: list[tuple[int, Function]], param: str
) -> list[tuple[int, Function]]:
    missing = set(names) - {function.name for _, function in functions}
    if missing:
        raise bad_value(param, f"{min(missing)[:64]} is not among the tools")
    return [item for item in functions if item[1].name in names]


def parameters_of(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    return NO_PARAMETERS if function.parameters is None else {"type": "object", **function.parameters}


def calls_lark(calls: Calls, form: CallFormat, special: Mapping[str, int]) -> str:
    """Rules of a Lark grammar, `calls` first, for one call or, where several may be, more of them.

    `special` are the model's special tokens, which are not matched by their text.
    """
    rules = [_list_rule(form, calls.parallel and not calls.named, special)]
    rules.append("call: " + " | ".join(f"call{place}" for place, _ in calls.functions))
    for place, function in calls.functions:
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{form.arguments}": ')
        schema = {**parameters_of(function), "x-guidance": {"whitespace_pattern": JSON_SPACE}}
        rules.append(f'call{place}: {head} arguments{place} "}}"')
        rules.append(f"arguments{place}: %json {msgspec.json.encode(schema).decode()}")
    return "\n".join(rules) + "\n"


def mark(text: str, special: Mapping[str, int]) -> str:
    """A mark as a part of a Lark grammar."""
    return f"<[{special[text]}]>" if text in special else json.dumps(text)


def _list_rule(form: CallFormat, several: bool, special: Mapping[str, int]) -> str:
    def repeated(item: str, separator: str) -> str:
        return f"{item} ({json.dumps(separator)} {item}){{0,{MAX_CALLS - 1}}}" if several else item

    if form is LLAMA3:
        return f"calls: {repeated('call', '; ')}"
    if form is MISTRAL:
        return f'calls: {mark(form.opener, special)} "[" {repeated("call", ", ")} "]"'
    begin, end = mark(form.opener, special), mark(form.closer, special)
    return f'calls: {repeated("one", LINE_BREAK)}\none: {begin} "\\n" call "\\n" {end}'
