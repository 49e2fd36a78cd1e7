"""litellm as a library: its own exceptions, streams, the asynchronous side, structured output and tools."""

import asyncio
import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read when it is imported: no fetching of prices

import litellm
import openai
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
MODEL = "hosted_vllm/" + os.environ["SERVER_MODEL"]
SERVER = {
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
    "num_retries": 0,
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=10**8)


request = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **SERVER}
asked = litellm.completion(**request)
streamed = "".join(
    chunk.choices[0].delta.content or "" for chunk in litellm.completion(**request, stream=True)
)


async def at_once() -> list[str]:
    answers = await asyncio.gather(*(litellm.acompletion(**request) for _ in range(4)))
    return [answer.choices[0].message.content for answer in answers]


errors = []
for wrong in ({"model": "hosted_vllm/nobody-has-this"}, {"temperature": 9}, {"api_key": "wrong"}):
    try:
        litellm.completion(**request | wrong)
    except openai.APIError as error:
        errors.append(type(error).__name__)

longer = request | {"max_tokens": 200}
structured = litellm.completion(**longer, response_format=City).choices[0].message.content
calling = litellm.completion(**longer, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
[call] = calling.choices[0].message.tool_calls

print(
    json.dumps(
        {
            "asked": asked.choices[0].message.content,
            "usage": asked.usage.total_tokens,
            "streamed": streamed,
            "at once": asyncio.run(at_once()),
            "errors": errors,
            "structured": City.model_validate_json(structured).model_dump(),
            "call": [call.function.name, json.loads(call.function.arguments)],
        }
    )
)
