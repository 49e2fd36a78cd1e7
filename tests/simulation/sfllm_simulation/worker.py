"""A worker's process: the protocol around an engine that makes tokens up, and a loop like the live one's."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sfllm import wire
from sfllm.messages import SCHEDULER_TO_WORKER, Capacity, Message, WorkerBeat, WorkerHello
from sfllm_worker.protocol import ClearOutbox, WorkerProtocol

from .agenda import Agenda
from .model import CARD, LEASE_SECONDS, BrokenStep, PoisonedEngine
from .network import Link
from .process import Process, encoded, require

TURN_SECONDS = 0.1
"""Without messages and work the live loop turns as often."""

DRAIN_SECONDS = 3.0

_decode = wire.decoder(SCHEDULER_TO_WORKER)


class Worker(Process):
    """One run of a worker. While a step runs, what reaches it waits.

    `on_left` is called when it has gone by itself: True when it said goodbye, False when a request killed it.
    """

    def __init__(
        self,
        agenda: Agenda,
        name: str,
        clock_offset: float,
        identity: bytes,
        engine: PoisonedEngine,
        capacity: Capacity,
        step_seconds: float,
    ) -> None:
        super().__init__(agenda, name, clock_offset)
        self.identity = identity
        self.engine = engine
        hello = WorkerHello(identity.decode(), CARD, capacity)
        self.protocol = WorkerProtocol(engine, hello, DRAIN_SECONDS)
        self.on_left: Callable[[bool], None] = lambda _said_goodbye: None
        self._step_seconds = step_seconds
        self._heard_at = 0.0
        self._in_step = False
        self._step_is_over = False
        self._publish: Callable[[], None] = lambda: None
        self._link: Link | None = None
        self._fails_next = False
        self._slow_seconds = 0.0

    def start(self, link: Link) -> None:
        """Connect."""
        self._link = link
        self.every(TURN_SECONDS, lambda: self.do(self._nothing))

    @property
    def busy(self) -> bool:
        """Its loop does one thing at a time."""
        return self.still or self._in_step

    def receive(self, frame: bytes) -> None:
        """A message arrived."""
        message, arrays = _decode(frame)
        self.do(lambda: self._handle(message, arrays))

    def _handle(self, message: Message, arrays: tuple[wire.Array, ...]) -> None:
        self._heard_at = self.clock
        self.protocol.handle(message, arrays, self.clock)

    def holds(self, gateway: bytes, handle: int) -> bool:
        """Whether it has this request."""
        return any(held.key == (gateway, handle) for held in self.protocol._ledger.held())

    def drain(self) -> None:
        """SIGTERM."""
        self.protocol.drain(self.clock)

    def fail_step(self) -> None:
        """The next step raises."""
        self._fails_next = True

    def slow_step(self, seconds: float) -> None:
        """The next step takes so long."""
        self._slow_seconds = seconds

    def go_on(self) -> None:
        """A step that ended meanwhile is published first."""
        self.still = False
        if self._step_is_over:
            self._end_step()
        super().go_on()

    def after_work(self) -> None:
        """A turn: what time brings, what is to be sent, the next step."""
        self.protocol.tick(self.clock)
        if self.protocol.drained:
            self._leave("")
            return
        self._send()
        self._check()
        if self.engine.has_work:
            self._begin_step()

    def _begin_step(self) -> None:
        started = self.clock
        try:
            if self._fails_next:
                raise BrokenStep(kills=False)
            result = self.engine.step()
        except BrokenStep as broken:
            if broken.kills:
                self.on_left(False)
            else:
                self._leave(str(broken))
            return
        self._in_step = True
        self._publish = lambda: self.protocol.publish(result, started, self.clock)
        slow, self._slow_seconds = self._slow_seconds, 0.0
        if slow:
            self._beat_on()
        self.agenda.after(self._step_seconds + slow, self._end_step)

    def _beat_on(self) -> None:
        """What the beats' thread does during a long step."""
        seconds, beat = self.protocol.beat_seconds, self.protocol.beat()
        if not self.alive or not self._in_step or beat is None:
            return
        if not self.still and self._link is not None:
            self._link.send(encoded(self._measured(beat.message), beat.arrays))
        self.agenda.after(seconds, self._beat_on)

    def _end_step(self) -> None:
        self._step_is_over = True
        if not self.alive or self.still or not self._in_step:
            return
        self._in_step = self._step_is_over = False
        self._publish()
        self._send()
        self.do(self._nothing)

    def _check(self) -> None:
        """The ledger and the engine agree, and the cache adds up."""
        engine = self.engine
        if engine.has_work:
            engine.check_integrity()
        else:
            self.protocol.check_idle()
            free, total = engine.free_kv_tokens, engine.usable_kv_tokens
            require(
                free == total, "cache", f"{self.name}: {free} of {total} tokens are free, and nothing runs"
            )
        silence = self.clock - self._heard_at
        if self.protocol.lease is None or silence > LEASE_SECONDS + TURN_SECONDS:
            require(not self.protocol.held_requests, "leases", f"{self.name} holds requests and has no lease")

    def _leave(self, failure: str) -> None:
        self.protocol.leave(failure)
        self._send()
        self.on_left(True)

    def _send(self) -> None:
        assert self._link is not None
        for outgoing in self.protocol.take_outgoing():
            if isinstance(outgoing, ClearOutbox):
                self._link.outbox.clear()
            else:
                self._link.send(encoded(self._measured(outgoing.message), outgoing.arrays))

    def _measured(self, message: Message) -> Message:
        """A beat says what steps take here: always the same, whatever is in them."""
        if isinstance(message, WorkerBeat):
            return msgspec.structs.replace(message, step_curve=(self._step_seconds, 0.0, 0.0, 0.0))
        return message

    def _nothing(self) -> None:
        """Wakes the loop up."""
