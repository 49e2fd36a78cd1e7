"""The official client's Responses API: text, streaming events, `parse`, a function and its result."""

import json
import os

import openai
from pydantic import BaseModel, Field

MODEL = os.environ["SERVER_MODEL"]
REQUEST = {"model": MODEL, "temperature": 0, "store": False}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=10**8)


client = openai.OpenAI(max_retries=0)
question = "What is the capital of France?"
asked = client.responses.create(**REQUEST, input=question, max_output_tokens=24)
conversation = [
    {"role": "user", "content": question},
    *[item.to_dict() for item in asked.output],
    {"role": "user", "content": "And what river flows through it?"},
]
further = client.responses.create(**REQUEST, input=conversation, max_output_tokens=24)

kinds = []
with client.responses.stream(**REQUEST, input=question, max_output_tokens=24) as stream:
    streamed = ""
    for event in stream:
        kinds.append(event.type)
        streamed += event.delta if event.type == "response.output_text.delta" else ""
    final = stream.get_final_response()

parsed = client.responses.parse(
    **REQUEST, input="Describe Paris.", text_format=City, max_output_tokens=200
).output_parsed

weather = [{"role": "user", "content": "What is the weather in Paris?"}]
named = {"type": "function", "name": "get_weather"}
called = client.responses.create(
    **REQUEST, input=weather, tools=[TOOL], tool_choice=named, max_output_tokens=200
)
[call] = [item for item in called.output if item.type == "function_call"]
result = {"type": "function_call_output", "call_id": call.call_id, "output": "19 degrees and sunny"}
after = client.responses.create(
    **REQUEST,
    input=[*weather, call.to_dict(), result],
    tools=[TOOL],
    tool_choice="none",
    max_output_tokens=24,
)

errors = []
for wrong in ({"model": "nobody-has-this"}, {"temperature": 9}, {"previous_response_id": "resp_1"}):
    try:
        client.responses.create(**REQUEST | {"input": question} | wrong)
    except openai.APIStatusError as error:
        errors.append([error.status_code, error.param])

print(
    json.dumps(
        {
            "asked": asked.output_text,
            "status": asked.status,
            "usage": asked.usage.total_tokens,
            "further": further.output_text,
            "kinds": kinds,
            "streamed": streamed,
            "final": final.output_text,
            "parsed": parsed.model_dump(),
            "call": [call.name, json.loads(call.arguments)],
            "after": after.output_text,
            "errors": errors,
        }
    )
)
