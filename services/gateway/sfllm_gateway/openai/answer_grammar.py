"""The grammar of a chat's answer: calls that must be made, the form of its content, thinking before both."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.structured import Form, grammar_of
from sfllm_gateway.openai.tools import Calls, calls_lark, parameters_of
from sfllm_gateway.parsing.formats import CallFormat
from sfllm_gateway.parsing.think import CLOSER, OPENER

_encode = msgspec.json.Encoder().encode


class Thinking(NamedTuple):
    """Whether answers may begin with thinking, and whether the prompt has begun it already."""

    possible: bool
    inside: bool


async def answer_grammar(
    form: Form | None, calls: Calls | None, call_format: CallFormat, thinking: Thinking, model: LoadedModel
) -> str:
    """The grammar that an answer must follow, "" for none. Raises 400 naming the field at fault.

    Where a call must be made, it is the answer, whatever its form should have been otherwise.
    """
    rules = "" if calls is None else await _call_rules(calls, call_format, model)
    if calls is not None and calls.required:
        return _composed(_after_thinking("calls", rules, thinking))
    if form is None:
        return ""
    grammar = await grammar_of(form, model)
    if calls is None and not thinking.possible:
        return grammar
    start = "@answer" if calls is None else "(@answer | calls)"
    return _composed(_after_thinking(start, rules, thinking), answer=grammar)


async def _call_rules(calls: Calls, call_format: CallFormat, model: LoadedModel) -> str:
    """The rules of calls, tried out. Raises 400 naming the schema at fault."""
    for place, function in calls.functions:
        param = f"tools[{place}].function.parameters"
        await model.text.grammars.compile("json", _encode(parameters_of(function)).decode(), param)
    rules = calls_lark(calls, call_format, model.text.tokenizer)
    await model.text.grammars.compile("grammar", f"start: calls\n{rules}", "tools")
    return rules


def _composed(lark: str, **named: str) -> str:
    """A Lark grammar that calls compiled ones by their names, in llguidance's form."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    for name, grammar in named.items():
        if grammar.lstrip().startswith("{"):
            (part,) = msgspec.json.decode(grammar)["grammars"]
        else:
            part = {"lark_grammar": grammar}
        grammars.append({**part, "name": name})
    return _encode({"grammars": grammars}).decode()


def _after_thinking(start: str, rules: str, thinking: Thinking) -> str:
    if not thinking.possible:
        return f"start: {start}\n{rules}"
    closer = CLOSER.replace("/", "\\/")
    marks = f"thinking[lazy]: /[\\s\\S]*{closer}/\ngap: /[ \\n]{{1,4}}/\n"
    before = "thinking gap?" if thinking.inside else f'("{OPENER}" thinking gap?)?'
    return f"start: {before} {start}\n{marks}{rules}"
