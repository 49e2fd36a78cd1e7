"""What a request for a response stands for: messages, tools, and errors under the client's names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.openai import chat
from sfllm_gateway.openai.unbuilt import UNBUILT
from sfllm_gateway.responses_api import fields
from sfllm_gateway.responses_api.translate import Translation, translate

ASKED: dict[str, Any] = {"role": "user", "content": "Weather in Rome and Oslo?"}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
OTHER_CALL: dict[str, Any] = {**CALL, "call_id": "c2"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c1", "output": "sun"}


def translated(**body: Any) -> Translation:
    body.setdefault("input", "x")
    return translate(fields.decode(msgspec.json.encode(body)).request)


def messages(**body: Any) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(message) for message in translated(**body).chat.messages]


def refusal(**body: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        translated(**body)
    return caught.value


def test_a_text_is_what_the_user_says_after_the_instructions() -> None:
    assert messages(input="hi", instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_messages_keep_their_roles_and_parts() -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "brief"}]},
        {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("a", "b")]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "id": "m", "status": "x"},
    ]
    assert messages(input=items) == [
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "no"},
    ]


def test_reasoning_text_and_calls_in_a_row_are_one_message_of_the_assistant() -> None:
    items = [
        ASKED,
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        *(CALL, OTHER_CALL, RESULT),
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "snow"}]},
    ]
    function = {"name": "weather", "arguments": "{}"}
    assert messages(input=items) == [
        ASKED,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "snow", "tool_call_id": "c2"},
    ]


def test_two_messages_of_the_assistant_stay_two() -> None:
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert messages(input=[ASKED, *said, CALL, *said]) == [
        ASKED,
        said[0],
        {**said[1], "tool_calls": [{"id": "c1", "type": "function", "function": _function(CALL)}]},
        *said,
    ]


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}


def test_a_summary_stands_for_reasoning_without_text_and_empty_reasoning_for_nothing() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    empty = {"type": "reasoning", "summary": [], "encrypted_content": None}
    said = {"role": "assistant", "content": "a"}
    assert messages(input=[ASKED, summary, said]) == [ASKED, {**said, "reasoning_content": "short"}]
    assert messages(input=[ASKED, empty, said]) == [ASKED, said]


@pytest.mark.parametrize(
    ("item", "param", "code"),
    [
        ({}, "input[1].role", ErrorCode.INVALID_REQUEST),
        ({"role": "user"}, "input[1].content", ErrorCode.INVALID_REQUEST),
        ({"role": "robot", "content": "x"}, "input[1].role", ErrorCode.INVALID_REQUEST),
        (
            {**ASKED, "content": [{"type": "input_text"}]},
            "input[1].content[0].text",
            ErrorCode.INVALID_REQUEST,
        ),
        (
            {**ASKED, "content": [{"type": "input_image"}]},
            "input[1].content[0].type",
            ErrorCode.NOT_SUPPORTED,
        ),
        ({**CALL, "name": None}, "input[1].name", ErrorCode.INVALID_REQUEST),
        (RESULT, "input[1].call_id", ErrorCode.INVALID_REQUEST),
        (
            {"type": "reasoning", "encrypted_content": "?"},
            "input[1].encrypted_content",
            ErrorCode.INVALID_REQUEST,
        ),
        ({"type": "item_reference", "id": "msg_1"}, "input[1].type", ErrorCode.NOT_SUPPORTED),
        ({"type": "web_search_call"}, "input[1].type", ErrorCode.NOT_SUPPORTED),
    ],
)
def test_an_item_that_cannot_be_read_is_refused_by_its_place(
    item: dict[str, Any], param: str, code: ErrorCode
) -> None:
    error = refusal(input=[ASKED, item])
    assert (error.param, error.code) == (param, code)


def test_a_result_needs_an_output() -> None:
    assert refusal(input=[ASKED, CALL, {**RESULT, "output": None}]).param == "input[2].output"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", ErrorCode.NOT_SUPPORTED),
        ({"tools": [{"type": "function"}]}, "tools[0].name", ErrorCode.INVALID_REQUEST),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", ErrorCode.NOT_SUPPORTED),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", ErrorCode.INVALID_REQUEST),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools", ErrorCode.INVALID_REQUEST),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", ErrorCode.INVALID_REQUEST),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format.schema",
            ErrorCode.INVALID_REQUEST,
        ),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", ErrorCode.INVALID_REQUEST),
        ({"text": {"verbosity": "high"}}, "text.verbosity", ErrorCode.NOT_SUPPORTED),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", ErrorCode.NOT_SUPPORTED),
        ({"stream_options": {}}, "stream_options", ErrorCode.INVALID_REQUEST),
        ({"metadata": {"k": "v" * 513}}, "metadata", ErrorCode.INVALID_REQUEST),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", ErrorCode.INVALID_REQUEST),
        ({"include": ["everything"]}, "include[0]", ErrorCode.INVALID_REQUEST),
        ({"top_logprobs": 21}, "top_logprobs", ErrorCode.INVALID_REQUEST),
        ({"max_output_tokens": 0}, "max_output_tokens", ErrorCode.INVALID_REQUEST),
        ({"store": True}, "store", ErrorCode.NOT_SUPPORTED),
        ({"background": True}, "background", ErrorCode.NOT_SUPPORTED),
        ({"previous_response_id": "resp_1"}, "previous_response_id", ErrorCode.NOT_SUPPORTED),
        ({"conversation": {"id": "conv_1"}}, "conversation", ErrorCode.NOT_SUPPORTED),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", ErrorCode.NOT_SUPPORTED),
        ({"truncation": "auto"}, "truncation", ErrorCode.NOT_SUPPORTED),
        ({"context_management": [{"type": "compaction"}]}, "context_management", ErrorCode.NOT_SUPPORTED),
    ],
)
def test_a_field_that_asks_for_what_is_not_served_is_refused_by_name(
    body: dict[str, Any], param: str, code: ErrorCode
) -> None:
    error = refusal(**body)
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(f"{param}: ")


def test_what_stores_nothing_is_taken() -> None:
    nothing = {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled"}
    assert translated(**nothing).chat.messages[0].content == "x"


def test_fields_that_are_not_known_are_told_of_and_inner_ones_too() -> None:
    body = {"input": "x", "zz": 1, "text": {"colour": "red"}, "reasoning": None, "service_tier": "auto"}
    assert fields.decode(msgspec.json.encode(body)).ignored == ["zz", "text.colour"]


def test_logprobs_are_asked_for_by_either_field() -> None:
    included = translated(include=["message.output_text.logprobs"]).chat
    assert (included.logprobs, included.top_logprobs) == (True, None)
    counted = translated(top_logprobs=3).chat
    assert (counted.logprobs, counted.top_logprobs) == (True, 3)
    assert translated(include=["reasoning.encrypted_content"]).chat.logprobs is None


def test_tools_that_may_not_be_called_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tools", "tool_choice"):
        monkeypatch.delitem(UNBUILT, name, raising=False)
    tools = [{"type": "function", "name": name, "parameters": {}, "strict": True} for name in ("a", "b")]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "b"}]}
    found = translated(tools=tools, tool_choice=allowed)
    function = {"name": "b", "parameters": {}, "strict": True}
    assert msgspec.to_builtins(found.chat.tools) == [{"type": "function", "function": function}]
    where = "tools[0].function.parameters"
    error = found.renamed(ServiceError(ErrorCode.INVALID_REQUEST, f"{where}: bad", param=where))
    assert (error.param, error.message) == ("tools[1].parameters", "tools[1].parameters: bad")
    allowed["tools"] = [{"type": "function", "name": "c"}]
    assert refusal(tools=tools, tool_choice=allowed).param == "tool_choice.tools[0].name"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions.content"),
        ("messages[2].content[1].text", "input[1].content[1].text"),
        ("response_format", "text.format"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("reasoning_effort", "reasoning.effort"),
        ("max_completion_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
    ],
)
def test_errors_of_the_chat_name_the_field_that_the_client_sent(theirs: str, ours: str) -> None:
    found = translated(instructions="x", input=[ASKED, ASKED])
    renamed = found.renamed(ServiceError(ErrorCode.INVALID_REQUEST, f"{theirs}: is bad", param=theirs))
    assert (renamed.param, renamed.message) == (ours, f"{ours}: is bad")


def test_the_chat_passes_its_own_checks() -> None:
    chat.check(translated(input=[ASKED, CALL, RESULT], stream=True, max_output_tokens=5).chat)


def test_tools_nested_too_deeply_are_refused() -> None:
    body = b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": %s%s}}]}' % (
        b"[" * 5000,
        b"]" * 5000,
    )
    with pytest.raises(ServiceError) as caught:
        fields.decode(body)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
