"""The official asynchronous client: eight streams at once, and one that is left early."""

import asyncio
import json
import os

import openai

MODEL = os.environ["SERVER_MODEL"]


async def tokens(client: openai.AsyncOpenAI, count: int) -> int:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell a story."}],
        max_tokens=count,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    last = [chunk async for chunk in stream][-1]
    return last.usage.completion_tokens


async def leave_early(client: openai.AsyncOpenAI) -> int:
    stream = await client.completions.create(model=MODEL, prompt="Once", max_tokens=1000, stream=True)
    seen = 0
    async with stream:
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
    return seen


async def main() -> None:
    async with openai.AsyncOpenAI(max_retries=0) as client:
        counts = await asyncio.gather(*(tokens(client, count) for count in range(1, 9)))
        print(json.dumps({"counts": counts, "left after": await leave_early(client)}))


asyncio.run(main())
