"""What one gateway remembers of requests with an idempotency key: who has one in hand, and recent answers."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.types import Message, Send

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.http_io import JSON_HEADERS, Headers, send_answer
from sfllm_gateway.idempotency import KEY_HEADER, Attempt

ENTRY_BYTES = 1024
"""What an answer costs here beside its body."""

REPLAYED: Headers = ((b"idempotent-replayed", b"true"),)


class Kept(NamedTuple):
    """A whole answer, as it was sent."""

    status: int
    headers: Headers
    body: bytes


class _Entry(NamedTuple):
    content: bytes
    answer: Kept | None
    until: float
    size: int


class AnswerMemory:
    """Recent answers by owner, at most `limit` bytes of them, each for `seconds`. Pure.

    Of an answer that was streamed only that it was asked for is known. Invariant: `size` is the sum of
    the entries' sizes, at most `limit`.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self.size = 0
        self._limit = limit
        self._seconds = seconds
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def find(self, attempt: Attempt, now: float) -> Kept | None:
        """The answer to the same request, if it is here at `now` (seconds). Raises 400 for a reused key."""
        while self._entries and next(iter(self._entries.values())).until <= now:
            self._drop_oldest()
        entry = self._entries.get(attempt.owner)
        if entry is None:
            return None
        check_same(attempt, entry.content)
        return entry.answer

    def keep(self, attempt: Attempt, answer: Kept | None, now: float) -> None:
        """Remember an answer, and forget the oldest ones as far as there is no room."""
        size = ENTRY_BYTES + (0 if answer is None else len(answer.body))
        before = self._entries.pop(attempt.owner, None)
        self.size -= 0 if before is None else before.size
        if size > self._limit:
            return
        while self.size + size > self._limit:
            self._drop_oldest()
        self._entries[attempt.owner] = _Entry(attempt.content, answer, now + self._seconds, size)
        self.size += size

    def _drop_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self.size -= entry.size


def check_same(attempt: Attempt, content: bytes) -> None:
    """Raise 400 unless the key was used for the same request before."""
    if attempt.content != content:
        raise ServiceError(
            ErrorCode.IDEMPOTENCY_KEY_REUSED,
            f"{KEY_HEADER}: this key was used for another request: it names one path and one body",
            param=KEY_HEADER,
        )


class _Running(NamedTuple):
    content: bytes
    ended: asyncio.Event


class Turns:
    """Lets one attempt of a request run at a time; those that come meanwhile wait for its answer."""

    def __init__(self, memory: AnswerMemory, clock: Callable[[], float] = time.monotonic) -> None:
        self.memory = memory
        self._clock = clock
        self._running: dict[bytes, _Running] = {}

    @asynccontextmanager
    async def take(self, attempt: Attempt) -> AsyncIterator[None]:
        """The turn of an attempt that `wait` found no answer for. Whoever waits goes on when it ends."""
        assert attempt.owner not in self._running
        running = self._running[attempt.owner] = _Running(attempt.content, asyncio.Event())
        try:
            yield
        finally:
            del self._running[attempt.owner]
            running.ended.set()

    async def wait(self, attempt: Attempt) -> Kept | None:
        """The answer to the same request; None when it is this attempt's turn, now, to find it.

        Raises 400 for a key that another request has or had.
        """
        while (running := self._running.get(attempt.owner)) is not None:
            check_same(attempt, running.content)
            await running.ended.wait()
        return self.memory.find(attempt, self._clock())

    def keep(self, attempt: Attempt, answer: Kept | None) -> None:
        """Remember what an attempt was answered, None for a stream."""
        self.memory.keep(attempt, answer, self._clock())


class Recorder:
    """Passes an answer on. `kept` is a copy of it once it is whole and good, unless it is a stream."""

    def __init__(self, send: Send) -> None:
        self.kept: Kept | None = None
        self._send = send
        self._status = 0
        self._headers: Headers = ()

    async def __call__(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            # A copy: layers further out add headers of their own, which a replay gets again.
            self._status, self._headers = message["status"], tuple(message["headers"])
        elif self._status == 200 and JSON_HEADERS[0] in self._headers:
            self.kept = Kept(self._status, self._headers, message["body"])
        await self._send(message)


async def replay(kept: Kept, send: Send) -> None:
    """Send an answer once more."""
    headers = [pair for pair in kept.headers if pair[0] != b"content-length"]
    await send_answer(send, kept.status, [*headers, *REPLAYED], kept.body)
