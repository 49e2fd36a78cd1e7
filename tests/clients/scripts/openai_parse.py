"""The official client's `parse`: pydantic models in, pydantic models out; and a schema written by hand."""

import json
import os
from enum import StrEnum

import openai
from pydantic import BaseModel, Field

MODEL = os.environ["SERVER_MODEL"]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Animal(BaseModel):
    name: str = Field(max_length=40)
    legs: int = Field(ge=0, le=100)
    colour: Colour
    tame: bool


client = openai.OpenAI(max_retries=0)
messages = [{"role": "user", "content": "Describe a dog. Be very short."}]
request = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 200}

parsed = client.chat.completions.parse(**request, response_format=Animal).choices[0].message.parsed
with client.chat.completions.stream(**request, response_format=Animal) as stream:
    streamed = stream.get_final_completion().choices[0].message.parsed

cut = None
try:
    client.chat.completions.parse(**request | {"max_tokens": 4}, response_format=Animal)
except openai.LengthFinishReasonError as error:
    cut = type(error).__name__

schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
by_hand = client.chat.completions.create(
    **request, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
)
loose = client.chat.completions.create(**request, response_format={"type": "json_object"})
refused = None
try:
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    client.chat.completions.create(**request, response_format=wrong)
except openai.BadRequestError as error:
    refused = error.param

print(
    json.dumps(
        {
            "parsed": parsed.model_dump(mode="json"),
            "streamed": streamed.model_dump(mode="json"),
            "cut": cut,
            "by hand": by_hand.choices[0].message.content,
            "loose": loose.choices[0].message.content,
            "loose ended": loose.choices[0].finish_reason,
            "refused": refused,
        }
    )
)
