"""The official client calling functions: required, named, streamed, with the result handed back."""

import json
import os

import openai
from pydantic import BaseModel, Field

MODEL = os.environ["SERVER_MODEL"]


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=40)
    unit: str = Field(max_length=40)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 40},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
    },
]

client = openai.OpenAI(max_retries=0)
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
request = {"model": MODEL, "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
named = {"type": "function", "function": {"name": "get_weather"}}

required = client.chat.completions.create(**request, tool_choice="required").choices[0]
chosen = client.chat.completions.create(**request, tool_choice=named).choices[0]
[call] = chosen.message.tool_calls

name, arguments, reasons = "", "", []
for chunk in client.chat.completions.create(**request, tool_choice=named, stream=True):
    [choice] = chunk.choices
    for delta in choice.delta.tool_calls or ():
        name += delta.function.name or ""
        arguments += delta.function.arguments or ""
    reasons += [choice.finish_reason] if choice.finish_reason else []

parsed = client.chat.completions.parse(
    **request | {"tools": [openai.pydantic_function_tool(Weather)]}, tool_choice="required"
)

after = client.chat.completions.create(
    **request
    | {
        "messages": [
            *messages,
            chosen.message.to_dict(),
            {"role": "tool", "tool_call_id": call.id, "content": "19 degrees and sunny"},
        ],
        "max_tokens": 24,
    },
    tool_choice="none",
).choices[0]

print(
    json.dumps(
        {
            "required": [
                [call.function.name, json.loads(call.function.arguments)]
                for call in required.message.tool_calls
            ],
            "required ended": required.finish_reason,
            "named": [call.function.name, json.loads(call.function.arguments)],
            "named ended": chosen.finish_reason,
            "streamed": [name, json.loads(arguments)],
            "streamed ended": reasons,
            "parsed": parsed.choices[0].message.tool_calls[0].function.parsed_arguments.model_dump(),
            "after": after.message.content,
            "after calls": after.message.tool_calls,
        }
    )
)
