"""The official client: models, a chat, a stream, a completion, errors."""

import json
import os

import openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = os.environ["SERVER_MODEL"]

client = openai.OpenAI(max_retries=0)
models = [model.id for model in client.models.list()]
card = client.models.retrieve(MODEL)

chat = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
streamed = ""
usage = None
with client.chat.completions.create(
    model=MODEL,
    messages=QUESTION,
    temperature=0,
    max_tokens=24,
    stream=True,
    stream_options={"include_usage": True},
) as stream:
    for chunk in stream:
        streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage

# The client's own way to gather a stream into one answer.
with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24) as events:
    gathered = events.get_final_completion().choices[0].message.content

completion = client.completions.create(
    model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=12, logprobs=2
)

errors = {}
for name, request in {
    "unknown model": {"model": "nobody-has-this"},
    "temperature": {"temperature": 9},
    "too long": {"messages": [{"role": "user", "content": "word " * 3000}]},
}.items():
    try:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **request})
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.code, error.param]
try:
    openai.OpenAI(max_retries=0, api_key="wrong").models.list()
except openai.AuthenticationError as error:
    errors["wrong key"] = [type(error).__name__, error.code, error.param]

print(
    json.dumps(
        {
            "models": models,
            "card": card.id,
            "chat": chat.choices[0].message.content,
            "usage": chat.usage.to_dict(),
            "streamed": streamed,
            "streamed usage": usage.to_dict(),
            "gathered": gathered,
            "completion": completion.choices[0].text,
            "logprobs": len(completion.choices[0].logprobs.tokens),
            "errors": errors,
        }
    )
)
