"""Grammars are tried out in processes of their own: what they accept, and what they survive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from fake_scheduler import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway import grammars
from sfllm_gateway.grammar_jobs import GrammarJob, GrammarResult, Kind
from sfllm_gateway.grammar_process import try_out
from sfllm_gateway.grammars import JSON_SPACE, MAX_TEXT_BYTES, GrammarPool, ModelGrammars

TOKENIZER = LLTokenizer(byte_tokenizer().to_str(), eos_token=[257])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ENDLESS = {"type": "integer", "multipleOf": 9_999_991}


@pytest.fixture
async def pool() -> AsyncIterator[GrammarPool]:
    made = GrammarPool()
    yield made
    await made.close()


@pytest.fixture
def model(pool: GrammarPool) -> ModelGrammars:
    return ModelGrammars(pool, byte_tokenizer())


def processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "sfllm_gateway.grammar_process" in child.cmdline()]


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    taken = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and matcher.is_accepting()


def compiled(kind: Kind, text: str) -> str:
    result = try_out(GrammarJob(kind, text, JSON_SPACE))
    assert not result.error, result.error
    return result.grammar


def of_schema(schema: Any) -> str:
    return compiled("json", json.dumps(schema))


def chain(length: int) -> dict[str, Any]:
    """A schema that is as deep as this, though nothing in its text is."""
    links = {
        f"a{number}": {"type": "object", "properties": {"k": {"$ref": f"#/$defs/a{number + 1}"}}}
        for number in range(length)
    }
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{length}": {"type": "object"}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"enum": ["a", 1, None]}, ['"a"', "1", "null"], ['"b"', "2"]),
        ({"const": {"x": [1]}}, ['{"x":[1]}'], ['{"x":[2]}']),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ['"a"', "1"], ["null", "1.5"]),
        ({"type": "string", "pattern": r"^\d{2}$"}, ['"12"'], ['"1"', '"123"']),
        ({"type": "string", "pattern": "b"}, ['"abc"'], ['"ac"']),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ['"é"', '"ab"'], ['""', '"abc"']),
        ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, ["-3", "11"], ["-4", "12"]),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, ["[]", "[null]"], ["[null,null]"]),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, ["[null]"], ["[null,1]"]),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"', '"x"']),
        (SCHEMA, ['{"a":1}', '{"a":1,"b":2}'], ["{}", '{"a":"1"}', '{"b":2,"a":1}']),
        ({**SCHEMA, "additionalProperties": False}, ['{"a":1}'], ['{"a":1,"b":2}']),
        (chain(20), ['{"k":{"k":{}}}'], ['{"k":1}']),
        (
            {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
            ["[]", "[[],[[]]]"],
            ["[1]", "[[1]]"],
        ),
    ],
)
def test_a_schema_allows_what_it_describes_and_nothing_else(
    schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    grammar = of_schema(schema)
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 5}]}, "oneOf"),
        ({"type": "string", "format": "zip code"}, "zip code"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "127.0.0.1"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
        ({"allOf": [{"$ref": "#"}]}, "no text follows it"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: dict[str, Any], named: str) -> None:
    result = try_out(GrammarJob("json", json.dumps(schema)))
    assert named in result.error
    assert not result.grammar


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "x" * 5000 + "(?=a)", "look-around"),
        ("regex", "a$b", "lookarounds"),
        ("regex", "[^\\x00-\\U0010ffff]", "no text follows it"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "start: <missing>", "special token"),
        ("grammar", "start: start", "no text follows it"),
        ("grammar", "root ::= (", "Expected ')'"),
        ("grammar", "some prose", "::="),
        ("grammar", "", "root"),
        ("json", "{", "EOF"),
        ("json", "[]", "object"),
        ("json", '{"const":"\\ud800"}', "escape"),
    ],
)
def test_what_is_wrong_is_said(kind: Kind, text: str, named: str) -> None:
    assert named in try_out(GrammarJob(kind, text)).error


def test_what_models_write_as_json_is_allowed_and_endless_space_is_not() -> None:
    grammar = of_schema(SCHEMA)
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}', '{ "a": 1 }'):
        assert accepts(grammar, text), text
    assert not accepts(grammar, '{"a":   1}')
    assert not accepts(grammar, '{\n\n"a": 1}')


@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_choices_are_taken_letter_for_letter(choices: list[str]) -> None:
    grammar = compiled("choice", json.dumps(choices))
    assert all(accepts(grammar, choice) for choice in choices)
    assert accepts(grammar, choices[0] + "!") == (choices[0] + "!" in choices)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_constant_is_accepted_as_it_is_written(value: Any) -> None:
    result = try_out(GrammarJob("json", json.dumps({"const": value}), JSON_SPACE))
    if result.error:  # numbers that are not exact in 64 bits
        assert "number" in result.error
    elif isinstance(value, (str, bool, type(None))):
        written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # llguidance escapes DEL
        assert accepts(result.grammar, written)


@given(st.text(max_size=40), st.sampled_from(["json", "regex", "grammar"]))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_grammar_or_a_clear_refusal(text: str, kind: Kind) -> None:
    result = try_out(GrammarJob(kind, text))
    assert bool(result.grammar) != bool(result.error)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", json.dumps(chain(1000))),
        ("grammar", "start: a0\n" + "".join(f'a{n}: "x" a{n + 1}\n' for n in range(3000)) + 'a3000: "z"'),
        ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        ("grammar", "start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(30)) + 'A30: "x"'),
        ("json", '{"type":"array","items":' * 1000 + "{}" + "}" * 1000),
        ("json", json.dumps({"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n}]} for n in range(30)]})),
        ("regex", "(" * 5000 + ")" * 5000),
        ("regex", "x" * (MAX_TEXT_BYTES + 1)),
        ("regex", "é" * (MAX_TEXT_BYTES // 2 + 1)),
    ],
)
async def test_what_is_made_to_hurt_is_refused(model: ModelGrammars, kind: Kind, text: str) -> None:
    with pytest.raises(ServiceError) as refused:
        await model.compile(kind, text, "field")
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "field")
    assert len(refused.value.message) < 300
    assert accepts(await model.compile("regex", "ab?", "field"), "a")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a|aa)*" * 50 + "b{1,1000}"),
        ("regex", "((a{1,100}){1,100}){1,100}"),
        ("regex", "(a|b)*a(a|b){20}"),
        ("json", json.dumps({"enum": [f"v{number}" for number in range(6000)]})),
        ("json", json.dumps({"type": "array", "items": {}, "minItems": 10**6})),
        ("grammar", 'start: "a" start | start start | "b"'),
    ],
)
async def test_what_only_looks_expensive_is_taken(model: ModelGrammars, kind: Kind, text: str) -> None:
    assert await model.compile(kind, text, "field")


async def test_what_does_not_end_is_killed_and_the_next_is_served(
    model: ModelGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.2)
    with pytest.raises(ServiceError, match="takes longer") as refused:
        await model.compile("json", json.dumps(ENDLESS), "field")
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert not processes()
    monkeypatch.undo()
    assert await model.compile("regex", "a", "field")


async def test_a_grammar_is_tried_once_however_many_ask(
    pool: GrammarPool, model: ModelGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "PROCESSES", 1)
    found = await asyncio.gather(*(model.compile("regex", "abc", "field") for _ in range(20)))
    assert len(set(found)) == 1
    await pool.close()
    assert await model.compile("regex", "abc", "field") == found[0]
    assert not processes()


async def test_what_is_kept_is_bounded(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "KEPT_BYTES", 10_000)
    for number in range(30):
        assert (await pool.compile(GrammarJob("regex", f"a{{{number}}}"))).grammar
    assert sum(grammars._size(*item) for item in pool._kept.items()) == pool._kept_bytes <= 10_000
    assert GrammarJob("regex", "a{29}") in pool._kept
    assert GrammarJob("regex", "a{0}") not in pool._kept


async def test_a_grammar_may_name_special_tokens_and_token_ids_of_the_model(model: ModelGrammars) -> None:
    assert await model.compile("grammar", 'start: <|im_end|> <[97]> "x"', "field")
    for wrong in ("start: <|im_sep|>", "start: <[1000]>"):
        with pytest.raises(ServiceError):
            await model.compile("grammar", wrong, "field")


async def test_closing_leaves_no_process(pool: GrammarPool) -> None:
    assert await pool.compile(GrammarJob("regex", "a")) == GrammarResult(compiled("regex", "a"))
    assert processes()
    await pool.close()
    assert not processes()
