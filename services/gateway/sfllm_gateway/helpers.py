"""Helper processes for work that a request can make endless, huge or fatal: these can be killed.

A thread cannot be stopped, and what crashes in it takes the gateway along. So a few small processes
do such work, one job each at a time, and one that takes too long is replaced by a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from sfllm_gateway.job_loop import LENGTH

START_SECONDS = 30.0
WAIT_SECONDS = 30.0
END_SECONDS = 5.0


class HelperBusyError(Exception):
    """All helpers were at work for as long as anyone waits for one."""


class Helper:
    """One process, started with its first job. Owned by the pool, used by one request at a time."""

    def __init__(self, module: str, first_job: bytes) -> None:
        self._module = module
        self._first_job = first_job
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, job: bytes, seconds: float) -> bytes:
        """The result of a job. Raises `TimeoutError`, or `OSError` if the process ended; it is gone then."""
        try:
            process = await self._running()
            async with asyncio.timeout(seconds):
                return await _exchange(process, job)
        except BaseException as error:
            await self.close()  # its answer would be taken for that of the next request
            if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                raise OSError(f"the process {self._module} ended") from error
            raise

    async def close(self) -> None:
        """Kill the process."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        async with asyncio.timeout(END_SECONDS):
            await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the gateway, which still needs it to drain
            )
            async with asyncio.timeout(START_SECONDS):
                await _exchange(self._process, self._first_job)
        return self._process


async def _exchange(process: asyncio.subprocess.Process, job: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LENGTH.pack(len(job)) + job)
    await process.stdin.drain()
    (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return await process.stdout.readexactly(size)


class HelperPool:
    """Owns `count` processes that run a Python module, started when they are needed, until `close`.

    `first_job` is one that the module does at once: the time limit of jobs begins after it.
    """

    def __init__(self, module: str, first_job: bytes, count: int) -> None:
        self._helpers = [Helper(module, first_job) for _ in range(count)]
        self._idle: asyncio.LifoQueue[Helper] = asyncio.LifoQueue()
        for helper in self._helpers:
            self._idle.put_nowait(helper)

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[Helper]:
        """A helper of one's own for a while. Raises `HelperBusyError` after `WAIT_SECONDS`."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                helper = await self._idle.get()
        except TimeoutError as error:
            raise HelperBusyError from error
        try:
            yield helper
        finally:
            self._idle.put_nowait(helper)

    async def close(self) -> None:
        """Kill the processes."""
        await asyncio.gather(*(helper.close() for helper in self._helpers), return_exceptions=True)
