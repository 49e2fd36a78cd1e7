"""The grammar of a chat's answer: calls that must be made, the form of its content, thinking before both."""

from __future__ import annotations

import json
from typing import NamedTuple

import msgspec
from llguidance import regex_to_lark

from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.structured import Form, grammar_of
from sfllm_gateway.openai.tools import Calls, calls_lark, parameters_of
from sfllm_gateway.parsing.formats import CallFormat
from sfllm_gateway.parsing.think import CLOSER, OPENER


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
    if calls is not None and calls.required:
        for place, function in calls.functions:
            param = f"tools[{place}].function.parameters"
            await model.text.grammars.compile(
                "json", msgspec.json.encode(parameters_of(function)).decode(), param
            )
        lark = _after_thinking("calls", calls_lark(calls, call_format, model.text.tokenizer), thinking)
        return await model.text.grammars.compile("grammar", lark, "tools")
    if form is None:
        return ""
    grammar = await grammar_of(form, model)
    if calls is None and not thinking.possible:
        return grammar
    rules = _form_rules(form)
    if rules is None:  # a grammar of the client's own says all of the answer
        return grammar
    start = "answer"
    if calls is not None:
        start, rules = "(answer | calls)", rules + calls_lark(calls, call_format, model.text.tokenizer)
    return await model.text.grammars.compile("grammar", _after_thinking(start, rules, thinking), form.param)


def _form_rules(form: Form) -> str | None:
    """The rule `answer` for a form that can be a part of a grammar."""
    match form.kind:
        case "json":
            schema = {**msgspec.json.decode(form.text), "x-guidance": {"whitespace_pattern": form.whitespace}}
            return f"answer: %json {msgspec.json.encode(schema).decode()}\n"
        case "choice":
            return f"answer: {' | '.join(map(json.dumps, msgspec.json.decode(form.text)))}\n"
        case "regex":
            return f"answer: /{regex_to_lark(form.text, use_ascii='')}/\n"
        case _:
            return None


def _after_thinking(start: str, rules: str, thinking: Thinking) -> str:
    if not thinking.possible:
        return f"start: {start}\n{rules}"
    closer = CLOSER.replace("/", "\\/")
    marks = f"thinking[lazy]: /[\\s\\S]*{closer}/\ngap: /[ \\n]{{1,4}}/\n"
    before = "thinking gap?" if thinking.inside else f'("{OPENER}" thinking gap?)?'
    return f"start: {before} {start}\n{marks}{rules}"
