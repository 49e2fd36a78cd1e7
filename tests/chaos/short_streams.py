"""Short streams of every kind, and the check that each is what it was in calm."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from chaos.ask import Delivery, Reading, ask, ask_until_accepted
from chaos.fleet import Fleet
from chaos.http_client import Address
from chaos.judge import judge
from chaos.layout import FleetOptions
from chaos.templates import Template

BEAT_SECONDS = 0.2
LEASE_SECONDS = 0.8
TOKENS = 8

MakeFleet = Callable[[FleetOptions], Fleet]


def completion(name: str, **fields: object) -> Template:
    """A streamed completion that shows its token ids."""
    body = {
        "prompt": "Tell me",
        "max_tokens": TOKENS,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "ignore_eos": True,
        **fields,
    }
    return Template(name, "/v1/completions", body)


LEADER = completion("leader", prompt="What is it?", seed=1)
FOLLOWERS = (
    completion("two choices", n=2, seed=2),
    completion("log probabilities", logprobs=2, seed=3),
    completion("penalties", frequency_penalty=1.0, repetition_penalty=1.2, temperature=0.5, seed=4),
    completion("not streamed", stream=False, stream_options=None, n=2, logprobs=1),
)


async def in_calm(address: Address) -> list[Delivery]:
    """Every kind of stream with its undisturbed answer, the leader first; one of them has a stop string."""
    found = [await ask_until_accepted(address, template) for template in (LEADER, *FOLLOWERS)]
    text = found[1].choices[0].text
    found.append(await ask(address, completion("stop string", n=2, seed=2, stop=[text[6:8]])))
    assert [delivery.ended for delivery in found] == ["complete"] * len(found)
    assert found[0].tokens == TOKENS
    assert 0 < len(found[-1].choices[0].text) < len(text)
    return found


async def disturbed(
    address: Address,
    calm: list[Delivery],
    index: int,
    disturb: Callable[[], Awaitable[None]],
) -> None:
    """Ask for all at once, disturb them when the leader has `index` tokens, and check what came."""
    reached = asyncio.Event()
    if not index:
        reached.set()

    def notice(tokens: int) -> None:
        if tokens >= index:
            reached.set()

    leader = asyncio.create_task(ask(address, calm[0].template, reading=Reading(on_tokens=notice)))
    others = [asyncio.create_task(ask(address, expected.template)) for expected in calm[1:]]
    async with asyncio.timeout(60):
        await reached.wait()
        await disturb()
        for task, expected in zip([leader, *others], calm, strict=True):
            got = await task
            assert (got.ended, got.error) == ("complete", ""), got
            assert judge(expected, got) is None, f"{got.template.name}, disturbed at token {index}"
