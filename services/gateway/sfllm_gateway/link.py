"""The link to the scheduler: one DEALER, drained from the event loop's reader callback.

The callback decodes a message and hands it to the stream that it belongs to; nothing
is queued per token. A timer says hello, beats, notices silence, and repeats submits
that nobody acknowledged. A libzmq descriptor is edge-triggered, so every send is
followed by another look at the socket.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

import structlog
import zmq

from sfllm import wire
from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import (
    SCHEDULER_TO_GATEWAY,
    Admitted,
    Finished,
    GatewayBeat,
    GatewayBye,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    Message,
    Models,
    ModelState,
    PromptLogprobs,
    Rejected,
    SchedulerBeat,
    Tokens,
)
from sfllm.sockets import DealerLink, OutboxFullError
from sfllm.token_batch import Logprobs, rows
from sfllm_gateway.stream import Outgoing, Request, Stream

HELLO_SECONDS = 1.0
SUBMIT_REPEAT_SECONDS = 2.0
TICK_SECONDS = 0.1
MESSAGES_PER_DRAIN = 256

log = structlog.get_logger()


class OpenStream:
    """A stream on the link, with what the link must remember of it. `wake` is called after each change."""

    __slots__ = ("deadline", "stream", "submitted_at", "wake")

    def __init__(self, stream: Stream, deadline: float, wake: Callable[[], None]) -> None:
        self.stream = stream
        self.deadline = deadline
        self.wake = wake
        self.submitted_at = 0.0


class SchedulerLink:
    """Owns the socket and the open streams from construction until `close`. One event loop only.

    `on_models` hears the list of models. `connected` says whether a scheduler answers.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        on_models: Callable[[Sequence[ModelState]], None],
        max_attempts: int,
    ) -> None:
        self.connected = False
        self._dealer = DealerLink(context, address, identity)
        self._decode = wire.decoder(SCHEDULER_TO_GATEWAY)
        self._on_models = on_models
        self._max_attempts = max_attempts
        self._own_epoch = secrets.randbits(62)
        self._scheduler_epoch: int | None = None
        self._streams: dict[int, OpenStream] = {}
        self._next_handle = 1
        self._hello_at = self._beat_at = float("-inf")
        self._heard_at = time.monotonic()
        self._beat_seconds, self._lease_seconds = 2.0, 6.0
        self._drain_scheduled = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._dealer.socket.fileno()
        self._loop.add_reader(self._descriptor, self._drain)
        self._timer = self._loop.call_soon(self._tick)

    # requests

    def open(self, request: Request, deadline: float, wake: Callable[[], None]) -> OpenStream:
        """Submit a request that must end by `deadline` (monotonic seconds). Raises 503 without scheduler."""
        if not self.connected:
            raise _unreachable()
        opened = OpenStream(Stream(self._next_handle, request, self._max_attempts), deadline, wake)
        self._next_handle += 1
        self._submit(opened)
        if not self.connected:  # it takes nothing any more
            raise _unreachable()
        self._streams[opened.stream.handle] = opened
        return opened

    def stop_choice(self, opened: OpenStream, choice: int, kept_tokens: int) -> None:
        """A stop string ended this choice."""
        outgoing = opened.stream.stop_choice(choice, kept_tokens)
        if outgoing is not None:
            self._send(outgoing)

    def release(self, opened: OpenStream, reason: str) -> None:
        """Forget a stream; one that has not ended is cancelled everywhere behind this link."""
        if self._streams.pop(opened.stream.handle, None) is not None and not opened.stream.ended:
            self._send(opened.stream.cancel(reason))

    def close(self) -> None:
        """Say goodbye and close the socket."""
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._send(Outgoing(GatewayBye(self._own_epoch)))
        self._dealer.close()

    # sending

    def _send(self, outgoing: Outgoing) -> None:
        """Send, or keep for when the scheduler takes it; a scheduler that takes too little is given up."""
        try:
            self._dealer.send(wire.encode(outgoing.message, *outgoing.arrays))
        except OutboxFullError as error:
            self._lose(str(error))
            return
        if not self._drain_scheduled and not self._closed:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _submit(self, opened: OpenStream) -> None:
        now = time.monotonic()
        opened.submitted_at = now
        self._send(opened.stream.submit(int((opened.deadline - now) * 1000)))

    def _submit_again(self, opened: OpenStream, counts: bool) -> None:
        """Go on with the next attempt after the present one was lost."""
        stream = opened.stream
        if stream.next_attempt(counts):
            log.info("submitting again", request_id=stream.request.request_id, attempt=stream.attempt)
            self._submit(opened)
        opened.wake()

    def _hello(self) -> None:
        self._hello_at = time.monotonic()
        self._send(Outgoing(GatewayHello(self._own_epoch)))

    # time

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self._drain()  # after a pause of this process, silence is judged by what waits in the socket
        now = time.monotonic()
        if self.connected and now - self._heard_at > self._lease_seconds:
            self._lose(f"nothing heard for {self._lease_seconds:g} s")
        if not self.connected:
            if now - self._hello_at >= HELLO_SECONDS:
                self._dealer.clear()
                self._hello()
            return
        if now - self._beat_at >= self._beat_seconds:
            self._beat_at = now
            self._send(Outgoing(GatewayBeat(self._own_epoch)))
        for opened in self._streams.values():
            waiting = not opened.stream.admitted and not opened.stream.ended
            if waiting and now - opened.submitted_at >= SUBMIT_REPEAT_SECONDS:
                self._submit(opened)

    def _lose(self, reason: str) -> None:
        log.warning("scheduler lost", reason=reason, open_requests=len(self._streams))
        self.connected = False
        self._dealer.clear()
        self._hello_at = float("-inf")

    # receiving

    def _drain(self) -> None:
        """Take what arrived, but let the loop do other work when there is much."""
        self._drain_scheduled = False
        if self._closed:
            return
        self._dealer.flush()
        for _ in range(MESSAGES_PER_DRAIN):
            frames = self._dealer.receive()
            if frames is None:
                return
            self._heard_at = time.monotonic()
            try:
                decoded = self._decode(frames)
                self._take(decoded.message, decoded.arrays)
            except wire.WireError as error:
                log.warning("malformed message from the scheduler", reason=str(error))
        self._drain_scheduled = True
        self._loop.call_soon(self._drain)

    def _take(self, message: Message, arrays: tuple[wire.Array, ...]) -> None:
        match message:
            case Tokens():
                self._take_tokens(arrays)
            case GatewayWelcome():
                self._take_welcome(message)
            case SchedulerBeat():
                if self.connected and message.epoch != self._scheduler_epoch:
                    self._lose("another scheduler beats")
                    self._tick_now()
            case Models():
                self._on_models(message.models)
            case PromptLogprobs():
                self._take_prompt_logprobs(message, arrays)
            case Admitted() | Rejected() | Finished() | Interrupted():
                opened = self._streams.get(message.handle)
                if opened is not None:
                    self._take_reply(opened, message)
            case _:
                raise wire.WireError(f"unexpected {type(message).__name__}")

    def _take_tokens(self, arrays: tuple[wire.Array, ...]) -> None:
        for row in rows(arrays):
            opened = self._streams.get(row.handle)
            if opened is None:
                continue
            if opened.stream.on_tokens(row.attempt, row.choice, row.start, row.ids, row.logprobs):
                opened.wake()
            else:
                self._restart(opened)

    def _take_prompt_logprobs(self, message: PromptLogprobs, arrays: tuple[wire.Array, ...]) -> None:
        ids, values = arrays
        if message.width < 1 or message.start < 1 or len(ids) != len(values) or len(ids) % message.width:
            raise wire.WireError("prompt log probabilities that do not fit together")
        opened = self._streams.get(message.handle)
        if opened is None:
            return
        found = Logprobs(message.width, ids, values)
        if opened.stream.on_prompt_logprobs(message.attempt, message.start, found):
            opened.wake()
        else:
            self._restart(opened)

    def _take_reply(self, opened: OpenStream, message: Admitted | Rejected | Finished | Interrupted) -> None:
        stream = opened.stream
        match message:
            case Admitted():
                stream.on_admitted(message.attempt)
            case Rejected():
                stream.on_rejected(message)
            case Interrupted():
                if stream.on_interrupted(message):
                    self._submit_again(opened, counts=True)
            case Finished():
                if not stream.on_finished(message):
                    self._restart(opened)
        opened.wake()

    def _restart(self, opened: OpenStream) -> None:
        """Tokens are missing: end this attempt and begin the next."""
        log.warning("tokens are missing", request_id=opened.stream.request.request_id)
        self._send(opened.stream.cancel("gap"))
        self._submit_again(opened, counts=True)

    def _take_welcome(self, message: GatewayWelcome) -> None:
        """The answer to a hello, or a sign that the scheduler does not know this gateway."""
        if self.connected:
            known = message.epoch == self._scheduler_epoch
            if not known or time.monotonic() - self._hello_at > 2 * HELLO_SECONDS:
                self._lose("the scheduler does not know this gateway")
                self._tick_now()
            return
        log.info("scheduler found", epoch=message.epoch, open_requests=len(self._streams))
        self.connected = True
        self._scheduler_epoch = message.epoch
        self._beat_seconds, self._lease_seconds = message.beat_seconds, message.lease_seconds
        self._beat_at = time.monotonic()
        for opened in list(self._streams.values()):
            if not opened.stream.ended:
                self._submit_again(opened, counts=False)

    def _tick_now(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_soon(self._tick)


def _unreachable() -> ServiceError:
    return ServiceError(
        ErrorCode.SERVICE_UNAVAILABLE, "the scheduler cannot be reached", retry_after_seconds=1
    )
