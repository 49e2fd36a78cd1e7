"""The link to the scheduler: one DEALER, drained from the event loop's reader callback.

What arrives goes into the table of streams (`streams.py`), and what comes out of it is sent;
nothing is queued per token. A timer tells the table the time. A libzmq descriptor is
edge-triggered, so every send is followed by another look at the socket.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

import structlog
import zmq

from sfllm import wire
from sfllm.messages import SCHEDULER_TO_GATEWAY, ModelState
from sfllm.sockets import DealerLink, OutboxFullError
from sfllm_gateway.stream import Outgoing, Request
from sfllm_gateway.streams import ClearOutbox, OpenStream, StreamTable, unreachable

TICK_SECONDS = 0.1
MESSAGES_PER_DRAIN = 256

log = structlog.get_logger()


class SchedulerLink:
    """Owns the socket and the table of open streams from construction until `close`. One event loop only.

    `on_models` hears the list of models; `on_change` is called when `connected` may have changed.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        on_models: Callable[[Sequence[ModelState]], None],
        on_change: Callable[[], None],
        max_attempts: int,
    ) -> None:
        self._on_change = on_change
        self._was_connected = False
        self._dealer = DealerLink(context, address, identity)
        self._decode = wire.decoder(SCHEDULER_TO_GATEWAY)
        self._table = StreamTable(identity, secrets.randbits(62), max_attempts, on_models, _log)
        self._drain_scheduled = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._dealer.socket.fileno()
        self._loop.add_reader(self._descriptor, self._drain)
        self._timer = self._loop.call_soon(self._tick)

    @property
    def connected(self) -> bool:
        """Whether a scheduler answers."""
        return self._table.connected

    def check_connected(self) -> None:
        """Raises 503 while no scheduler answers."""
        if not self.connected:
            raise unreachable()

    # requests

    def open(self, request: Request, deadline: float, wake: Callable[[], None]) -> OpenStream:
        """Submit a request that must end by `deadline` (monotonic seconds). Raises 503 without scheduler."""
        opened = self._table.open(request, deadline, time.monotonic(), wake)
        self._send()
        if not self.connected:  # it takes nothing any more
            self.release(opened, "not submitted")
        self.check_connected()
        return opened

    def stop_choice(self, opened: OpenStream, choice: int, kept_tokens: int) -> None:
        """A stop string ended this choice."""
        self._table.stop_choice(opened, choice, kept_tokens, time.monotonic())
        self._send()

    def release(self, opened: OpenStream, reason: str) -> None:
        """Forget a stream; one that has not ended is cancelled everywhere behind this link."""
        self._table.release(opened, reason, time.monotonic())
        self._send()

    def close(self) -> None:
        """Say goodbye and close the socket."""
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._table.bye()
        self._send()
        self._dealer.close()

    # the socket

    def _send(self) -> None:
        """Send what the table has to say; a scheduler that takes too little is given up."""
        while (outgoing := self._table.take_outgoing()) and not self._dealer.socket.closed:
            try:
                for item in outgoing:
                    self._send_one(item)
            except OutboxFullError as error:
                self._table.lose(str(error))
            if not self._drain_scheduled and not self._closed:
                self._drain_scheduled = True
                self._loop.call_soon(self._drain)
        if self.connected is not self._was_connected:
            self._was_connected = self.connected
            self._on_change()

    def _send_one(self, item: Outgoing | ClearOutbox) -> None:
        if isinstance(item, ClearOutbox):
            self._dealer.clear()
        else:
            self._dealer.send(wire.encode(item.message, *item.arrays))

    def _drain(self) -> None:
        """Take what arrived, but let the loop do other work when there is much."""
        self._drain_scheduled = False
        if self._closed:
            return
        self._dealer.flush()
        for _ in range(MESSAGES_PER_DRAIN):
            frame = self._dealer.receive()
            if frame is None:
                break
            try:
                decoded = self._decode(frame)
                self._table.handle(decoded.message, decoded.arrays, time.monotonic())
            except wire.WireError as error:
                log.warning("malformed message from the scheduler", reason=str(error))
        else:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)
        self._send()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        self._drain()  # after a pause of this process, silence is judged by what waits in the socket
        self._table.tick(time.monotonic())
        self._send()


def _log(event: str, fields: dict[str, object]) -> None:
    log.info(event, **fields)
