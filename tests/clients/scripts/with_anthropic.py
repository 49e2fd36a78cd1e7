"""The official Anthropic client: messages, streams, counting, tools, errors."""

import json
import os

import anthropic

MODEL = os.environ["SERVER_MODEL"]
REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "extra_body": {"temperature": 0},  # the client itself no longer knows it
    "max_tokens": 24,
}
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

client = anthropic.Anthropic(max_retries=0)
counted = client.messages.count_tokens(model=MODEL, messages=REQUEST["messages"], system="Be brief.")
asked = client.messages.create(**REQUEST, system="Be brief.")
with client.messages.stream(**REQUEST, system="Be brief.") as stream:
    streamed = "".join(stream.text_stream)
    final = stream.get_final_message()

question = [{"role": "user", "content": "What is the weather in Paris?"}]
calling = REQUEST | {"messages": question, "max_tokens": 200, "tools": [TOOL]}
named = {"type": "tool", "name": "get_weather"}
called = client.messages.create(**calling, tool_choice=named)
[use] = [block for block in called.content if block.type == "tool_use"]
with client.messages.stream(
    **calling, tool_choice={"type": "any", "disable_parallel_tool_use": True}
) as stream:
    streamed_call = stream.get_final_message()
[streamed_use] = [block for block in streamed_call.content if block.type == "tool_use"]
result = {"type": "tool_result", "tool_use_id": use.id, "content": "19 degrees and sunny"}
after = client.messages.create(
    **calling
    | {
        "messages": [
            *question,
            {"role": "assistant", "content": [block.to_dict() for block in called.content]},
            {"role": "user", "content": [result]},
        ],
        "max_tokens": 24,
        "tool_choice": {"type": "none"},
    }
)

errors = []
for wrong in ({"model": "nobody-has-this"}, {"extra_body": {"temperature": 9}}):
    try:
        client.messages.create(**REQUEST | wrong)
    except anthropic.APIStatusError as error:
        errors.append([type(error).__name__, error.body["type"], error.body["error"]["type"]])
try:
    anthropic.Anthropic(max_retries=0, api_key="wrong").messages.create(**REQUEST)
except anthropic.AuthenticationError as error:
    errors.append([type(error).__name__, error.body["type"], error.body["error"]["type"]])

print(
    json.dumps(
        {
            "counted": counted.input_tokens,
            "input": asked.usage.input_tokens + (asked.usage.cache_read_input_tokens or 0),
            "asked": asked.content[0].text,
            "ended": asked.stop_reason,
            "streamed": streamed,
            "gathered": final.content[0].text,
            "call": [use.name, use.input],
            "call ended": called.stop_reason,
            "streamed call": [streamed_use.name, streamed_use.input],
            "streamed call ended": streamed_call.stop_reason,
            "after": after.content[0].text,
            "errors": errors,
        }
    )
)
