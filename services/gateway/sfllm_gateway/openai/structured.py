"""Structured output: every way to say what form an answer must have, as one grammar for the worker.

llguidance knows JSON schemas, regular expressions and Lark grammars, and refuses what it could not enforce,
so that nothing of a schema is ever ignored in silence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm_gateway.grammar_jobs import Kind
from sfllm_gateway.grammars import JSON_SPACE
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.fields import SamplingFields, TextFields
from sfllm_gateway.openai.forms import ResponseFormat, StructuredOutputs

MAX_CHOICES_OF_TEXT = 1024

ANY_OBJECT = {"type": "object"}

Given = dict[str, Any] | list[str] | str | None

_encode = msgspec.json.Encoder().encode


class Form(NamedTuple):
    """A form that was asked for: its kind, its text, and the field that asked.

    `whitespace` is what JSON may have between its parts, as a regular expression.
    """

    kind: Kind
    text: str
    param: str
    whitespace: str = JSON_SPACE


def form_of(fields: TextFields) -> Form | None:
    """The form of an answer, None for free text. Raises 400 or 501 for a wrong one or more than one."""
    forms = [
        *_of_response_format(fields.response_format),
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


async def grammar_of(form: Form | None, model: LoadedModel) -> str:
    """The grammar of a form, "" for none. Raises 400 naming the field for one that cannot be followed."""
    return "" if form is None else await model.text.grammars.compile(*form)


def _of_response_format(wanted: ResponseFormat | None) -> list[Form]:
    if wanted is None:
        return []
    if wanted.type not in {"text", "json_object", "json_schema"}:
        raise _unsupported(
            "response_format.type", f"text, json_object or json_schema is supported, not {quote(wanted.type)}"
        )
    for name, owner in (("json_schema", "json_schema"), ("schema", "json_object")):
        if getattr(wanted, name) is not None and wanted.type != owner:
            raise bad_value(f"response_format.{name}", f"only for the type {owner}")
    if wanted.type == "text":
        return []
    if wanted.type == "json_object":
        if wanted.schema is not None:
            return _given("json", wanted.schema, "response_format.schema")
        return _given("json", ANY_OBJECT, "response_format")
    if wanted.json_schema is None:
        raise bad_value("response_format.json_schema", "needed for the type json_schema")
    if wanted.json_schema.schema is None:
        raise bad_value("response_format.json_schema.schema", "needed: it is what the answer follows")
    return _given("json", wanted.json_schema.schema, "response_format.json_schema.schema")


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[Form]:
    if wanted is None:
        return []
    path = "structured_outputs"
    if wanted.disable_additional_properties:
        raise _unsupported(f"{path}.disable_additional_properties", "say so in the schema")
    if wanted.structural_tag is not None:
        raise _unsupported(f"{path}.structural_tag", "not supported; a grammar can say the same")
    forms = [
        *_given("json", wanted.json, f"{path}.json"),
        *_given("regex", wanted.regex, f"{path}.regex"),
        *_given("choice", wanted.choice, f"{path}.choice"),
        *_given("grammar", wanted.grammar, f"{path}.grammar"),
        *_given("json", ANY_OBJECT if wanted.json_object else None, f"{path}.json_object"),
    ]
    if not forms:
        raise bad_value(path, "give one of json, regex, choice, grammar or json_object")
    return [_with_whitespace(form, wanted, path) for form in forms]


def _with_whitespace(form: Form, wanted: StructuredOutputs, path: str) -> Form:
    """The form with the white space that was asked for, which only JSON has."""
    pattern, none = wanted.whitespace_pattern, bool(wanted.disable_any_whitespace)
    if pattern is None and not none:
        return form
    name = "disable_any_whitespace" if none else "whitespace_pattern"
    if form.kind != "json":
        raise bad_value(f"{path}.{name}", "only for json and json_object")
    if pattern is not None and none:
        raise bad_value(f"{path}.whitespace_pattern", "contradicts disable_any_whitespace")
    return form._replace(whitespace="" if none else pattern or "")


def _given(kind: Kind, value: Given, param: str) -> list[Form]:
    """The form that one field gives, if it does. Raises 400 for choices that are none."""
    if value is None:
        return []
    if kind == "choice":
        if not value or not all(value):
            raise bad_value(param, "needs choices, none of them empty")
        if len(value) > MAX_CHOICES_OF_TEXT:
            raise bad_value(param, f"at most {MAX_CHOICES_OF_TEXT} choices")
    return [Form(kind, value if isinstance(value, str) else _encode(value).decode(), param)]


def _unsupported(param: str, message: str) -> ServiceError:
    return ServiceError(ErrorCode.NOT_SUPPORTED, f"{param}: {message}", param=param)


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
