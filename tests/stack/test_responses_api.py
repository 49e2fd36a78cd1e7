"""`/v1/responses` with the official client against the real model through three real processes."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from openai.types.responses import Response, ResponseOutputMessage
from pydantic import BaseModel
from running_stack import RunningStack

QUESTION = "What is the capital of France?"


def message(response: Response) -> ResponseOutputMessage:
    item = response.output[0]
    assert isinstance(item, ResponseOutputMessage)
    return item


def test_a_response_says_what_a_chat_says(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(
        model=model, instructions="Answer briefly.", input=QUESTION, temperature=0, max_output_tokens=24
    )
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=24,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens


def test_a_streamed_response_is_the_plain_one(client: openai.OpenAI, model: str) -> None:
    plain = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=48)
    with client.responses.stream(model=model, input=QUESTION, temperature=0, max_output_tokens=48) as stream:
        events = list(stream)
    assert plain.status == "completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1]
    assert final.type == "response.completed"
    assert text == final.response.output_text == plain.output_text
    assert final.response.usage is not None
    assert plain.usage is not None
    assert final.response.usage.output_tokens == plain.usage.output_tokens


async def test_the_async_client_streams_a_response(stack: RunningStack, model: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", _strict_response_validation=True
    ) as client:
        stream = await client.responses.create(
            model=model, input=QUESTION, stream=True, max_output_tokens=5, extra_body={"ignore_eos": True}
        )
        events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 5
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_a_conversation_goes_on_with_the_items_of_its_answers(client: openai.OpenAI, model: str) -> None:
    fields = {"model": model, "temperature": 0}
    first = client.responses.create(**fields, input=QUESTION, max_output_tokens=32)
    follow = {"role": "user", "content": "And of Italy?"}
    items = [{"role": "user", "content": QUESTION}, *[item.to_dict() for item in first.output], follow]
    second = client.responses.create(**fields, input=items, max_output_tokens=32)
    chat = client.chat.completions.create(
        **fields,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            follow,
        ],
        max_tokens=32,
    )
    assert "Paris" in first.output_text
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    assert chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens


class Place(BaseModel):
    """The place that is asked about."""

    city: Literal["Paris", "Rome"]
    inhabitants: int


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_is_parsed_as_a_pydantic_model(client: openai.OpenAI, model: str, streamed: bool) -> None:
    if streamed:
        with client.responses.stream(
            model=model, input=QUESTION, text_format=Place, temperature=0, max_output_tokens=64
        ) as stream:
            parsed = stream.get_final_response().output_parsed
    else:
        parsed = client.responses.parse(
            model=model, input=QUESTION, text_format=Place, temperature=0, max_output_tokens=64
        ).output_parsed
    assert isinstance(parsed, Place)


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(
        model=model,
        input=QUESTION,
        temperature=0,
        max_output_tokens=4,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    part = message(response).content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    reported = chat.choices[0].logprobs
    assert reported is not None
    assert reported.content is not None
    assert [token.token for token in part.logprobs] == [token.token for token in reported.content]
    assert [token.logprob for token in part.logprobs] == pytest.approx(
        [token.logprob for token in reported.content], abs=1e-4
    )
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
