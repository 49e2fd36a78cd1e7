"""The socket to one scheduler: a DEALER, drained from the event loop's reader callback.

Nothing is queued per token. A libzmq descriptor is edge-triggered, so every send is followed by another
look at the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog
import zmq

from sfllm import wire
from sfllm.link_keys import ClientKeys
from sfllm.messages import SCHEDULER_TO_GATEWAY, GatewayHello, Message
from sfllm.sockets import DealerLink
from sfllm_gateway.stream import Outgoing
from sfllm_gateway.streams import ClearOutbox

MESSAGES_PER_DRAIN = 256
REFUSAL_LOG_SECONDS = 10.0
NEWS_SECONDS = 0.5

Take = Callable[[Message, Sequence[wire.Array]], None]

log = structlog.get_logger()


class SchedulerLink:
    """Owns the socket from construction until `close`. One event loop only.

    `take` gets each message and may raise `WireError`; `on_drained` is called when what came has been taken.
    `watched` is as for `DealerLink`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        take: Take,
        on_drained: Callable[[], None],
        watched: bool,
        keys: ClientKeys | None = None,
    ) -> None:
        self._address = address
        self._take = take
        self._on_drained = on_drained
        self._dealer = DealerLink(context, address, identity, watched, keys=keys)
        self._watched = watched
        self._next_refusal_log = self._next_news = 0.0
        self._hello_sent = False
        self.other_version = ""
        """Why nothing that this scheduler sends can be read, if it speaks another version of the protocol."""
        self._decode = wire.decoder(SCHEDULER_TO_GATEWAY)
        self._drain_scheduled = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._dealer.socket.fileno()
        self._loop.add_reader(self._descriptor, self._drain)

    def send(self, outgoing: Sequence[Outgoing | ClearOutbox]) -> None:
        """Send in order. Raises `OutboxFullError` when the scheduler takes too little."""
        if self._closed:
            return
        try:
            for item in outgoing:
                if isinstance(item, ClearOutbox):
                    self._dealer.clear()
                elif not (isinstance(item.message, GatewayHello) and self._hello_waits()):
                    self._dealer.send(wire.encode(item.message, *item.arrays))
        finally:
            if not self._drain_scheduled:
                self._drain_scheduled = True
                self._loop.call_soon(self._drain)

    def _hello_waits(self) -> bool:
        """Whether an earlier hello still waits for a connection. All hellos of an hour would be a flood."""
        waits = self._watched and self._hello_sent and not self._dealer.is_up
        self._hello_sent = not self._dealer.is_up
        return waits

    def explain(self, now: float) -> None:
        """Say why the scheduler does not let this gateway in, if it was refused, and now and then again.

        To be called often; it looks once in `NEWS_SECONDS`, which every link needs (`DealerLink.refusal`).
        """
        if now < self._next_news:
            return
        self._next_news = now + NEWS_SECONDS
        refusal = self._dealer.refusal(now)
        if not refusal or now < self._next_refusal_log:
            return
        self._next_refusal_log = now + REFUSAL_LOG_SECONDS
        log.warning("refused by the scheduler", address=self._address, reason=refusal)

    def seconds_lost(self, now: float) -> float:
        """As `DealerLink.seconds_lost`."""
        return self._dealer.seconds_lost(now)

    def close(self) -> None:
        """Give what was sent a short while to leave, and close the socket."""
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        self._dealer.close()

    def take_waiting(self) -> None:
        """Take what arrived, but let the loop do other work when there is much."""
        self._drain_scheduled = False
        self._dealer.flush()
        for _ in range(MESSAGES_PER_DRAIN):
            frame = self._dealer.receive()
            if frame is None:
                break
            try:
                decoded = self._decode(frame)
                self.other_version = ""
                self._take(decoded.message, decoded.arrays)
            except wire.VersionError as error:
                self._note_version(str(error))
            except wire.WireError as error:
                log.warning(
                    "malformed message from the scheduler", scheduler=self._address, reason=str(error)
                )
        else:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _note_version(self, reason: str) -> None:
        """Log it once, not with every answer to a hello."""
        if reason != self.other_version:
            log.error("this scheduler cannot be talked to", scheduler=self._address, reason=reason)
            self.other_version = reason

    def _drain(self) -> None:
        if not self._closed:
            self.take_waiting()
            self._on_drained()
