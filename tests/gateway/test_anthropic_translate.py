"""What Anthropic's messages become: the chat that a model is given."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.anthropic.fields import decode_count, decode_messages
from sfllm_gateway.anthropic.translate import chat_request, renamed

QUESTION = {"role": "user", "content": "What is it?"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sky", "n": 2}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "blue"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def translate(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The fields of the chat that are set."""
    body = msgspec.json.encode({"max_tokens": 5, "messages": messages, **fields})
    chat = chat_request(decode_messages(body)[0])
    found = {name: value for name, value in msgspec.structs.asdict(chat).items() if value is not None}
    found["messages"] = [msgspec.to_builtins(message) for message in chat.messages]
    return found


def conversation(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = translate(*messages, **fields)["messages"]
    return found


def refusal(*messages: dict[str, Any], **fields: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        translate(*messages, **fields)
    return caught.value


def test_texts_become_messages_and_the_system_prompt_goes_first() -> None:
    assert conversation(QUESTION, system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
    ]
    blocks = [text("Be brief."), text("Be kind.")]
    assert conversation(QUESTION, system=blocks)[0] == {"role": "system", "content": blocks}


def test_sampling_goes_on_under_the_names_that_chats_have() -> None:
    found = translate(
        QUESTION,
        model="tiny",
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=7,
        priority=2,
        cache_salt="s",
        stream=True,
        metadata={"user_id": "u"},
    )
    del found["messages"]
    assert found == {
        "model": "tiny",
        "max_tokens": 5,
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 7,
        "priority": 2,
        "cache_salt": "s",
        "stream": True,
        "user": "u",
    }


def test_a_call_and_its_result_become_a_tool_call_and_a_message_of_the_tool() -> None:
    answer = {"role": "assistant", "content": [text("I look."), CALL]}
    result = {"role": "user", "content": [RESULT, text("And now?")]}
    assert conversation(QUESTION, answer, result)[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"at":"sky","n":2}'},
                }
            ],
        },
        {"role": "tool", "content": "blue", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "And now?"},
    ]


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({}, ""),
        ({"content": None}, ""),
        ({"content": "x"}, "x"),
        ({"content": [text("x"), text("y")]}, "x\ny"),
        ({"content": "x", "is_error": True}, "Error: x"),
        ({"content": "x", "is_error": False}, "x"),
    ],
)
def test_a_result_is_the_text_of_its_blocks_and_says_whether_it_failed(
    fields: dict[str, Any], content: str
) -> None:
    block = {"type": "tool_result", "tool_use_id": "t", **fields}
    found = conversation(QUESTION, {"role": "user", "content": [block]})
    assert found[-1] == {"role": "tool", "content": content, "tool_call_id": "t"}


def test_what_the_model_thought_before_goes_back_to_it_as_its_reasoning() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "any"}
    found = conversation(QUESTION, {"role": "assistant", "content": [thought, text("Blue.")]}, QUESTION)
    assert found[1] == {"role": "assistant", "content": "Blue.", "reasoning_content": "Hm."}


def test_turns_of_one_role_in_a_row_become_one_but_for_results() -> None:
    more = {"role": "user", "content": [text("b"), text("c")]}
    found = conversation({"role": "user", "content": "a"}, more)
    assert found == [{"role": "user", "content": [text("a"), text("b"), text("c")]}]
    results = {"role": "user", "content": [RESULT, RESULT]}
    assert [message["role"] for message in conversation(QUESTION, results)] == ["user", "tool", "tool"]


def test_an_answer_that_was_begun_is_continued_unless_it_is_empty() -> None:
    begun = translate(QUESTION, {"role": "assistant", "content": "It is"})
    assert begun["continue_final_message"] is True
    assert begun["messages"][-1] == {"role": "assistant", "content": "It is"}
    for empty in ("", [], [text("")]):
        found = translate(QUESTION, {"role": "assistant", "content": empty})
        assert "continue_final_message" not in found
        assert found["messages"] == [QUESTION]


def test_a_call_without_its_result_cannot_be_answered() -> None:
    found = refusal(QUESTION, {"role": "assistant", "content": [CALL]})
    assert (found.code, found.param) == (ErrorCode.INVALID_REQUEST, "messages")


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "between_tools", "disabled"])
def test_thinking_is_the_templates_switch(kind: str) -> None:
    found = translate(QUESTION, thinking={"type": kind})
    assert found["chat_template_kwargs"] == {"enable_thinking": kind != "disabled"}
    assert "chat_template_kwargs" not in translate(QUESTION)


def test_a_bound_on_thinking_and_unknown_fields_are_told_to_be_without_effect() -> None:
    fields = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "service_tier": "auto", "colour": 1}
    body = msgspec.json.encode({"max_tokens": 5, "messages": [QUESTION], **fields})
    assert sorted(decode_messages(body)[1]) == ["colour", "thinking.budget_tokens"]


@pytest.mark.parametrize("kind", ["image", "document", "redacted_thinking", "server_tool_use", "colour"])
def test_blocks_that_are_not_served_are_refused_by_name(kind: str) -> None:
    found = refusal({"role": "user", "content": [text("x"), {"type": kind}]})
    assert (found.code, found.param) == (ErrorCode.NOT_SUPPORTED, "messages[0].content[1].type")
    nested = {**RESULT, "content": [{"type": kind}]}
    found = refusal({"role": "user", "content": [nested]})
    assert found.param == "messages[0].content[0].content[0].type"


@pytest.mark.parametrize(
    ("role", "block", "param"),
    [
        ("user", CALL, "messages[0].content[0].type"),
        ("user", {"type": "thinking", "thinking": "x"}, "messages[0].content[0].type"),
        ("assistant", RESULT, "messages[0].content[0].type"),
        ("system", RESULT, "messages[0].content[0].type"),
        ("user", {"type": "text"}, "messages[0].content[0].text"),
        ("user", {"type": "tool_result"}, "messages[0].content[0].tool_use_id"),
        ("assistant", {"type": "tool_use", "id": "x", "name": "y"}, "messages[0].content[0].input"),
    ],
)
def test_blocks_that_are_wrong_where_they_are_name_their_field(
    role: str, block: dict[str, Any], param: str
) -> None:
    found = refusal({"role": role, "content": [block]})
    assert (found.code, found.param) == (ErrorCode.INVALID_REQUEST, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"stop_sequences": [""]}, ErrorCode.INVALID_REQUEST, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, ErrorCode.INVALID_REQUEST, "stop_sequences"),
        ({"temperature": 1.5}, ErrorCode.INVALID_REQUEST, "temperature"),
        ({"top_k": -1}, ErrorCode.INVALID_REQUEST, "top_k"),
        ({"max_tokens": 0}, ErrorCode.INVALID_REQUEST, "max_tokens"),
        ({"messages": []}, ErrorCode.INVALID_REQUEST, "messages"),
        ({"system": [CALL]}, ErrorCode.INVALID_REQUEST, "system[0].type"),
        ({"tools": [{"name": "x"}]}, ErrorCode.INVALID_REQUEST, "tools[0].input_schema"),
        ({"tools": [{"name": "x", "type": "web_search_20250305"}]}, ErrorCode.NOT_SUPPORTED, "tools[0].type"),
        ({"tool_choice": {"type": "tool"}}, ErrorCode.INVALID_REQUEST, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, ErrorCode.INVALID_REQUEST, "tool_choice"),
        ({"mcp_servers": [{}]}, ErrorCode.NOT_SUPPORTED, "mcp_servers"),
        ({"container": "x"}, ErrorCode.NOT_SUPPORTED, "container"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(fields: dict[str, Any], code: ErrorCode, param: str) -> None:
    found = refusal(QUESTION, **fields)
    assert (found.code, found.param) == (code, param)
    assert found.message.startswith(param)


def test_tools_that_may_not_be_called_are_shown_as_functions() -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    tools = [{"name": "look", "description": "Looks.", "input_schema": schema}]
    found = translate(QUESTION, tools=tools, tool_choice={"type": "none"})
    function = {"name": "look", "description": "Looks.", "parameters": schema}
    assert msgspec.to_builtins(found["tools"]) == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("param", "own"),
    [
        ("tools[2].function.parameters.type", "tools[2].input_schema.type"),
        ("tools[0].function.name", "tools[0].name"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("reasoning_effort", "output_config.effort"),
        ("stop", "stop_sequences"),
        ("messages", "messages"),
        ("temperature", "temperature"),
    ],
)
def test_what_a_chat_refuses_is_told_under_the_clients_name(param: str, own: str) -> None:
    found = renamed(ServiceError(ErrorCode.INVALID_REQUEST, f"{param}: no", param=param))
    assert (found.param, found.message) == (own, f"{own}: no")
    assert renamed(ServiceError(ErrorCode.INVALID_REQUEST, "no")).param is None


def test_counting_takes_what_makes_the_prompt_and_needs_no_limit() -> None:
    body = msgspec.json.encode({"messages": [QUESTION], "system": "s", "max_tokens": "ignored"})
    assert [message.role for message in chat_request(decode_count(body)).messages] == ["system", "user"]
