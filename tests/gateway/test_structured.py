"""Every way to ask for a form of the answer, and how wrong ones are refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fake_scheduler import FakeScheduler, byte_tokenizer
from gateway_process import GatewayProcess
from http_client import error, post
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from sfllm.errors import ServiceError
from sfllm.messages import Submit
from sfllm_gateway.openai.structured import Form, compile_form

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TOKENIZER = LLTokenizer(byte_tokenizer().to_str(), eos_token=[257])


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


def compiled(kind: str, text: str) -> str:
    return compile_form(Form(kind, text, "field"))


def refusal(kind: str, text: str) -> ServiceError | None:
    try:
        compiled(kind, text)
    except ServiceError as error:
        return error
    return None


def grammar_sent(gateway: GatewayProcess, scheduler: FakeScheduler, path: str, body: dict[str, Any]) -> str:
    scheduler.seen.clear()
    answer = post(gateway, path, body)
    assert answer.status_code == 200, answer.text
    (submit,) = [message for message in scheduler.seen if isinstance(message, Submit)]
    return submit.sampling.grammar


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1]"),
        ({"response_format": FORMAT}, '{"a": 5}', '{"a": "5"}'),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a":5}', "{}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":5}', "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "null"),
        ({"structured_outputs": {"regex": "[a-c]+"}}, "abc", "abd"),
        ({"structured_outputs": {"choice": ['say "no"', "b\\d\n", "é"]}}, 'say "no"', "say"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"?'}}, "xy", "y"),
        ({"structured_outputs": {"grammar": 'root ::= "x" | [0-9]+'}}, "42", "xx"),
        ({"guided_json": SCHEMA}, '{"a": 1}', "{}"),
        ({"guided_regex": "x{3}"}, "xxx", "xx"),
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"guided_grammar": 'start: "z"'}, "z", ""),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_form_becomes_a_grammar_for_the_worker(
    gateway: GatewayProcess,
    scheduler: FakeScheduler,
    path: str,
    fields: dict[str, Any],
    right: str,
    wrong: str,
) -> None:
    start = {"messages": [{"role": "user", "content": "say:x"}]} if path == CHAT else {"prompt": "say:x"}
    grammar = grammar_sent(gateway, scheduler, path, {**start, **fields})
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)


@pytest.mark.parametrize(
    ("params", "right", "wrong"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, '{"a": 1}', "{}"),
        ({"regex": "a|b"}, "a", "c"),
        ({"ebnf": 'root ::= "k"'}, "k", "l"),
    ],
)
def test_the_native_names_mean_the_same(
    gateway: GatewayProcess, scheduler: FakeScheduler, params: dict[str, Any], right: str, wrong: str
) -> None:
    grammar = grammar_sent(gateway, scheduler, "/generate", {"text": "say:x", "sampling_params": params})
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None}],
)
def test_free_text_has_no_grammar(
    gateway: GatewayProcess, scheduler: FakeScheduler, fields: dict[str, Any]
) -> None:
    assert grammar_sent(gateway, scheduler, COMPLETIONS, {"prompt": "say:x", **fields}) == ""


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


WHERE = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, WHERE),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": schema_format({"type": "nonsense"})}, WHERE),
        ({"response_format": schema_format({"not": {"type": "string"}})}, WHERE),
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, WHERE),
        ({"response_format": schema_format({"not": {}, "x-guidance": {"lenient": True}})}, WHERE),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: {"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "x"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"yaml": "x"}}, "structured_outputs"),
        ({"response_format": FORMAT, "guided_regex": "x"}, "guided_regex"),
        ({"response_format": FORMAT, "bad_words": ["x"]}, "bad_words"),
        ({"response_format": FORMAT, "allowed_token_ids": [3]}, "allowed_token_ids"),
    ],
)
def test_a_wrong_form_is_refused_before_any_token(
    gateway: GatewayProcess, scheduler: FakeScheduler, fields: dict[str, Any], param: str
) -> None:
    found = error(post(gateway, COMPLETIONS, {"prompt": "say:x", **fields}), 400)
    assert found["param"] == param
    assert len(found["message"]) < 500
    assert not any(isinstance(message, Submit) for message in scheduler.seen)


def test_a_form_that_is_known_and_not_built_is_501(gateway: GatewayProcess) -> None:
    wanted = {"type": "structural_tag", "structures": []}
    found = error(post(gateway, COMPLETIONS, {"prompt": "x", "response_format": wanted}), 501)
    assert found["param"] == "response_format.type"


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_choices_are_taken_letter_for_letter(choices: list[str]) -> None:
    choices = [choice for choice in choices if choice.isprintable()] or ["x"]
    grammar = compiled("choice", json.dumps(choices))
    for choice in choices:
        assert accepts(grammar, choice)
    assert accepts(grammar, choices[0] + "!") == (choices[0] + "!" in choices)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["json", "regex", "grammar"]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_given_as_a_form_is_a_grammar_or_a_clear_refusal(value: Any, kind: str) -> None:
    refused = refusal(kind, value if isinstance(value, str) else json.dumps(value))
    assert refused is None or (refused.http.status, refused.param) == (400, "field")


def test_a_form_of_endless_text_is_refused() -> None:
    assert refusal("json", json.dumps({"enum": ["x" * 70_000]})) is not None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a|aa)*" * 50 + "b{1,1000}"),
        ("regex", "((a{1,100}){1,100}){1,100}"),
        ("regex", "(" * 5000 + ")" * 5000),
        ("json", json.dumps({"enum": [f"v{number}" for number in range(6000)]})),
        ("json", '{"type":"array","items":' * 1000 + "{}" + "}" * 1000),
        ("json", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 8}}})),
        ("json", json.dumps({"$ref": "http://127.0.0.1:1/schema"})),
        ("grammar", "start: start start | start"),
        ("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    ],
)
def test_forms_that_are_made_to_hurt_take_bounded_time(kind: str, text: str) -> None:
    started = time.process_time()
    refused = refusal(kind, text)
    assert refused is None or refused.http.status == 400
    assert time.process_time() - started < 20


def test_what_models_write_as_json_is_allowed_and_endless_space_is_not() -> None:
    grammar = compiled("json", json.dumps(SCHEMA))
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}', '{ "a": 1 }'):
        assert accepts(grammar, text), text
    assert not accepts(grammar, '{"a":   1}')
    assert not accepts(grammar, '{\n\n"a": 1}')
