"""Reasoning, content and tool calls are told apart, whatever the pieces in which text arrives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfllm_gateway.parsing.deltas import Delta, OutputParser, PlainParser
from sfllm_gateway.parsing.formats import FORMATS, HERMES, LLAMA3, MISTRAL, CallFormat, format_of
from sfllm_gateway.parsing.json_object import ObjectReader
from sfllm_gateway.parsing.think import ThinkParser
from sfllm_gateway.parsing.tool_calls import MAX_CALLS, ToolCallParser

NAMES = ("get_weather", "add", "get")
WEATHER = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2.5e0, null]}}'
HERMES_CALL = f"<tool_call>\n{WEATHER}\n</tool_call>"
WEATHER_ARGUMENTS = '{"city": "Oslo", "days": [1, 2.5e0, null]}'


class Call(NamedTuple):
    id: str
    name: str
    arguments: str


class Read(NamedTuple):
    content: str
    reasoning: str
    calls: list[Call]
    reason: str


def read(parser: OutputParser, pieces: Sequence[str], reason: str = "stop") -> Read:
    deltas: list[Delta] = [parser.feed(piece) for piece in pieces]
    last, reason = parser.finish(reason)
    calls: list[Call] = []
    for delta in [*deltas, last]:
        for part in delta.calls:
            if part.id:
                assert part.number == len(calls)
                calls.append(Call(part.id, part.name, part.arguments))
            else:
                assert part.number == len(calls) - 1
                assert not part.name
                calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + part.arguments)
    content = "".join(delta.content for delta in [*deltas, last])
    return Read(content, "".join(delta.reasoning for delta in [*deltas, last]), calls, reason)


def tools(form: CallFormat, as_stop: bool = False, most: int = MAX_CALLS) -> ToolCallParser:
    return ToolCallParser(form, NAMES, lambda number: f"call_{number}", as_stop, most)


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def calls_of(form: CallFormat, text: str, reason: str = "stop") -> Read:
    whole = read(tools(form), [text], reason)
    assert read(tools(form), list(text), reason) == whole, "letter by letter it must be the same"
    return whole


def one(name: str, arguments: str, number: int = 0) -> Call:
    return Call(f"call_{number}", name, arguments)


WEATHER_CALL = one("get_weather", WEATHER_ARGUMENTS)


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [WEATHER_CALL]),
        (HERMES, f"Let me see.\n\n<tool_call>{WEATHER}</tool_call>\n", "Let me see.", [WEATHER_CALL]),
        (HERMES, f"<tool_call>\n{WEATHER}", "", [WEATHER_CALL]),
        (
            HERMES,
            f"{HERMES_CALL}\n" + '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>',
            "",
            [WEATHER_CALL, one("add", '{"a": 1}', 1)],
        ),
        (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [one("add", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [one("add", '{"a": 1}')],
        ),
        (LLAMA3, '{"name": "add", "parameters": {"a": 1}}', "", [one("add", '{"a": 1}')]),
        (LLAMA3, '\n{"name": "add", "parameters": {"a": 1}}', "", [one("add", '{"a": 1}')]),
        (LLAMA3, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [one("add", '{"a": 1}')]),
        (
            LLAMA3,
            '{"name": "add", "parameters": {}}; {"name": "get", "parameters": {}}',
            "",
            [one("add", "{}"), one("get", "{}", 1)],
        ),
        (LLAMA3, '{"name": "add", "arguments": {"a": 1}}', "", [one("add", '{"a": 1}')]),
        (LLAMA3, '{"type": "function", "name": "get", "parameters": {}}', "", [one("get", "{}")]),
        (MISTRAL, f"[TOOL_CALLS][{WEATHER}]", "", [WEATHER_CALL]),
        (MISTRAL, '[TOOL_CALLS]add[CALL_ID]abcDEF123[ARGS]{"a": 1}', "", [one("add", '{"a": 1}')]),
        (
            MISTRAL,
            'Hm.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "get", "arguments": {}}]',
            "Hm.",
            [one("add", '{"a": 1}'), one("get", "{}", 1)],
        ),
        (
            MISTRAL,
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}',
            "",
            [one("get_weather", '{"city": "Oslo"}')],
        ),
        (
            MISTRAL,
            '[TOOL_CALLS]get{"a": 1}[TOOL_CALLS]add[ARGS]{}',
            "",
            [one("get", '{"a": 1}'), one("add", "{}", 1)],
        ),
    ],
)
def test_each_family_of_models_is_understood(
    form: CallFormat, text: str, content: str, calls: list[Call]
) -> None:
    assert calls_of(form, text) == Read(content, "", calls, "tool_calls")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "no call at all, a < b"),
        (HERMES, "<tool_call>\nnot JSON\n</tool_call> and more"),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>"),
        (HERMES, '<tool_call>{"name": "add"'),
        (LLAMA3, '{"answer": 42}'),
        (LLAMA3, 'It is {"name": "add", "parameters": {}}'),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\\\ud800\\"}x"}'),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'),
        (LLAMA3, '{"name": "Ann", "parameters": {}}'),
        (LLAMA3, " " * 65 + '{"name": "add", "parameters": {}}'),
        (MISTRAL, "[TOOL_CALLS"),
    ],
)
def test_what_is_no_call_stays_content_letter_for_letter(form: CallFormat, text: str) -> None:
    assert calls_of(form, text) == Read(text, "", [], "stop")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LLAMA3, "print(1)"),
        (MISTRAL, "nothing[ARGS]{}"),
        (MISTRAL, '[{"name": "add"'),
        (MISTRAL, "get" + " " * 200 + "{}"),
    ],
)
def test_an_opener_that_is_a_special_token_is_not_shown_even_where_no_call_follows(
    form: CallFormat, text: str
) -> None:
    assert calls_of(form, form.opener + text) == Read(text, "", [], "stop")


def test_json_that_is_no_call_is_passed_on_as_soon_as_that_is_known() -> None:
    assert tools(LLAMA3).feed('{"answer": ').content == '{"answer":'
    assert tools(LLAMA3).feed('{"name": "Ann", "age').content == '{"name": "Ann", "age'


@pytest.mark.parametrize("form", FORMATS.values())
def test_only_as_many_calls_as_are_wanted_are_told_of(form: CallFormat) -> None:
    one_call = f'{form.opener}{{"name": "add", "{form.arguments}": {{}}}}{form.closer}'
    found = read(
        tools(form, most=1), list(one_call * 3 + form.opener + '{"name": "add", "arguments": {"a": oops}}')
    )
    assert (found.calls, found.reason) == ([one("add", "{}")], "tool_calls")


@pytest.mark.parametrize("form", FORMATS.values())
def test_a_call_that_is_cut_off_is_said_to_be_cut_off(form: CallFormat) -> None:
    text = f'{form.opener}{{"name": "add", "{form.arguments}": {{"a": [1, 2'
    found = calls_of(form, text, "length")
    assert (found.reason, found.calls) == ("length", [one("add", '{"a": [1, 2')])
    assert calls_of(form, text).reason == "stop", "no call was completed"


def test_a_call_that_turns_bad_after_its_beginning_was_told_is_not_said_to_be_complete() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>'
    found = read(tools(HERMES), list(text))
    assert found.reason == "stop"
    assert found.calls[0].name == "add"
    assert read(tools(HERMES), [text]) == found


def test_a_field_that_comes_twice_cannot_change_what_was_told() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}, "arguments": {"b": 22222}}</tool_call>'
    assert calls_of(HERMES, text).calls == [one("add", '{"a": 1}')]
    assert calls_of(HERMES, text).reason == "stop"


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
@pytest.mark.parametrize("begun", ["", "\n", '{"na', '{"name": "ad', '{"name": "add", "argu'])
def test_a_call_that_is_cut_off_before_anything_of_it_is_known_is_left_out(
    form: CallFormat, begun: str
) -> None:
    assert calls_of(form, f"Hm.{form.opener}{begun}", "length") == Read("Hm.", "", [], "length")


def test_text_after_calls_is_content() -> None:
    found = calls_of(HERMES, f"<tool_call>{WEATHER}</tool_call>\nDone.")
    assert (found.content, found.calls, found.reason) == ("Done.", [WEATHER_CALL], "tool_calls")


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = tools(HERMES)
    parser.feed('<tool_call>{"name": "get_weather", "arguments": {"ci')
    assert "".join(part.arguments for part in parser.feed('ty": "Os').calls) == 'ty": "Os'


def test_a_call_that_the_client_named_ends_as_a_text_does() -> None:
    assert read(tools(HERMES, as_stop=True), [f"<tool_call>{WEATHER}</tool_call>"]).reason == "stop"


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"),
        *(WEATHER, '{"name": "add", "parameters": {"x": "\\u00e9"}}', "[", "]", ",", ";", " ", "\n", "get"),
        *("<", "{", '"', "word", "[TOOL", "</too", '{"name": "get", "arguments": {', " " * 63, "}", ":"),
        *(
            '"name": "get"',
            '"arguments": ',
            '"arguments": {"a": 1}',
            '"arguments": "{}"',
            "[CALL_ID]",
            "\n\n",
        ),
    ]
)


@given(st.sampled_from(list(FORMATS.values())), st.lists(PARTS, max_size=8), st.lists(st.integers(0, 400)))
@settings(max_examples=600, deadline=None)
@example(LLAMA3, [" ", "{", "word"], [1, 2])
@example(LLAMA3, ['{"name": "add", "parameters": {"x": 1}}word<|python_tag|> ', '"'], [58])
@example(MISTRAL, ["[TOOL_CALLS]", "get", "[ARGS]", "{", '"'], [13, 16])
def test_the_outcome_does_not_depend_on_the_pieces(
    form: CallFormat, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    whole = read(tools(form), [text])
    assert read(tools(form), pieces_of(text, cuts)) == whole
    for call in whole.calls:
        assert call.name in NAMES
    if whole.reason == "tool_calls":
        assert all(isinstance(json.loads(call.arguments), dict) for call in whole.calls)
    thinking = read(ThinkParser(tools(form)), [text])
    assert read(ThinkParser(tools(form)), pieces_of(text, cuts)) == thinking


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nHm, 2.\n</think>\n\nIt is 2.", False, "Hm, 2.", "It is 2."),
        ("Hm, 2.\n</think>\n\nIt is 2.", True, "Hm, 2.", "It is 2."),
        ("<think>\n\n</think>\n\nIt is 2.", False, "", "It is 2."),
        ("It is <think>2</think>.", False, "", "It is <think>2</think>."),
        ("<think>never ends", False, "never ends", ""),
        ("never ends </thin", True, "never ends </thin", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
        ("\n<think>a</think>b</think>", False, "a", "b</think>"),
        (" " * 65 + "<think>a</think>b", False, "", " " * 65 + "<think>a</think>b"),
    ],
)
def test_thinking_is_told_from_the_answer(text: str, inside: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        found = read(ThinkParser(PlainParser(), inside), pieces)
        assert (found.reasoning, found.content, found.reason) == (reasoning, content, "stop")
        hidden = read(ThinkParser(PlainParser(), inside, hides=True), pieces)
        assert (hidden.reasoning, hidden.content) == ("", content)


def test_calls_may_follow_thinking() -> None:
    text = f"<think>I should call.</think>\n<tool_call>\n{WEATHER}\n</tool_call>"
    found = read(ThinkParser(tools(HERMES)), list(text))
    assert found == Read("", "I should call.", [WEATHER_CALL], "tool_calls")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.sampled_from([None, 1]), st.booleans()
)
@settings(max_examples=300, deadline=None)
def test_every_object_is_read_and_its_fields_are_its_own(
    value: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    reader = ObjectReader()
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert all(map(reader.feed, text))
    assert reader.complete
    assert {name: json.loads(field) for name, field in reader.fields.items()} == value


@given(st.dictionaries(st.text("ab", max_size=2), json_values, max_size=3), st.data())
@settings(max_examples=400, deadline=None)
def test_what_is_no_json_is_never_taken_for_an_object(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text) - 1))
    damaged = (
        text[:place]
        + data.draw(st.sampled_from(['"', "}", "{", ",", "x", "", "0", "\\", "\n"]))
        + text[place + 1 :]
    )
    reader = ObjectReader()
    taken = ""
    for character in damaged:
        if reader.complete or not reader.feed(character):
            break
        taken += character
    if reader.complete:
        assert isinstance(json.loads(taken), dict)


def test_the_format_is_that_of_the_template() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert format_of("<|start_header_id|>") is LLAMA3
    assert format_of("[AVAILABLE_TOOLS][TOOL_CALLS]") is MISTRAL
    assert format_of("nothing") is HERMES
