"""A TCP relay between two services that can misbehave like a network."""

from __future__ import annotations

import asyncio

from chaos.http_client import Address, reset

PIECE_BYTES = 16 * 2**10
PIECES_UNDER_WAY = 64


class Relay:
    """Forwards connections to `target` from a port of its own. Owns all sockets from `start` to `close`.

    - `hold`: nothing moves and nobody is told, as behind an unplugged cable; new connections are taken
      but lead nowhere. What waited goes on after `heal`, late, as TCP would send it again.
    - `cut`: all connections are reset, and so is each new one.
    - `delay_seconds` passes between the arrival of a byte and its leaving; `bytes_per_second` bounds a
      direction of a connection.
    """

    def __init__(self, target: Address) -> None:
        self.delay_seconds = 0.0
        self.bytes_per_second = float("inf")
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._cut = False

    async def start(self, port: int) -> None:
        """Listen on `port` of loopback. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=PIECE_BYTES)

    def hold(self) -> None:
        """Let nothing through until `heal`."""
        self._flowing.clear()

    def cut(self) -> None:
        """Reset every connection, and each new one until `heal`."""
        self._cut = True
        for task in self._tasks:
            task.cancel()

    def heal(self) -> None:
        """Forward as fast as possible again."""
        self._cut = False
        self.delay_seconds = 0.0
        self.bytes_per_second = float("inf")
        self._flowing.set()

    async def close(self) -> None:
        """End all connections and free the port."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from its first byte to its last; when one side ends, so does the other."""
        writers = [writer]
        try:
            if not self._cut:
                await self._flowing.wait()
                far_reader, far_writer = await asyncio.open_connection(*self._target, limit=PIECE_BYTES)
                writers.append(far_writer)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, far_writer))
                    group.create_task(self._pump(far_reader, writer))
        except* OSError:
            pass  # one side is gone, or was never there: the other is told below
        finally:
            for each in writers:
                if self._cut:
                    reset(each)
                else:
                    each.close()  # after what waits has left

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one direction until its end. Raises OSError when either side breaks."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_UNDER_WAY)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(reader, under_way))
            group.create_task(self._give(under_way, writer))

    async def _take(
        self, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(PIECE_BYTES):
            await under_way.put((loop.time() + self.delay_seconds, data))
        await under_way.put((loop.time() + self.delay_seconds, b""))

    async def _give(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await under_way.get()
            if self.delay_seconds:
                await asyncio.sleep(due - loop.time())
            await self._flowing.wait()
            if not data:
                raise ConnectionAbortedError("one side has closed")
            await asyncio.sleep(len(data) / self.bytes_per_second)
            writer.write(data)
            await writer.drain()
