from __future__ import annotations

import asyncio
import time

import pytest
from starlette.types import Message

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.client import Client
from sfllm_gateway.http_io import ClientGoneError


class Connection:
    """What a client sends: nothing, until it leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Something that takes for ever, and notes whether it was stopped."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.stopped = False

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


async def test_work_ends_when_its_client_leaves() -> None:
    connection, work = Connection(), Work()
    client = Client(connection.receive, time.monotonic() + 60)
    client.watch()
    waiting = asyncio.create_task(client.wait_for(work.run()))
    await work.started.wait()
    connection.left.set()
    with pytest.raises(ClientGoneError):
        await waiting
    assert work.stopped
    with pytest.raises(ClientGoneError):
        await client.wait_for(Work().run())


async def test_work_ends_at_the_deadline() -> None:
    work = Work()
    client = Client(Connection().receive, time.monotonic() + 0.05)
    with pytest.raises(ServiceError) as passed:
        await client.wait_for(work.run())
    assert passed.value.code is ErrorCode.DEADLINE_EXCEEDED
    assert work.stopped


async def test_a_result_and_a_timeout_of_the_works_own_are_passed_on() -> None:
    async def result() -> int:
        return 7

    async def timeout() -> None:
        raise TimeoutError("its own")

    client = Client(Connection().receive, time.monotonic() + 60)
    assert await client.wait_for(result()) == 7
    with pytest.raises(TimeoutError, match="its own"):
        await client.wait_for(timeout())


async def test_after_the_work_the_next_owner_hears_that_the_client_left() -> None:
    connection = Connection()
    client = Client(connection.receive, time.monotonic() + 60)
    client.watch()
    await client.wait_for(asyncio.sleep(0))
    heard = asyncio.Event()
    client.on_gone = heard.set
    connection.left.set()
    async with asyncio.timeout(10):
        await heard.wait()
    client.close()
