"""pydantic-ai doing a loop: functions are called, their results go back, and a typed answer ends it.

So small a model would call anything at any time. Each turn offers it one kind of tool, of which the
server must then make it call one; the loop and the checks of what it says are pydantic-ai's own.
"""

import asyncio
import json
import os
from typing import Annotated

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.tools import ToolDefinition

TURNS = ["find_station", "get_weather", "final_result"]
MODEL = OpenAIChatModel(os.environ["SERVER_MODEL"])
SETTINGS = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}


class Weather(BaseModel):
    """What the weather of a city is."""

    city: str = Field(max_length=40)
    degrees: int = Field(ge=-60, le=60)


def of_this_turn(context: RunContext, tools: list[ToolDefinition]) -> list[ToolDefinition]:
    return [tool for tool in tools if tool.name == TURNS[context.run_step - 1]]


looping = Agent(
    MODEL,
    output_type=ToolOutput(Weather, name="final_result"),
    model_settings=SETTINGS,
    capabilities=[PrepareTools(of_this_turn), PrepareOutputTools(of_this_turn)],
)
called = []


@looping.tool_plain
def find_station(city: Annotated[str, Field(max_length=40)]) -> int:
    """Number of the weather station of a city."""
    called.append(["find_station", city])
    return 17


@looping.tool_plain
def get_weather(station: Annotated[int, Field(ge=0, le=999)]) -> str:
    """The weather at a station."""
    called.append(["get_weather", station])
    return "19 degrees and sunny"


async def streamed(agent: Agent) -> list[str]:
    async with agent.run_stream("What is the capital of France?") as result:
        return [text async for text in result.stream_text(delta=True, debounce_by=None)]


loop = looping.run_sync("What is the weather in Paris?")
native = Agent(MODEL, output_type=NativeOutput(Weather), model_settings=SETTINGS).run_sync(
    "Paris has 19 degrees."
)
pieces = asyncio.run(streamed(Agent(MODEL, model_settings=SETTINGS)))

print(
    json.dumps(
        {
            "called": called,
            "requests": loop.usage.requests,
            "tokens": loop.usage.output_tokens,
            "loop": loop.output.model_dump(),
            "native": native.output.model_dump(),
            "streamed": pieces,
        }
    )
)
