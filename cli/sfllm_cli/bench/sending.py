"""Sends requests and takes their times: one at a time, a closed loop, an open loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import aiohttp

from sfllm_cli.bench.figures import Sample
from sfllm_cli.bench.stream import AnswerReader
from sfllm_cli.client import ServerError, error_message

LAG_INTERVAL_SECONDS = 0.02
REQUEST_ERRORS = (ServerError, aiohttp.ClientError, TimeoutError, OSError, ValueError)

Advance = Callable[[], None]


class Sender:
    """Sends requests to one address of a server. The session belongs to the caller."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, fresh_connections: bool = False) -> None:
        self._session = session
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if fresh_connections:
            self._headers["Connection"] = "close"

    async def send(self, body: bytes) -> Sample:
        """The sample of that request, whatever became of it."""
        answer = AnswerReader()
        error = ""
        sent_at = time.perf_counter()
        try:
            await self._read(body, answer)
        except REQUEST_ERRORS as problem:
            error = str(problem) or type(problem).__name__
        known = answer.output_tokens
        return Sample(
            sent_at=sent_at,
            ended_at=time.perf_counter(),
            arrivals=tuple(answer.arrivals),
            prompt_tokens=answer.prompt_tokens,
            output_tokens=len(answer.arrivals) if known is None else known,
            has_usage=known is not None,
            error=error,
        )

    async def _read(self, body: bytes, answer: AnswerReader) -> None:
        async with self._session.post(self._url, data=body, headers=self._headers) as response:
            if response.status != 200:
                raise ServerError(f"HTTP {response.status}: {error_message(await response.text())}")
            async for data in response.content.iter_any():
                answer.feed(data, time.perf_counter())
        if not answer.is_complete:
            raise ServerError("the stream ended without a finish_reason or [DONE]")


async def closed_loop(
    sender: Sender, bodies: Sequence[bytes], concurrency: int, advance: Advance
) -> list[Sample]:
    """Keep `concurrency` requests open until all are done."""
    waiting = iter(bodies)
    samples: list[Sample] = []

    async def client() -> None:
        for body in waiting:
            samples.append(await sender.send(body))
            advance()

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(bodies))):
            clients.create_task(client())
    return samples


async def open_loop(
    sender: Sender, bodies: Sequence[bytes], times: Sequence[float], advance: Advance
) -> list[Sample]:
    """Send each request at its time, in seconds from now, however many are still open."""
    samples: list[Sample] = []
    started = time.perf_counter()

    async def client(body: bytes) -> None:
        samples.append(await sender.send(body))
        advance()

    async with asyncio.TaskGroup() as clients:
        for body, due in zip(bodies, times, strict=True):
            ahead = started + due - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            clients.create_task(client(body))
    return samples


@contextlib.asynccontextmanager
async def lag_recorded(lags: list[float]) -> AsyncIterator[None]:
    """Record how late timers of this event loop are: by as much, arrivals are seen too late."""

    async def record() -> None:
        while True:
            due = time.perf_counter() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            lags.append(max(0.0, time.perf_counter() - due))

    task = asyncio.create_task(record())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
