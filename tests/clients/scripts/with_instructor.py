"""instructor: pydantic models by tools, by JSON schema, and while they are streamed."""

import json
import os

import instructor
import openai
from pydantic import BaseModel, Field

MODEL = os.environ["SERVER_MODEL"]
REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Ada is 36 years old."}],
    "temperature": 0,
    "max_tokens": 200,
    "max_retries": 0,
}


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=150)


client = openai.OpenAI(max_retries=0)
answers = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    patched = instructor.from_openai(client, mode=mode)
    answers[mode.name] = patched.chat.completions.create(response_model=Person, **REQUEST).model_dump()
    *_, last = patched.chat.completions.create_partial(response_model=Person, **REQUEST)
    answers[f"{mode.name} streamed"] = last.model_dump()

print(json.dumps(answers))
