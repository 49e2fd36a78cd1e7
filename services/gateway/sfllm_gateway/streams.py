"""The streams of a gateway at one scheduler, and what it knows of that: a machine of messages and times.

Messages and the time come in, messages go out; no socket, clock or loop in here, so that the same code
runs in a gateway and in a simulation. `now` is in seconds on a clock that never goes back.

Whatever is lost, doubled, late or out of order on the way, the next beat shows it: it carries a
digest of the choices that are open here, and the scheduler asks for the list when it has others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sfllm import wire
from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import (
    Admitted,
    Finished,
    GatewayBeat,
    GatewayBye,
    GatewayHeld,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    ListHeld,
    Message,
    Models,
    ModelState,
    PromptLogprobs,
    Rejected,
    SchedulerBeat,
    Tokens,
)
from sfllm.token_batch import Logprobs, rows
from sfllm.traceparent import log_fields
from sfllm_gateway.held import HeldChoices
from sfllm_gateway.stream import Gap, Outgoing, Request, Stream

HELLO_SECONDS = 1.0
SUBMIT_REPEAT_SECONDS = 2.0
RESTART_SECONDS = 2.0
"""A stream whose tokens get lost begins another attempt at most so often, or a burst would use them up."""

DEADLINE_GRACE_SECONDS = 1.0
"""The scheduler ends what is late; after so long the gateway does it alone."""


MAX_LOST = 16


class ClearOutbox:
    """Goes out in place of a message: forget what still waits for the scheduler, which is gone."""


CLEAR_OUTBOX = ClearOutbox()


class LostAttempt(NamedTuple):
    """An attempt that another had to follow: which, why, and from when to when (the table's seconds)."""

    attempt: int
    cause: str
    started: float
    ended: float


class OpenStream:
    """A stream in the table, with what the table must remember of it. `wake` is called after each change.

    `deadline` and `opened_at` are seconds on the table's clock. `restart_due`: tokens are missing, and
    from `restart_from` on it may begin another attempt because of that. `lost` are its last lost attempts,
    if it is traced.
    """

    __slots__ = (
        *("deadline", "lost", "opened_at", "restart_due", "restart_from"),
        *("stream", "submitted_at", "wake"),
    )

    def __init__(self, stream: Stream, deadline: float, now: float, wake: Callable[[], None]) -> None:
        self.stream = stream
        self.deadline = deadline
        self.wake = wake
        self.opened_at = self.submitted_at = self.restart_from = now
        self.restart_due = False
        self.lost: deque[LostAttempt] = deque(maxlen=MAX_LOST)


class StreamTable:
    """The streams of the gateway with the routing id `identity`, whose process start is `epoch`.

    `on_models` hears the list of models, `note` what is worth a line in a log: an event and its fields.
    `connected` says whether a scheduler answers. Tables between which streams move share `handles`.
    """

    def __init__(
        self,
        identity: bytes,
        epoch: int,
        max_attempts: int,
        on_models: Callable[[Sequence[ModelState]], None],
        note: Callable[[str, dict[str, object]], None] = lambda _event, _fields: None,
        handles: Iterator[int] | None = None,
    ) -> None:
        self.connected = False
        self._epoch = epoch
        self._max_attempts = max_attempts
        self._on_models = on_models
        self._note = note
        self._scheduler_epoch: int | None = None
        self._streams: dict[int, OpenStream] = {}
        self._held = HeldChoices(identity)
        self._outgoing: list[Outgoing | ClearOutbox] = []
        self._handles = itertools.count(1) if handles is None else handles
        self._hello_at = self._beat_at = self._heard_at = float("-inf")
        self._beat_seconds, self._lease_seconds = 2.0, 6.0

    @property
    def digest(self) -> int:
        """Of all choices that are open here, as beats carry it."""
        return self._held.digest

    # requests

    def open(self, request: Request, deadline: float, now: float, wake: Callable[[], None]) -> OpenStream:
        """Submit a request that must end by `deadline`. Raises 503 without scheduler."""
        if not self.connected:
            raise unreachable()
        opened = OpenStream(Stream(next(self._handles), request, self._max_attempts), deadline, now, wake)
        self._streams[opened.stream.handle] = opened
        self._hold(opened.stream)
        self._submit(opened, now)
        return opened

    def stop_choice(self, opened: OpenStream, choice: int, kept_tokens: int, now: float) -> None:  # noqa: ARG002 - every input has its time
        """A stop string ended this choice."""
        outgoing = opened.stream.stop_choice(choice, kept_tokens)
        if outgoing is not None and self._has(opened):
            self._hold(opened.stream)
            self._send(outgoing)

    def release(self, opened: OpenStream, reason: str, now: float) -> None:  # noqa: ARG002 - as above
        """Forget a stream; one that has not ended is cancelled everywhere behind this link."""
        if not self._has(opened):
            return
        stream = opened.stream
        del self._streams[stream.handle]
        self._held.set(stream.handle, stream.attempt, ())
        if not stream.ended:
            self._send(stream.cancel(reason))

    def adopt(self, opened: OpenStream, now: float) -> None:
        """Go on with a stream that another table has released: its next attempt is made here."""
        self._streams[opened.stream.handle] = opened
        if opened.stream.restart(counts=False):
            self._submit_next(opened, "another scheduler", now)
        self._changed(opened)

    def streams(self) -> list[OpenStream]:
        """All that are not released."""
        return list(self._streams.values())

    def find(self, handle: int) -> OpenStream | None:
        """The stream of that handle, if it is here."""
        return self._streams.get(handle)

    def bye(self) -> None:
        """The gateway leaves."""
        self._outgoing.append(Outgoing(GatewayBye(self._epoch)))

    # sending

    def take_outgoing(self) -> list[Outgoing | ClearOutbox]:
        """What is to be sent, in order; each is given once."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def _send(self, outgoing: Outgoing) -> None:
        """Without a scheduler there is nobody to tell: the welcome of the next one begins anew."""
        if self.connected:
            self._outgoing.append(outgoing)

    def _submit(self, opened: OpenStream, now: float) -> None:
        opened.submitted_at = now
        left, age = opened.deadline - now, now - opened.opened_at
        self._send(opened.stream.submit(int(left * 1000), int(age * 1000)))

    def _hello(self, now: float) -> None:
        self._hello_at = now
        self._outgoing = [CLEAR_OUTBOX, Outgoing(GatewayHello(self._epoch))]

    # time

    def tick(self, now: float) -> None:
        """Do what time brings. Due several times a second, after all messages that had come by then."""
        for opened in list(self._streams.values()):
            self._watch(opened, now)
        if self.connected and now - self._heard_at > self._lease_seconds:
            self.lose(f"nothing heard for {self._lease_seconds:g} s")
        if not self.connected:
            if now - self._hello_at >= HELLO_SECONDS:
                self._hello(now)
        elif now - self._beat_at >= self._beat_seconds:
            self._beat_at = now
            self._send(Outgoing(GatewayBeat(self._epoch, self.digest)))

    def lose(self, reason: str) -> None:
        """Give the scheduler up; the next tick says hello to whoever is there."""
        self._note("scheduler lost", {"reason": reason, "open_requests": len(self._streams)})
        self.connected = False
        self._outgoing = [CLEAR_OUTBOX]
        self._hello_at = float("-inf")

    def _watch(self, opened: OpenStream, now: float) -> None:
        """One stream's deadline, and the answers that it waits for."""
        stream = opened.stream
        if stream.ended:
            return
        if now > opened.deadline + DEADLINE_GRACE_SECONDS:
            self._send(stream.cancel("deadline"))
            stream.on_deadline()
            self._changed(opened)
        elif not self.connected:
            return
        elif opened.restart_due or stream.resend_failed(now):
            self._restart(opened, now)
        elif not stream.admitted and now - opened.submitted_at >= SUBMIT_REPEAT_SECONDS:
            self._submit(opened, now)

    # receiving

    def handle(self, message: Message, arrays: Sequence[wire.Array], now: float) -> None:
        """Take a message of the scheduler. Raises `WireError` for one that makes no sense."""
        self._heard_at = now
        match message:
            case Tokens():
                self._take_tokens(arrays, now)
            case GatewayWelcome():
                self._take_welcome(message, now)
            case SchedulerBeat():
                if self.connected and message.epoch != self._scheduler_epoch:
                    self.lose("another scheduler beats")
                    self._hello(now)
            case ListHeld():
                self._send(Outgoing(GatewayHeld(message.number), self._held.arrays()))
            case Models():
                self._on_models(message.models)
            case PromptLogprobs():
                self._take_prompt_logprobs(message, arrays, now)
            case Admitted() | Rejected() | Finished() | Interrupted():
                opened = self._streams.get(message.handle)
                if opened is not None:
                    self._take_reply(opened, message, arrays, now)
            case _:
                raise wire.WireError(f"unexpected {type(message).__name__}")

    def _take_tokens(self, arrays: Sequence[wire.Array], now: float) -> None:
        for row in rows(arrays):
            opened = self._streams.get(row.handle)
            if opened is None:
                continue
            stream = opened.stream
            gap = stream.on_tokens(row.attempt, row.choice, row.start, row.ids, row.logprobs)
            if gap is Gap.NONE:
                opened.wake()
            elif gap is Gap.RESTART:
                self._restart(opened, now)
            elif self.connected:
                fields = log_fields(stream.request.request_id, stream.request.traceparent)
                self._note("tokens are missing", {**fields})
                self._send(stream.resend(row.choice, now))

    def _take_prompt_logprobs(
        self, message: PromptLogprobs, arrays: Sequence[wire.Array], now: float
    ) -> None:
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
            self._restart(opened, now)

    def _take_reply(
        self,
        opened: OpenStream,
        message: Admitted | Rejected | Finished | Interrupted,
        arrays: Sequence[wire.Array],
        now: float,
    ) -> None:
        stream = opened.stream
        match message:
            case Admitted():
                stream.on_admitted(message.attempt)
            case Rejected():
                stream.on_rejected(message)
            case Interrupted():
                if stream.on_interrupted(message):
                    self._submit_next(opened, message.cause, now)
            case Finished():
                if not stream.on_finished(message, *arrays):
                    self._restart(opened, now)
        self._changed(opened)

    def _take_welcome(self, message: GatewayWelcome, now: float) -> None:
        """The answer to a hello, or a sign that the scheduler does not know this gateway."""
        if self.connected:
            known = message.epoch == self._scheduler_epoch
            if not known or now - self._hello_at > 2 * HELLO_SECONDS:
                self.lose("the scheduler does not know this gateway")
                self._hello(now)
            return
        self._note("scheduler found", {"epoch": message.epoch, "open_requests": len(self._streams)})
        self.connected = True
        self._scheduler_epoch = message.epoch
        self._beat_seconds, self._lease_seconds = message.beat_seconds, message.lease_seconds
        self._beat_at = now
        for opened in list(self._streams.values()):
            if self._has(opened) and opened.stream.restart(counts=False):
                self._submit_next(opened, "another scheduler", now)
            self._changed(opened)

    # streams

    def _restart(self, opened: OpenStream, now: float) -> None:
        """Tokens are missing: end this attempt and begin the next; while many are lost, only now and then."""
        if not self.connected:
            return  # the welcome of a scheduler does the same
        opened.restart_due = now < opened.restart_from
        if opened.restart_due:
            return
        opened.restart_from = now + RESTART_SECONDS
        self._send(opened.stream.cancel("gap"))
        if opened.stream.restart(counts=True):
            self._submit_next(opened, "tokens are missing", now)
        self._changed(opened)

    def _submit_next(self, opened: OpenStream, cause: str, now: float) -> None:
        """Submit the attempt that a stream has just gone on to, of which nothing is missing yet."""
        opened.restart_due = False
        stream, request = opened.stream, opened.stream.request
        fields = log_fields(request.request_id, request.traceparent)
        self._note("submitting again", {**fields, "attempt": stream.attempt, "cause": cause})
        if request.traceparent:
            opened.lost.append(LostAttempt(stream.attempt - 1, cause, opened.submitted_at, now))
        self._submit(opened, now)

    def _changed(self, opened: OpenStream) -> None:
        if self._has(opened):
            self._hold(opened.stream)
        opened.wake()

    def _hold(self, stream: Stream) -> None:
        self._held.set(stream.handle, stream.attempt, stream.open_choices)

    def _has(self, opened: OpenStream) -> bool:
        """Whether it has not been released."""
        return self._streams.get(opened.stream.handle) is opened


def unreachable() -> ServiceError:
    """What a client is told while no scheduler answers."""
    return ServiceError(
        ErrorCode.SERVICE_UNAVAILABLE, "the scheduler cannot be reached", retry_after_seconds=1
    )
