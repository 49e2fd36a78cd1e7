"""The life of one generation request: submit, wait, write, and leave nothing behind.

The HTTP status goes out when every prompt was admitted. After that the session sleeps
until its streams have something, reads all that came since, and writes it at once: a
slow client costs fewer, larger events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from io import StringIO
from typing import NamedTuple

import structlog
from starlette.types import Send

from sfllm.settings import GatewaySettings
from sfllm_gateway.choice import Choice, cached_tokens
from sfllm_gateway.client import Client
from sfllm_gateway.failures import as_service_error
from sfllm_gateway.generation import Answer, Generation, Usage
from sfllm_gateway.http_io import (
    EVENT_HEADERS,
    JSON_HEADERS,
    KEEP_ALIVE,
    ClientGoneError,
    Headers,
    send_answer,
)
from sfllm_gateway.links import SchedulerLinks
from sfllm_gateway.meter import RequestMeter
from sfllm_gateway.metrics import GatewayMetrics
from sfllm_gateway.stream import Request
from sfllm_gateway.streams import DEADLINE_GRACE_SECONDS, OpenStream
from sfllm_gateway.traces import RequestTrace

WRITE_TOKENS = 4096
"""Tokens, those reported with log probabilities included, that are made into text at once. A client that
reads again after a pause must not hold up the others with all that it missed."""

STALLED_CLIENT_SECONDS = 60.0
"""A client that takes nothing for so long is cut off."""

log = structlog.get_logger()


class SessionContext(NamedTuple):
    """What all sessions of a gateway share."""

    links: SchedulerLinks
    metrics: GatewayMetrics
    settings: GatewaySettings


class Session:
    """One request from submission to its last byte. `fail` may be called from outside to end it."""

    def __init__(
        self,
        context: SessionContext,
        generation: Generation,
        answer: Answer,
        request_id: str,
        arrived: float,
        abort: Callable[[], None],
        trace: RequestTrace | None = None,
    ) -> None:
        self._links, metrics, self._settings = context
        self._meter = RequestMeter(metrics, generation.model.card.name, request_id, arrived)
        self._generation = generation
        self._answer = answer
        self._request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._opened: list[OpenStream] = []
        self._choices: list[Choice] = []
        self._failure: Exception | None = None
        self._turn = 0
        self._awake = False
        self._waiter: asyncio.Future[None] | None = None
        self._quiet_since = time.monotonic()
        self._sending_since: float | None = None
        self._abort = abort
        self._trace = trace

    async def run(self, client: Client, send: Send, headers: Headers = ()) -> None:
        """Serve the request. Raises `ServiceError` if it failed before anything was sent."""
        self._send = send
        self._timer = self._loop.call_later(self._timer_seconds(), self._watch_time, client.deadline)
        client.on_gone = lambda: self.fail(ClientGoneError())
        try:
            if client.gone:
                raise ClientGoneError
            self._submit(client.deadline)
            await self._until_admitted()
            if self._generation.stream:
                await self._write_stream(headers)
            else:
                await self._write_whole(headers)
        except ClientGoneError:
            self._meter.client_left()
        finally:
            self._timer.cancel()
            for opened in self._opened:
                self._links.release(opened, "request ended")
            self._record_end()

    def fail(self, error: Exception) -> None:
        """End the request with `error`, unless it ends by itself before that is noticed."""
        if self._failure is None:
            self._failure = error
        self._wake()

    # what wakes a session

    def _wake(self) -> None:
        self._awake = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _sleep(self) -> None:
        """Until something happened since the last call."""
        if not self._awake:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        self._awake = False

    def _timer_seconds(self) -> float:
        return min(self._settings.keep_alive_seconds, DEADLINE_GRACE_SECONDS)

    def _watch_time(self, deadline: float) -> None:
        """Once a second or more often: a stream that is silent, a client that is stuck."""
        now = time.monotonic()
        self._timer = self._loop.call_later(self._timer_seconds(), self._watch_time, deadline)
        if self._sending_since is not None:
            last = min(self._sending_since + STALLED_CLIENT_SECONDS, deadline + DEADLINE_GRACE_SECONDS)
            if now > last:
                log.warning("the client takes nothing, connection cut off", request_id=self._request_id)
                self._failure = ClientGoneError()
                self._abort()  # the send that waits returns
        elif now - self._quiet_since >= self._settings.keep_alive_seconds:
            self._wake()

    # from streams to updates

    def _submit(self, deadline: float) -> None:
        generation = self._generation
        for prompt, sampling in zip(generation.prompts, generation.samplings, strict=True):
            number = len(self._opened)
            wire_id = self._request_id if number == 0 else f"{self._request_id}-{number}"
            request = Request(
                wire_id,
                generation.model.card.name,
                prompt,
                generation.n,
                sampling,
                generation.priority,
                generation.cache_salt,
                generation.tenant,
                "" if self._trace is None else self._trace.traceparent,
            )
            opened = self._links.open(request, deadline, self._wake)
            self._opened.append(opened)
            first = number * generation.n
            self._choices += [Choice(first + choice, generation, opened) for choice in range(generation.n)]

    async def _until_admitted(self) -> None:
        while not all(opened.stream.ever_admitted for opened in self._opened):
            await self._sleep()
            self._raise_failure()
        self._meter.admitted(sum(map(len, self._generation.prompts)), self._generation.n)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        for opened in self._opened:
            if opened.stream.error is not None:
                raise opened.stream.error

    def _read(self) -> list[tuple[Choice, str]]:
        """The choices that have news, with the text since the last call, as far as it goes into one write."""
        news = []
        now = time.monotonic()
        token_cost = 1 if self._generation.logprobs is None else self._generation.logprobs + 2
        left = WRITE_TOKENS // token_cost
        for choice in [*self._choices[self._turn :], *self._choices[: self._turn]]:
            output = choice.output
            if output.finished or not output.unread:
                continue
            advance = output.advance(left)
            if advance.kept_tokens is not None:
                self._links.stop_choice(choice.opened, choice.number, advance.kept_tokens)
            if advance.tokens:
                choice.tokens += advance.tokens
                self._meter.tokens(advance.tokens, now - choice.last_at if choice.last_at else None)
                choice.last_at = now
            if advance.text or output.finished:
                news.append((choice, advance.text))
            left -= advance.tokens
            if left < 1:  # the next call goes on with the next choice, without waiting for news
                self._turn = (choice.index + 1) % len(self._choices)
                self._awake = True
                break
        if news and self._trace is not None:
            self._trace.made_text(now, time.monotonic())
        return news

    def _usage(self) -> Usage:
        return Usage(
            sum(map(len, self._generation.prompts)),
            sum(choice.tokens for choice in self._choices),
            sum(map(cached_tokens, self._opened)),
        )

    @property
    def _complete(self) -> bool:
        return all(choice.output.finished for choice in self._choices)

    # writing

    async def _write_stream(self, headers: Headers) -> None:
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": [*EVENT_HEADERS, *headers]}
        )
        try:
            await self._write(self._answer.first(len(self._choices)))
            while not self._complete:
                news = self._read()
                if news:
                    events = [self._answer.event(choice.update(text)) for choice, text in news]
                    await self._write(b"".join(events))
                    # Without a wake meanwhile there is no more to read, and nothing has failed.
                    if self._failure is None and (self._awake or self._complete):
                        continue
                self._raise_failure()
                await self._sleep()
                if time.monotonic() - self._quiet_since >= self._settings.keep_alive_seconds:
                    await self._write(KEEP_ALIVE)
            end = self._answer.last(self._usage())
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - a stream that began ends in the agreed way
            failure = as_service_error(error, self._request_id)
            if self._trace is not None:
                self._trace.failed(failure)
            end = self._answer.failed(failure)
        await self._write(end, more=False)

    async def _write(self, body: bytes, more: bool = True) -> None:
        if not body and more:
            return
        self._sending_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._sent()

    def _sent(self) -> None:
        self._sending_since = None
        self._quiet_since = time.monotonic()
        if isinstance(self._failure, ClientGoneError):  # a send to nobody returns like any other
            raise self._failure

    async def _write_whole(self, headers: Headers) -> None:
        texts = [StringIO() for _ in self._choices]  # until the end, journals are the most compact form of it
        while not self._complete:
            news = self._read()
            for choice, text in news:
                texts[choice.index].write(text)
            if not news:
                self._raise_failure()
                await self._sleep()
        updates = [choice.update(texts[choice.index].getvalue()) for choice in self._choices]
        body = self._answer.whole(updates, self._usage())
        del updates
        self._sending_since = time.monotonic()
        await send_answer(self._send, 200, [*JSON_HEADERS, *headers], body)
        self._sent()

    def _record_end(self) -> None:
        """Measure and log how it went."""
        finished = [opened.stream.last_finished for opened in self._opened]
        reasons = [
            (choice.output.journal.finish_reason or "") if choice.output.finished else self._failure_kind()
            for choice in self._choices
        ]
        self._meter.ended(
            self._usage(),
            reasons,
            [message.timings for message in finished if message is not None],
            migrations=sum(opened.stream.migrations for opened in self._opened),
            longest=max((choice.tokens for choice in self._choices), default=0),
        )
        if self._trace is not None:
            lost = [attempt for opened in self._opened for attempt in opened.lost]
            self._trace.generated(self._usage(), reasons, lost)

    def _failure_kind(self) -> str:
        return "abort" if isinstance(self._failure, ClientGoneError) else "error"
