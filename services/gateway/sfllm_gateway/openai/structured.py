"""Structured output: every way to say what form an answer must have, as one grammar for the worker.

llguidance knows JSON schemas, regular expressions and Lark grammars, and refuses what it could not enforce,
so that nothing of a schema is ever ignored in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from sfllm.errors import ECHO_LIMIT_CHARACTERS, ErrorCode, ServiceError, quote
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.fields import SamplingFields, TextFields
from sfllm_gateway.openai.forms import StructuredOutputs
from sfllm_gateway.tokenize import TextPool

MAX_GRAMMAR_CHARACTERS = 65_536
MAX_CHOICES_OF_TEXT = 1024

JSON_SPACE = r"( |\n {0,16})"
"""Between the parts of JSON at most a space, or a line break with its indentation: a small model that may
write as many spaces as it likes writes nothing else."""

COMPILED_KEPT = 256


class Form(NamedTuple):
    """A form that was asked for: its kind, its text, and the field that asked."""

    kind: str
    text: str
    param: str


def form_of(fields: TextFields) -> Form | None:
    """The form of an answer, None for free text. Raises 400 or 501 for a wrong one or more than one."""
    forms = [
        *_of_response_format(fields),
        *_of_structured_outputs(fields.structured_outputs),
        *_given("json", fields.guided_json, "guided_json"),
        *_given("regex", fields.guided_regex, "guided_regex"),
        *_given("choice", fields.guided_choice, "guided_choice"),
        *_given("grammar", fields.guided_grammar, "guided_grammar"),
    ]
    return check_form(forms, fields)


def check_form(forms: list[Form], fields: SamplingFields, path: str = "") -> Form | None:
    """The only form of a request, if any. Raises 400 for several, or for fields that could leave no token.

    `path` is where the sampling fields are inside the body.
    """
    if not forms:
        return None
    if len(forms) > 1:
        raise bad_value(forms[1].param, f"an answer has one form, and {forms[0].param} gives it already")
    for name in ("allowed_token_ids", "bad_words"):
        if getattr(fields, name):
            raise bad_value(f"{path}{name}", f"not available together with {forms[0].param}")
    return forms[0]


async def grammar_of(form: Form | None, pool: TextPool) -> str:
    """The grammar of a form, "" for none. Raises 400 naming the field for one that cannot be followed."""
    return "" if form is None else await pool.run(lambda: compile_form(form))


def compile_form(form: Form) -> str:
    """As `grammar_of`, in this thread."""
    if len(form.text) > MAX_GRAMMAR_CHARACTERS:
        raise bad_value(form.param, f"more than {MAX_GRAMMAR_CHARACTERS} characters")
    grammar, problem = _compiled(form.kind, form.text)
    if problem:
        raise bad_value(form.param, problem[:ECHO_LIMIT_CHARACTERS])
    return grammar


def json_lark(schema: dict[str, Any]) -> str:
    """A value of that schema, as a part of a Lark grammar."""
    return f"%json {json.dumps(_with_options(schema))}"


@lru_cache(COMPILED_KEPT)
def _compiled(kind: str, text: str) -> tuple[str, str]:
    """The grammar, or why there is none. Bounded by what llguidance allows itself to compile."""
    try:
        grammar = _WRITERS[kind](text)
    except (ValueError, RecursionError, GbnfToLarkError) as error:
        return "", str(error) or type(error).__name__
    except Exception as error:  # noqa: BLE001 - its parser of GBNF raises bare ones
        return "", str(error)
    return grammar, LLMatcher.validate_grammar(grammar).strip()


def _of_json(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    return LLMatcher.grammar_from_json_schema(_with_options(schema))


def _with_options(schema: dict[str, Any]) -> dict[str, Any]:
    # A schema's own options could switch off that what is not enforced is refused.
    return {**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE}}


def _of_choice(text: str) -> str:
    # JSON's strings are Lark's.
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text))))


def _of_grammar(text: str) -> str:
    return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if "::=" in text else text)


_WRITERS: dict[str, Callable[[str], str]] = {
    "json": _of_json,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choice,
    "grammar": _of_grammar,
}


def _of_response_format(fields: TextFields) -> list[Form]:
    wanted = fields.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [Form("json", '{"type":"object"}', "response_format")]
    if wanted.type != "json_schema":
        raise ServiceError(
            ErrorCode.NOT_SUPPORTED,
            f"response_format.type: text, json_object or json_schema is supported, not {quote(wanted.type)}",
            param="response_format.type",
        )
    if wanted.json_schema is None:
        raise bad_value("response_format.json_schema", "needed for the type json_schema")
    if wanted.json_schema.schema is None:
        raise bad_value("response_format.json_schema.schema", "needed: it is what the answer follows")
    return _given("json", wanted.json_schema.schema, "response_format.json_schema.schema")


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[Form]:
    if wanted is None:
        return []
    forms = [
        form
        for kind in ("json", "regex", "choice", "grammar")
        for form in _given(kind, getattr(wanted, kind), f"structured_outputs.{kind}")
    ]
    if wanted.json_object:
        forms.append(Form("json", '{"type":"object"}', "structured_outputs.json_object"))
    if not forms:
        raise bad_value("structured_outputs", "give one of json, regex, choice, grammar or json_object")
    return forms


def _given(kind: str, value: dict[str, Any] | list[str] | str | None, param: str) -> list[Form]:
    """The form that one field gives, if it does. Raises 400 for choices that are none."""
    if value is None:
        return []
    if kind == "choice":
        if not value or not all(value):
            raise bad_value(param, "needs choices, none of them empty")
        if len(value) > MAX_CHOICES_OF_TEXT:
            raise bad_value(param, f"at most {MAX_CHOICES_OF_TEXT} choices")
    return [Form(kind, value if isinstance(value, str) else json.dumps(value), param)]


def native_form(
    fields: SamplingFields, json_schema: str | None, regex: str | None, ebnf: str | None
) -> Form | None:
    """The form that the native API's fields give, named as SGLang names them."""
    path = "sampling_params."
    forms = [
        *_given("json", json_schema, f"{path}json_schema"),
        *_given("regex", regex, f"{path}regex"),
        *_given("grammar", ebnf, f"{path}ebnf"),
    ]
    return check_form(forms, fields, path)
