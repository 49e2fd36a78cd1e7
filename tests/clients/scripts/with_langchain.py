"""langchain-openai: ask, stream, batch, structured output and bound tools."""

import json
import os
from typing import Annotated

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

MODEL = os.environ["SERVER_MODEL"]
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=10**8)


@tool
def get_weather(city: Annotated[str, Field(max_length=40)]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=24, max_retries=0)
asked = model.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
streamed = "".join(chunk.text for chunk in model.stream(QUESTION))
chain = ChatPromptTemplate.from_messages([("human", "What is the capital of {country}?")]) | model
batch = [answer.text for answer in chain.batch([{"country": "France"}, {"country": "France"}])]
completed = OpenAI(model=MODEL, temperature=0, max_tokens=8, max_retries=0).invoke("1, 2, 3, 4, 5,")

longer = ChatOpenAI(model=MODEL, temperature=0, max_tokens=200, max_retries=0)
structured = longer.with_structured_output(City, method="json_schema").invoke("Describe Paris.")
calling = longer.bind_tools([get_weather], tool_choice="get_weather", strict=True).invoke(
    "What is the weather in Paris?"
)
[call] = calling.tool_calls

print(
    json.dumps(
        {
            "asked": asked.text,
            "usage": asked.usage_metadata["total_tokens"],
            "streamed": streamed,
            "batch": batch,
            "completed": completed,
            "structured": structured.model_dump(),
            "call": [call["name"], call["args"]],
            "result": get_weather.invoke(call).content,
        }
    )
)
