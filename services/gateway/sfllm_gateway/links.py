"""The links to all schedulers: what arrives goes into the tables of streams, what comes out of them is sent.

A timer tells the tables the time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog
import zmq

from sfllm import wire
from sfllm.link_keys import ClientKeys
from sfllm.messages import Asset, Message, ModelState
from sfllm.sockets import RECONNECT_SECONDS, OutboxFullError
from sfllm_gateway.link import SchedulerLink
from sfllm_gateway.stream import Request
from sfllm_gateway.streams import OpenStream, unreachable
from sfllm_gateway.tables import SchedulerTables

TICK_SECONDS = 0.1

log = structlog.get_logger()


class SchedulerLinks:
    """Owns the sockets and the tables of open streams from construction until `close`. One event loop only.

    `on_models` hears the list of models; `on_change` is called when `connected` may have changed.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        addresses: Sequence[str],
        identity: bytes,
        on_models: Callable[[Sequence[ModelState]], None],
        on_change: Callable[[], None],
        max_attempts: int,
        keys: ClientKeys | None = None,
    ) -> None:
        self._on_change = on_change
        self._connected = 0
        self._tables = SchedulerTables(
            identity, secrets.randbits(62), addresses, max_attempts, on_models, _log
        )
        self._links = [
            SchedulerLink(
                *(context, address, identity, partial(self._take, index), self._send),
                watched=len(addresses) > 1,
                keys=keys,
            )
            for index, address in enumerate(addresses)
        ]
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_soon(self._tick)

    @property
    def connected(self) -> int:
        """How many schedulers answer."""
        return self._tables.connected

    def trouble(self) -> str:
        """Why no scheduler answers, as far as is known."""
        found = [link.other_version for link in self._links if link.other_version]
        return found[0] if found else "the scheduler cannot be reached"

    def check_connected(self) -> None:
        """Raises 503 while no scheduler answers."""
        if not self.connected:
            raise unreachable()

    def holders(self, asset: Asset) -> list[int]:
        """The positions of the schedulers that have an asset, as far as is known."""
        return self._tables.holders(asset)

    # requests

    def open(self, request: Request, deadline: float, wake: Callable[[], None]) -> OpenStream:
        """Submit a request that must end by `deadline` (monotonic seconds). Raises 503 without scheduler."""
        opened = self._tables.open(request, deadline, time.monotonic(), wake)
        self._send()
        if not self.connected:  # nobody takes anything any more
            self.release(opened, "not submitted")
        self.check_connected()
        return opened

    def stop_choice(self, opened: OpenStream, choice: int, kept_tokens: int) -> None:
        """A stop string ended this choice."""
        self._tables.stop_choice(opened, choice, kept_tokens, time.monotonic())
        self._send()

    def release(self, opened: OpenStream, reason: str) -> None:
        """Forget a stream; one that has not ended is cancelled everywhere behind these links."""
        self._tables.release(opened, reason, time.monotonic())
        self._send()

    def close(self) -> None:
        """Say goodbye and close the sockets."""
        self._timer.cancel()
        self._tables.bye()
        self._send()
        for link in self._links:
            link.close()

    # the sockets

    def _take(self, index: int, message: Message, arrays: Sequence[wire.Array]) -> None:
        self._tables.handle(index, message, arrays, time.monotonic())

    def _send(self) -> None:
        """Send what the tables have to say; a scheduler that takes too little is given up."""
        waiting = True
        while waiting:  # giving one up makes more to say to others
            waiting = False
            for index, link in enumerate(self._links):
                if not (outgoing := self._tables.take_outgoing(index)):
                    continue
                try:
                    link.send(outgoing)
                except OutboxFullError as error:
                    self._tables.lose(index, str(error), time.monotonic())
                    waiting = True
        if self.connected != self._connected:
            self._connected = self.connected
            self._on_change()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        for link in self._links:  # after a pause of this process, silence is judged by what waits in sockets
            link.take_waiting()
        now = time.monotonic()
        for link in self._links:
            link.explain(now)
        if len(self._links) > 1:
            for index, link in enumerate(self._links):
                if link.seconds_lost(now) >= RECONNECT_SECONDS:
                    self._tables.lose_connection(index, now)
        self._tables.tick(now)
        self._send()


def _log(event: str, fields: dict[str, object]) -> None:
    log.info(event, **fields)
