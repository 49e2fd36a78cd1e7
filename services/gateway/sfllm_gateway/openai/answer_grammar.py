"""The grammar of a chat's answer: calls that must be made, the form of its content, thinking before both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.structured import Form, grammar_of
from sfllm_gateway.openai.tools import Calls, calls_lark, mark, parameters_of
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
    special = model.text.detokenizers.special
    if form is None and (calls is None or not calls.required):
        return ""
    rules = "" if calls is None else await _call_rules(calls, call_format, model)
    if form is None or (calls is not None and calls.required):
        return composed(with_thinking("calls", rules, thinking, special))
    grammar = await grammar_of(form, model)
    if calls is None and not thinking.possible:
        return grammar
    start = "@answer" if calls is None else "(@answer | calls)"
    return composed(with_thinking(start, rules, thinking, special), answer=grammar)


async def _call_rules(calls: Calls, call_format: CallFormat, model: LoadedModel) -> str:
    """The rules of calls, tried out. Raises 400 naming the schema at fault."""
    for place, function in calls.functions:
        param = f"tools[{place}].function.parameters"
        await model.text.grammars.compile("json", _encode(parameters_of(function)).decode(), param)
    rules = calls_lark(calls, call_format, model.text.detokenizers.special)
    await model.text.grammars.compile("grammar", f"start: calls\n{rules}", "tools")
    return rules


def composed(lark: str, **named: str) -> str:
    """A Lark grammar that calls compiled ones by their names, in llguidance's form."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    for name, grammar in named.items():
        if grammar.lstrip().startswith("{"):
            (part,) = msgspec.json.decode(grammar)["grammars"]
        else:
            part = {"lark_grammar": grammar}
        grammars.append({**part, "name": name})
    return _encode({"grammars": grammars}).decode()


def with_thinking(start: str, rules: str, thinking: Thinking, special: Mapping[str, int]) -> str:
    """A Lark grammar of what `start` says after thinking, which is free, and `rules`."""
    if not thinking.possible:
        return f"start: {start}\n{rules}"
    if CLOSER in special:
        thoughts = f"thinking: thoughts {mark(CLOSER, special)}\nthoughts: /[\\s\\S]*/\n"
    else:
        closer = CLOSER.replace("/", "\\/")
        thoughts = f"thinking[lazy]: /[\\s\\S]*{closer}/\n"
    before = "thinking gap?" if thinking.inside else f"({mark(OPENER, special)} thinking gap?)?"
    return f"start: {before} {start}\n{thoughts}gap: /[ \\n]{{1,4}}/\n{rules}"
