"""Answers that have a form: the real model over HTTP, however unlikely the form is to it."""

from __future__ import annotations

import concurrent.futures
import json
import re
from enum import StrEnum
from typing import Any, Literal

import openai
import pytest
import requests
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from running_stack import RunningStack

TOM = [{"role": "user", "content": "Tom is 34 and lives in Oslo with a cat and a dog. Describe Tom as JSON."}]
WHERE = "response_format.json_schema.schema"


class Kind(StrEnum):
    cat = "cat"
    dog = "dog"
    horse = "horse"


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Kind
    age: int = Field(ge=0, le=30)


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    home: Literal["Oslo", "Bergen"] | None
    pets: list[Pet] = Field(min_length=1, max_length=2)


FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": Person.model_json_schema()},
}


# So deep that it overflows the stack of what compiles it.
LINKS: Any = {f"{n}": {"type": "array", "items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(1500)}
CHAIN = {"$ref": "#/$defs/0", "$defs": LINKS | {"1500": {"type": "integer"}}}


def text_of(choice: Any) -> str:
    """What a choice says, which ended by itself."""
    assert choice.finish_reason == "stop"
    return choice.message.content or ""


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_an_answer_follows_a_schema_with_objects_lists_and_enums(
    client: openai.OpenAI, model: str, temperature: float
) -> None:
    answer = client.chat.completions.create(
        model=model, messages=TOM, temperature=temperature, seed=3, max_tokens=200, response_format=FORMAT
    )
    person = Person.model_validate_json(text_of(answer.choices[0]))
    assert list(person.model_dump()) == ["name", "age", "home", "pets"]


def test_every_choice_follows_the_schema_and_repeats_with_its_seed(client: openai.OpenAI, model: str) -> None:
    def ask() -> list[str]:
        answer = client.chat.completions.create(
            model=model,
            messages=TOM,
            temperature=1.5,
            seed=7,
            max_tokens=200,
            n=3,
            response_format=FORMAT,
        )
        return [text_of(choice) for choice in answer.choices]

    texts = ask()
    for text in texts:
        Person.model_validate_json(text)
    assert len(set(texts)) > 1
    assert ask() == texts


def test_a_stream_has_the_text_of_the_plain_answer(client: openai.OpenAI, model: str) -> None:
    request = {
        "model": model,
        "messages": TOM,
        "temperature": 0,
        "max_tokens": 200,
        "response_format": FORMAT,
    }
    plain = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == text_of(plain.choices[0])
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) > 5


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=TOM, temperature=0, max_tokens=200, response_format=Person
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Person)
    with client.chat.completions.stream(
        model=model, messages=TOM, temperature=0, max_tokens=200, response_format=Person
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_any_json_object_will_do(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=TOM,
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_object"},
    )
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":  # a small model may go on for long
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[A-Z]{3}-\d{4}"}, r"[A-Z]{3}-\d{4}"),
        ({"choice": ["absolutely", "absurd", 'a "quoted" one']}, r'absolutely|absurd|a "quoted" one'),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[xyz]{1,5}/'}, "<[xyz]{1,5}>"),
        ({"grammar": 'root ::= ("ab" | "cd") [0-9] [0-9]? "."'}, r"(ab|cd)[0-9]{1,2}\."),
        ({"json": {"type": "array", "items": {"enum": [1, None]}, "maxItems": 3}}, r"\[[1nul, \n\t]*\]"),
        ({"json_object": True, "disable_any_whitespace": True}, r"\{\S.*"),
    ],
)
def test_forms_other_than_schemas(
    client: openai.OpenAI, model: str, form: dict[str, Any], pattern: str
) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=TOM,
        temperature=1,
        seed=5,
        max_tokens=60,
        extra_body={"structured_outputs": form},
    )
    assert re.fullmatch(pattern, answer.choices[0].message.content or "", re.DOTALL)


def test_completions_and_the_native_api_follow_forms(
    client: openai.OpenAI, stack: RunningStack, model: str
) -> None:
    answer = client.completions.create(
        model=model,
        prompt=["One:", "Two:"],
        max_tokens=12,
        temperature=1,
        seed=1,
        extra_body={"guided_regex": "[01]{8}"},
    )
    assert [bool(re.fullmatch("[01]{8}", choice.text)) for choice in answer.choices] == [True, True]
    params = {"regex": "[01]{8}", "max_new_tokens": 12}
    body = {"text": "One:", "sampling_params": params}
    native = requests.post(f"{stack.url}/generate", json=body, timeout=60).json()
    assert re.fullmatch("[01]{8}", native["text"])
    assert native["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_stop_string_and_the_token_limit_end_a_form_early(client: openai.OpenAI, model: str) -> None:
    request = {"model": model, "messages": TOM, "temperature": 0, "response_format": FORMAT}
    stopped = client.chat.completions.create(**request, max_tokens=200, stop='"age"').choices[0]
    assert stopped.finish_reason == "stop"
    assert '"name"' in (stopped.message.content or "")
    assert "age" not in (stopped.message.content or "")
    cut = client.chat.completions.create(**request, max_tokens=6).choices[0]
    assert cut.finish_reason == "length"
    with pytest.raises(ValidationError):
        Person.model_validate_json(cut.message.content or "")


def test_log_probabilities_are_of_the_tokens_that_came(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=TOM,
        temperature=0,
        max_tokens=20,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": ["zebra crossing", "quartz"]}},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
    # The model's own view: what the form forbade is more likely to it than what came.
    assert tokens[0].logprob < tokens[0].top_logprobs[0].logprob <= 0


def test_forms_and_free_text_share_a_batch(client: openai.OpenAI, model: str) -> None:
    free = {"model": model, "messages": TOM, "temperature": 0, "max_tokens": 16}
    alone = client.chat.completions.create(**free).choices[0].message.content

    def ask(number: int) -> str:
        if number % 2:
            return client.chat.completions.create(**free).choices[0].message.content or ""
        answer = client.chat.completions.create(
            **free, extra_body={"structured_outputs": {"regex": f"[a-c]{{{number + 1}}}"}}
        )
        return answer.choices[0].message.content or ""

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(ask, range(8)))
    assert [text for number, text in enumerate(texts) if number % 2] == [alone] * 4
    assert all(re.fullmatch(f"[a-c]{{{number + 1}}}", texts[number]) for number in range(0, 8, 2))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "not": {}},
        {"type": "string", "pattern": "(?=a)"},
        CHAIN,
    ],
)
def test_what_cannot_be_followed_is_refused_and_harms_nobody(
    client: openai.OpenAI, model: str, schema: dict[str, Any]
) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=TOM, stream=True, response_format=wanted)
    assert refused.value.param == WHERE
    assert client.chat.completions.create(model=model, messages=TOM, max_tokens=2).choices
