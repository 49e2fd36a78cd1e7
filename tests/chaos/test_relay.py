from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
from chaos.http_client import Address
from chaos.ports import free_ports
from chaos.relay import Relay

WAIT_SECONDS = 20.0
SHORT_SECONDS = 0.2


class Line(NamedTuple):
    """A relay to a server that echoes, and its port."""

    relay: Relay
    port: int


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    near, far = free_ports(2)
    async with await asyncio.start_server(echo, "127.0.0.1", far):
        relay = Relay(Address("127.0.0.1", far))
        await relay.start(near)
        yield Line(relay, near)
        await relay.close()


async def connect(line: Line) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), WAIT_SECONDS) == b"hello"
    return reader, writer


async def test_bytes_pass_both_ways_and_so_does_the_end(line: Line) -> None:
    reader, writer = await connect(line)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    writer.close()


async def test_while_it_holds_nothing_passes_and_afterwards_all_of_it(line: Line) -> None:
    reader, writer = await connect(line)
    line.relay.hold()
    writer.write(b"first")
    _, new = await asyncio.open_connection("127.0.0.1", line.port)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), SHORT_SECONDS)
    line.relay.heal()
    assert await asyncio.wait_for(reader.readexactly(5), WAIT_SECONDS) == b"first"
    new.close()
    writer.close()


async def test_a_cut_resets_what_is_open_and_what_is_new(line: Line) -> None:
    reader, _ = await connect(line)
    line.relay.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), WAIT_SECONDS)
    with pytest.raises(OSError):  # noqa: PT011 - refused, reset or at its end: a kernel may say any of them
        await connect(line)
    line.relay.heal()
    _, writer = await connect(line)
    writer.close()


async def test_a_delay_makes_bytes_late_and_keeps_their_order(line: Line) -> None:
    reader, writer = await connect(line)
    line.relay.delay_seconds = SHORT_SECONDS
    started = time.monotonic()
    writer.write(b"one")
    writer.write(b"two")
    assert await asyncio.wait_for(reader.readexactly(6), WAIT_SECONDS) == b"onetwo"
    assert time.monotonic() - started >= 2 * SHORT_SECONDS, "there and back"
    writer.close()


async def test_a_throttle_bounds_the_bytes_a_second(line: Line) -> None:
    reader, writer = await connect(line)
    line.relay.bytes_per_second = 10_000
    started = time.monotonic()
    writer.write(b"x" * 4000)
    await asyncio.wait_for(reader.readexactly(4000), WAIT_SECONDS)
    assert time.monotonic() - started >= 0.35
    writer.close()


async def test_when_one_side_ends_so_does_the_other(line: Line) -> None:
    [nobody] = free_ports(1)
    relay = Relay(Address("127.0.0.1", nobody))
    [port] = free_ports(1)
    await relay.start(port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
    writer.close()
    await relay.close()
