"""HTTP/1.1 as a client that decides itself when to read, when to leave, and how.

A library would reconnect, buffer and tidy up by itself; here each of these is a case to be tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

LARGEST_LINE_BYTES = 2**22
CONNECT_SECONDS = 30.0


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class BrokenConnectionError(ConnectionError):
    """The server ended the connection before the answer was complete."""


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset: what waits on either side is gone."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):  # it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Answer:
    """A status, headers (lower-case names), and a body that is read piece by piece, once."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises `BrokenConnectionError` when it ends early."""
        if self.headers.get("transfer-encoding") != "chunked":
            length = int(self.headers.get("content-length", "0"))
            if length:
                yield await _exactly(self._reader, length)
            return
        while size := int(await _line(self._reader), 16):
            yield (await _exactly(self._reader, size + 2))[:-2]
        await _exactly(self._reader, 2)

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events; comments are left out."""
        rest = b""
        async for piece in self.pieces():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:]


class Connection:
    """A connection for one request after another. Owns its socket until `close` or `abort`."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address, receive_buffer_bytes: int = 0) -> Connection:
        """Connect. Raises OSError or TimeoutError. A small buffer makes a slow reader felt at once."""
        connection = socket.socket()
        connection.setblocking(False)
        try:
            if receive_buffer_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, address)
            limit = receive_buffer_bytes or LARGEST_LINE_BYTES
            return cls(address, *await asyncio.open_connection(sock=connection, limit=limit))
        except BaseException:
            connection.close()
            raise

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request and read the head of its answer. Raises `BrokenConnectionError`."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._address.host}",
            f"Content-Length: {len(content)}",
        ]
        if content:
            lines.append("Content-Type: application/json")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        try:
            self._writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            await self._writer.drain()
        except ConnectionError as error:
            raise BrokenConnectionError(str(error)) from error
        status = int((await _line(self._reader)).split()[1])
        found: dict[str, str] = {}
        while line := await _line(self._reader):
            name, _, value = line.partition(b":")
            found[name.decode().lower()] = value.strip().decode("latin-1")
        return Answer(status, found, self._reader)

    def abort(self) -> None:
        """Leave without a farewell: the server gets a reset, and what was not read is gone."""
        reset(self._writer)

    def close(self) -> None:
        """Close in the usual way."""
        self._writer.close()


async def get(address: Address, path: str, seconds: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own. Raises OSError or TimeoutError."""
    async with asyncio.timeout(seconds):
        connection = await Connection.open(address)
        try:
            answer = await connection.request("GET", path)
            return answer.status, await answer.body()
        finally:
            connection.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\r\n"))[:-2]
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise BrokenConnectionError(f"the connection ended: {error}") from error


async def _exactly(reader: asyncio.StreamReader, count: int) -> bytes:
    try:
        return await reader.readexactly(count)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise BrokenConnectionError(f"the connection ended: {error}") from error
