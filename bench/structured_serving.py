"""What a schema costs in tokens/s of a server that runs, whoever it is.

`python bench/structured_serving.py` asks a running server for chat completions of a fixed number of tokens,
so many at once, in rounds with a schema and without that take turns. It prints medians of tokens/s over
rounds, their ratio, and the median ratio of neighbouring rounds, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import aiohttp
from structured_output import ENDLESS

FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "list",
        "schema": {
            "type": "object",
            "properties": {"list": ENDLESS},
            "required": ["list"],
            "additionalProperties": False,
        },
    },
}


async def ask(session: aiohttp.ClientSession, seed: int, tokens: int, form: dict[str, Any]) -> None:
    """One answer, which must have all its tokens."""
    body = {
        "messages": [{"role": "user", "content": "Make a list of things."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": seed,
        "temperature": 0.8,
        **form,
    }
    async with session.post("/v1/chat/completions", json=body) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        assert found["usage"]["completion_tokens"] == tokens, found


async def tokens_per_second(
    session: aiohttp.ClientSession, at_once: int, tokens: int, seed: int, form: dict[str, Any]
) -> float:
    """Of one round."""
    started = time.perf_counter()
    await asyncio.gather(*(ask(session, seed * at_once + each, tokens, form) for each in range(at_once)))
    return at_once * tokens / (time.perf_counter() - started)


async def measure(url: str, rounds: int, at_once: list[int], tokens: int) -> None:
    """Print the table."""
    async with aiohttp.ClientSession(url) as session:
        print("| at once | tokens/s | with a schema | ratio | of neighbours |")
        print("|---|---|---|---|---|")
        for count in at_once:
            pairs = []
            for turn in range(rounds + 1):
                speeds = {}
                for wanted in (True, False) if turn % 2 else (False, True):
                    form = {"response_format": FORM} if wanted else {}
                    speeds[wanted] = await tokens_per_second(session, count, tokens, turn, form)
                pairs.append((speeds[False], speeds[True]))
            free, limited = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
            neighbours = statistics.median(with_schema / without for without, with_schema in pairs[1:])
            print(f"| {count} | {free:.1f} | {limited:.1f} | {limited / free:.3f} | {neighbours:.3f} |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8081")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.url, arguments.rounds, arguments.at_once, arguments.tokens))


if __name__ == "__main__":
    main()
