"""Who asked: until when it waits for an answer, and whether it is still there."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive, Scope

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm.settings import GatewaySettings
from sfllm_gateway.http_io import ClientGoneError, header

TIMEOUT_HEADER = "X-Request-Timeout"

T = TypeVar("T")


def request_timeout(scope: Scope, settings: GatewaySettings) -> float:
    """Seconds that the client gives its request, from arrival to the last byte. Raises 400."""
    value = header(scope, TIMEOUT_HEADER.lower().encode())
    if value is None:
        return settings.request_timeout_seconds
    seconds = float(value) if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", value) else math.nan
    if not 0 < seconds < math.inf:
        raise ServiceError(
            ErrorCode.INVALID_REQUEST,
            f"{TIMEOUT_HEADER}: must be seconds as a decimal number above 0, got {quote(value)}",
            param=TIMEOUT_HEADER,
        )
    return min(seconds, settings.max_request_timeout_seconds)


class Client:
    """The client of one request, which must be answered by `deadline` (monotonic seconds).

    `receive` gives the body. From `watch` to `close` a task listens for the end of the connection;
    `on_gone` is called when it ends.
    """

    def __init__(self, receive: Receive, deadline: float) -> None:
        self.deadline = deadline
        self.gone = False
        self.on_gone: Callable[[], None] = _nothing
        self.receive = receive
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin to listen; nobody else may receive from now on."""
        self._task = asyncio.get_running_loop().create_task(self._listen())

    def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()

    async def wait_for(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when nobody waits for it any more.

        Raises `ClientGoneError`, or 504 when the deadline has passed.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()) as timer:

                def give_up() -> None:
                    if not timer.expired():
                        timer.reschedule(loop.time())

                self.on_gone = give_up
                if self.gone:
                    give_up()
                return await work
        except TimeoutError as error:
            if not timer.expired():
                raise  # a timeout of the work's own
            if self.gone:
                raise ClientGoneError from error
            raise ServiceError(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed before the request was submitted"
            ) from error
        finally:
            self.on_gone = _nothing

    async def _listen(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.on_gone()


def _nothing() -> None:
    """Nobody wants to know."""
