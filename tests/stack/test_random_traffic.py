"""Thousands of random requests on a tiny model with too small a cache: nothing is lost, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import aiohttp
import openai
import pytest
from running_stack import RunningStack

REQUESTS = 2000
AT_ONCE = 48


@pytest.fixture(scope="module")
def tiny() -> Iterator[RunningStack]:
    running = RunningStack(
        "--model=tiny-llama",
        "--load-format=dummy",
        "--dtype=float32",
        "--max-running-tokens=640",
        "--max-context-length=512",
        "--max-batch-size=16",
        "--threads=1",
    )
    running.wait_until_ready()
    yield running
    assert running.stop() == 0


async def test_blocks_balance_at_idle_after_thousands_of_random_requests(tiny: RunningStack) -> None:
    rng = random.Random(7)
    ended = {"finished": 0, "left": 0}
    room = asyncio.Semaphore(AT_ONCE)

    async def one(session: aiohttp.ClientSession, seed: int) -> None:
        plan = random.Random(seed)
        tokens = plan.randrange(1, 40)
        body = {
            "prompt": [plan.randrange(200) for _ in range(plan.choice([1, 5, 31, 32, 33, 200]))],
            "max_tokens": tokens,
            "n": plan.choice([1, 1, 1, 2, 4]),
            "seed": seed,
            "ignore_eos": True,
            "stream": plan.random() < 0.5,
        }
        leaves = body["stream"] and plan.random() < 0.3
        async with room, session.post(f"{tiny.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            if leaves:
                await answer.content.readany()
                answer.close()
                ended["left"] += 1
            elif body["stream"]:
                text = await answer.text()
                assert text.endswith("data: [DONE]\n\n")
                assert text.count('"finish_reason":"length"') == body["n"]
                ended["finished"] += 1
            else:
                usage = (await answer.json())["usage"]
                assert usage["completion_tokens"] == tokens * body["n"]
                ended["finished"] += 1

    timeout = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.gather(*(one(session, rng.randrange(2**31)) for _ in range(REQUESTS)))
    assert sum(ended.values()) == REQUESTS
    assert ended["left"] > 100
    worker = tiny.worker_admins[0]
    tiny.wait_for_metric(worker, "sfllm:kv_blocks", 0, state="used")
    tiny.wait_for_metric(worker, "sfllm:worker_sequences", 0, state="running")
    tiny.wait_for_metric(tiny.scheduler_admin, "sfllm:num_requests_running", 0)
    assert tiny.metric(worker, "sfllm:num_preemptions_total") > 0, "the cache was meant to be too small"


def test_a_stream_goes_on_word_for_word_when_its_worker_is_killed(tiny: RunningStack) -> None:
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0)
    request = {
        "model": client.models.list().data[0].id,
        "prompt": "Count with me",
        "max_tokens": 400,
        "seed": 11,
        "extra_body": {"ignore_eos": True},
    }
    calm = client.completions.create(**request).choices[0].text
    pieces = []
    for chunk in client.completions.create(**request, stream=True):
        pieces.append(chunk.choices[0].text)
        if len(pieces) == 10:
            [pid] = tiny.worker_pids()
            os.kill(pid, signal.SIGKILL)
    assert "".join(pieces) == calm
