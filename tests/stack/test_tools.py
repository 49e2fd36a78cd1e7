"""Tool calls of a small model that was never taught any: required ones are valid whatever it would write."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any, Literal

import openai
import pytest
import requests
from pydantic import BaseModel, ConfigDict, Field
from running_stack import RunningStack

QUESTION: Any = [{"role": "user", "content": "Is it colder in Oslo or in Rome? Look it up."}]


class GetWeather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=20)
    unit: Literal["celsius", "fahrenheit"]
    days: list[int] = Field(max_length=2)


class Compare(BaseModel):
    """Which of two numbers is larger."""

    model_config = ConfigDict(extra="forbid")

    left: float = Field(ge=-100, le=100, multiple_of=0.5)
    right: float = Field(ge=-100, le=100, multiple_of=0.5)


FUNCTIONS: dict[str, type[BaseModel]] = {"GetWeather": GetWeather, "Compare": Compare}
TOOLS: Any = [openai.pydantic_function_tool(function) for function in FUNCTIONS.values()]
REQUIRED: Any = {
    "messages": QUESTION,
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
}


def only_call(choice: Any) -> Any:
    """The one call of a choice."""
    calls = choice.message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    assert calls[0].type == "function"
    return calls[0]


def check(name: str, arguments: str) -> None:
    FUNCTIONS[name].model_validate_json(arguments, strict=True)


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_required_call_is_valid_at_any_temperature(
    client: openai.OpenAI, model: str, temperature: float
) -> None:
    answer = client.chat.completions.create(**REQUIRED, model=model, temperature=temperature, n=4, seed=7)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        call = only_call(choice)
        check(call.function.name, call.function.arguments)
    assert (
        len({choice.message.tool_calls[0].id for choice in answer.choices if choice.message.tool_calls}) == 4
    )


def test_several_calls_are_valid_each(client: openai.OpenAI, model: str) -> None:
    fields = {**REQUIRED, "parallel_tool_calls": True, "max_tokens": 400}
    answer = client.chat.completions.create(**fields, model=model, temperature=1.5, seed=3, n=4)
    for choice in answer.choices:
        assert choice.finish_reason in {"tool_calls", "length"}
        for call in choice.message.tool_calls or ():
            assert call.type == "function"
            check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI, model: str, name: str) -> None:
    fields = {**REQUIRED, "tool_choice": {"type": "function", "function": {"name": name}}}
    (choice,) = client.chat.completions.create(**fields, model=model, temperature=0).choices
    assert choice.finish_reason == "stop"
    call = only_call(choice)
    assert call.function.name == name
    check(name, call.function.arguments)


def test_a_streamed_call_is_that_of_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    fields = {**REQUIRED, "model": model, "temperature": 1, "seed": 11}
    (whole,) = client.chat.completions.create(**fields).choices
    with client.chat.completions.stream(**fields) as stream:
        pieces = [
            event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"
        ]
        (choice,) = stream.get_final_completion().choices
    assert len(pieces) > 5, "arguments come as the model writes them"
    assert choice.finish_reason == whole.finish_reason == "tool_calls"
    call, same = only_call(choice), only_call(whole)
    assert (call.function.name, call.function.arguments) == (same.function.name, same.function.arguments)
    assert "".join(pieces) == call.function.arguments


def test_the_clients_parser_makes_objects_of_calls(client: openai.OpenAI, model: str) -> None:
    (choice,) = client.chat.completions.parse(**REQUIRED, model=model, temperature=0).choices
    call = only_call(choice)
    assert isinstance(call.function.parsed_arguments, (GetWeather, Compare))


@pytest.mark.parametrize("max_tokens", [1, 8, 20])
def test_a_call_that_is_cut_off_ends_with_length(client: openai.OpenAI, model: str, max_tokens: int) -> None:
    fields = {**REQUIRED, "model": model, "max_tokens": max_tokens, "temperature": 0}
    (choice,) = client.chat.completions.create(**fields).choices
    assert choice.finish_reason == "length"
    reasons = [
        chunk.choices[0].finish_reason for chunk in client.chat.completions.create(**fields, stream=True)
    ]
    assert reasons[-1] == "length"


def test_the_result_of_a_call_is_answered(client: openai.OpenAI, model: str) -> None:
    (choice,) = client.chat.completions.create(**REQUIRED, model=model, temperature=0).choices
    call = only_call(choice)
    conversation = [
        *QUESTION,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Oslo has -5 degrees, Rome 12."},
    ]
    answer = client.chat.completions.create(
        model=model, messages=conversation, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_where_calls_are_left_to_the_model_its_text_is_content(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        tools=TOOLS,
        temperature=0,
        max_tokens=24,
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_calls_are_valid_in_a_batch_of_different_requests(client: openai.OpenAI, model: str) -> None:
    def ask(seed: int) -> Any:
        named = {"type": "function", "function": {"name": list(FUNCTIONS)[seed % 2]}}
        choice = [None, "required", named][seed % 3]
        fields = {**REQUIRED, "tools": TOOLS if choice else openai.NOT_GIVEN}
        if choice is None:
            fields = {"messages": QUESTION, "max_tokens": 30}
        else:
            fields["tool_choice"] = choice
        return client.chat.completions.create(**fields, model=model, temperature=1.2, seed=seed).choices[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(12)))
    for seed, choice in enumerate(answers):
        assert bool(choice.message.tool_calls) == (seed % 3 > 0)
        for call in choice.message.tool_calls or ():
            check(call.function.name, call.function.arguments)


def test_responses_have_a_function_call(client: openai.OpenAI, model: str) -> None:
    tools: Any = [
        {
            "type": "function",
            "name": name,
            "parameters": function.model_json_schema(),
            "strict": True,
            "description": function.__doc__,
        }
        for name, function in FUNCTIONS.items()
    ]
    response = client.responses.create(
        model=model,
        input=QUESTION,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=200,
    )
    (item,) = response.output
    assert item.type == "function_call"
    assert response.status == item.status == "completed"
    check(item.name, item.arguments)


def test_anthropics_messages_have_a_tool_use(stack: RunningStack, model: str) -> None:
    tools: Any = [
        {"name": name, "description": function.__doc__, "input_schema": function.model_json_schema()}
        for name, function in FUNCTIONS.items()
    ]
    body = {
        "model": model,
        "messages": QUESTION,
        "tools": tools,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 200,
    }
    answer = requests.post(f"{stack.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (block,) = answer.json()["content"]
    assert block["type"] == "tool_use"
    assert answer.json()["stop_reason"] == "tool_use"
    check(block["name"], json.dumps(block["input"]))
