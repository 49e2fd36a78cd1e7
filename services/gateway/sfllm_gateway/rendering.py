"""Chat templates run in processes of their own, which can be killed.

A template is a program that came with a model, and its arguments come with requests: it may
take for ever or fill the memory, and a thread cannot be stopped. So a few small processes
(`render_process.py`) render, one request each at a time, and one that takes too long is
replaced by a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

import msgspec
import structlog

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.prompt import LENGTH, RenderJob, RenderResult

PROCESSES = 2
RENDER_SECONDS = 5.0
START_SECONDS = 30.0
WAIT_SECONDS = 30.0
END_SECONDS = 5.0

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(RenderResult)


class _Renderer:
    """One process. Owned by the pool, used by one request at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, job: bytes) -> RenderResult:
        """The result of a job. Raises `TimeoutError`, or `OSError` if the process ended; it is gone then."""
        try:
            process = await self._running()
            async with asyncio.timeout(RENDER_SECONDS):
                return await _exchange(process, job)
        except BaseException as error:
            await self.close()  # its answer would be taken for that of the next request
            if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                raise OSError("the process that renders chat templates ended") from error
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
                *(sys.executable, "-m", "sfllm_gateway.render_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the gateway, which still needs it to drain
            )
            async with asyncio.timeout(START_SECONDS):
                await _exchange(self._process, _encode(RenderJob("", {})))
        return self._process


async def _exchange(process: asyncio.subprocess.Process, job: bytes) -> RenderResult:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LENGTH.pack(len(job)) + job)
    await process.stdin.drain()
    (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return _decoder.decode(await process.stdout.readexactly(size))


class RenderPool:
    """Renders chat templates. Owns its processes, started when they are needed, until `close`."""

    def __init__(self) -> None:
        self._renderers = [_Renderer() for _ in range(PROCESSES)]
        self._idle: asyncio.LifoQueue[_Renderer] = asyncio.LifoQueue()
        for renderer in self._renderers:
            self._idle.put_nowait(renderer)

    async def render(self, job: RenderJob) -> RenderResult:
        """What came of a job. Raises `ServiceError` (400) if it cannot be done in bounded time and memory."""
        try:
            encoded = _encode(job)
        except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
            raise _refused(f"they cannot be passed on ({error})") from error
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                renderer = await self._idle.get()
        except TimeoutError as error:
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE, "too many chats wait for their template", retry_after_seconds=1
            ) from error
        try:
            return await renderer.render(encoded)
        except TimeoutError as error:
            log.warning("chat template takes too long, its process was killed")
            raise _refused(f"rendering takes longer than {RENDER_SECONDS:g} s") from error
        except OSError as error:
            log.warning("chat template not rendered", reason=str(error))
            raise _refused("rendering them needs too much") from error
        finally:
            self._idle.put_nowait(renderer)

    async def close(self) -> None:
        """Kill the processes."""
        await asyncio.gather(*(renderer.close() for renderer in self._renderers), return_exceptions=True)


class ChatTemplate:
    """One model's template. `special_tokens` are names such as `bos_token` with their text."""

    def __init__(self, pool: RenderPool, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._pool = pool
        self._special_tokens = special_tokens

    async def problem(self) -> str | None:
        """Why the template does not compile, None if it does."""
        return (await self._pool.render(RenderJob(self.source, self._special_tokens))).syntax_error

    async def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The prompt; `options` are further fields of `RenderJob`. Raises `ServiceError` (400) if refused."""
        result = await self._pool.render(RenderJob(self.source, self._special_tokens, messages, **options))
        if result.text is None:
            raise ServiceError(ErrorCode.INVALID_REQUEST, result.error, param=result.param)
        return result.text


def _refused(reason: str) -> ServiceError:
    return ServiceError(
        ErrorCode.INVALID_REQUEST,
        f"the model's chat template cannot render these messages: {reason}",
        param="messages",
    )
