"""Answers that are only the prompt again: no worker is asked."""

from __future__ import annotations

from starlette.types import Send

from sfllm_gateway.generation import Answer, Generation, Update, Usage
from sfllm_gateway.http_io import EVENT_HEADERS, JSON_HEADERS, Headers, send_answer


async def answer_echo(generation: Generation, answer: Answer, send: Send, headers: Headers) -> None:
    """Write the whole answer to a request that `needs_worker` is False of."""
    assert generation.echo is not None
    updates = [
        Update(
            choice=choice,
            text=generation.echo[choice // generation.n],
            ids=(),
            usage=Usage(len(generation.prompts[choice // generation.n]), 0),
            finish_reason="length",
        )
        for choice in range(len(generation.prompts) * generation.n)
    ]
    usage = Usage(sum(map(len, generation.prompts)), 0)
    if not generation.stream:
        await send_answer(send, 200, [*JSON_HEADERS, *headers], answer.whole(updates, usage))
        return
    events = [answer.first(len(updates)), *map(answer.event, updates), answer.last(usage)]
    await send_answer(send, 200, [*EVENT_HEADERS, *headers], b"".join(events))
