"""Every way to ask for a form of the answer, and how wrong ones are refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_scheduler import FakeScheduler, byte_tokenizer
from gateway_process import GatewayProcess
from http_client import error, post
from llguidance import LLMatcher, LLTokenizer

from sfllm.messages import Submit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TOKENIZER = LLTokenizer(byte_tokenizer().to_str(), eos_token=[257])


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


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
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"a": 5}', "{}"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"a":5}', '{"a": 5}'),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "_"}}, '{"a":_5}', '{"a": 5}'),
        ({"structured_outputs": {"regex": "[a-c]+"}}, "abc", "abd"),
        ({"structured_outputs": {"regex": "^a|b$"}}, "b", "c"),
        ({"structured_outputs": {"grammar": 'start: <|im_end|> "x" | "y"'}}, "y", "x"),
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
        ({"response_format": {"type": "text", "json_schema": {"name": "n"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": schema_format({"type": "nonsense"})}, WHERE),
        ({"response_format": schema_format({"not": {"type": "string"}})}, WHERE),
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, WHERE),
        ({"response_format": schema_format({"not": {}, "x-guidance": {"lenient": True}})}, WHERE),
        ({"response_format": schema_format({"allOf": [{"$ref": "#"}]})}, WHERE),
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
        ({"structured_outputs": {"grammar": "start: <missing>"}}, "structured_outputs.grammar"),
        (
            {"structured_outputs": {"regex": "x", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "structured_outputs.whitespace_pattern",
        ),
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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"regex": "x"}, "regex"),
    ],
)
def test_a_form_that_is_known_and_not_built_is_501(
    gateway: GatewayProcess, fields: dict[str, Any], param: str
) -> None:
    assert error(post(gateway, COMPLETIONS, {"prompt": "x", **fields}), 501)["param"] == param


def test_requests_go_on_while_a_schema_is_tried_that_never_ends(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    endless = {"prompt": "x", "guided_json": {"type": "integer", "multipleOf": 9_999_991}}
    with ThreadPoolExecutor() as threads:
        refused = threads.submit(post, gateway, COMPLETIONS, endless)
        others = 0
        while not refused.done():
            assert grammar_sent(gateway, scheduler, COMPLETIONS, {"prompt": "say:x"}) == ""
            assert grammar_sent(gateway, scheduler, COMPLETIONS, {"prompt": "say:x", "guided_regex": "y"})
            others += 1
    assert others > 1
    assert "takes longer" in error(refused.result(), 400)["message"]
