"""Anthropic's messages, and requests that are sent again, against the real model through real processes."""

from __future__ import annotations

import json
from typing import Any

import requests
from running_stack import RunningStack

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(stack: RunningStack, path: str = "/v1/messages", **fields: Any) -> requests.Response:
    headers = fields.pop("headers", {})
    answer = requests.post(stack.url + path, json=fields, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def streamed(answer: requests.Response) -> list[dict[str, Any]]:
    lines = answer.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")


def test_a_message_is_the_same_whole_and_streamed_and_its_prompt_is_counted(stack: RunningStack) -> None:
    fields: dict[str, Any] = {
        "messages": QUESTION,
        "system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = ask(stack, **fields).json()
    assert "Paris" in whole["content"][0]["text"]
    assert whole["stop_reason"] == "end_turn"
    found = streamed(ask(stack, **fields, stream=True))
    assert text_of(found) == whole["content"][0]["text"]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    counted = {name: fields[name] for name in ("messages", "system")}
    count = ask(stack, "/v1/messages/count_tokens", **counted).json()
    usage = whole["usage"]
    assert count["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert count["input_tokens"] == found[0]["message"]["usage"]["input_tokens"]


def test_the_model_goes_on_with_an_answer_that_was_begun(stack: RunningStack) -> None:
    begun = {"role": "assistant", "content": "The capital of France is"}
    answer = ask(stack, messages=[*QUESTION, begun], max_tokens=6, temperature=0).json()
    assert answer["content"][0]["text"].lstrip().startswith("Paris")


def test_a_retry_draws_the_same_tokens_again(stack: RunningStack) -> None:
    fields: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 1, "stream": True}
    texts = [
        text_of(streamed(ask(stack, **fields, headers={"Idempotency-Key": key})))
        for key in ("first", "first", "second")
    ]
    assert texts[0] == texts[1] != texts[2]
