"""The worker's connection to its scheduler: hello, lease, beats, and the asset socket."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import structlog
import zmq

from sfllm import wire
from sfllm.asset_pull import asset_of, chunk_of
from sfllm.messages import (
    ASSETS,
    SCHEDULER_TO_WORKER,
    AssetGet,
    AssetOffer,
    Capacity,
    Message,
    ModelCard,
    SchedulerBeat,
    WorkerHello,
    WorkerWelcome,
)
from sfllm.sockets import DealerLink, OutboxFullError, random_identity
from sfllm.wire import Array, Decoded, WireError

_log = structlog.get_logger()

HELLO_INTERVAL_SECONDS = 1.0
MAX_MESSAGES_A_TURN = 256
"""Between two steps at most so many are read, so that a flood cannot stop the model."""


class SchedulerLink:
    """Owner of both sockets and of the lease.

    Invariant: `lease` is None exactly while the scheduler has not (again) welcomed this worker.
    Every message to the scheduler except the hello carries the current lease. Not safe for two
    threads at once: `beats.py` says who may use it when.
    """

    def __init__(
        self,
        worker_address: str,
        asset_address: str,
        card: ModelCard,
        capacity: Capacity,
        assets: Mapping[str, bytes],
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        identity = random_identity(b"w-")
        self.worker_id = identity.decode()
        self._dealer = DealerLink(self._context, worker_address, identity)
        self._asset_dealer = DealerLink(self._context, asset_address, identity)
        self._hello = WorkerHello(self.worker_id, card, capacity)
        self._assets = {asset_of(name, content).sha256: content for name, content in assets.items()}
        self._decode = wire.decoder(SCHEDULER_TO_WORKER)
        self._decode_asset = wire.decoder(ASSETS)
        self._poller = zmq.Poller()
        self._poller.register(self._dealer.socket, zmq.POLLIN)
        self._poller.register(self._asset_dealer.socket, zmq.POLLIN)
        self.lease: int | None = None
        self._welcome: WorkerWelcome | None = None
        self._lost = False
        self._heard_at = 0.0
        self._next_hello = 0.0
        self._next_beat = 0.0

    def wait(self, seconds: float) -> None:
        """Sleep until a message comes, at most `seconds`."""
        self._poller.poll(math.ceil(max(0.0, seconds) * 1000))

    def receive(self, now: float) -> tuple[list[Decoded], bool]:
        """Messages that came since, and whether the lease was lost or renewed meanwhile.

        When it was, everything held from before is void and the messages come after that.
        """
        messages: list[Decoded] = []
        reset, self._lost = self._lost, False
        for _ in range(MAX_MESSAGES_A_TURN):
            frames = self._dealer.receive()
            if frames is None:
                break
            try:
                decoded = self._decode(frames)
            except WireError as error:
                _log.warning("malformed message from the scheduler", error=str(error))
                continue
            if self._note(decoded.message, now):
                reset, messages = True, []
            else:
                messages.append(decoded)
        # Only now: after a long step, the beats that came meanwhile must count.
        if self._expire(now):
            reset, messages = True, []
        self._serve_assets()
        self._dealer.flush()
        return messages, reset

    def _note(self, message: Message, now: float) -> bool:
        """Keep track of liveness and lease; True when everything from before is void."""
        self._heard_at = now
        if isinstance(message, WorkerWelcome):
            self.lease, self._welcome = message.lease, message
            self._next_beat = now
            self._asset_dealer.send(wire.encode(AssetOffer(self._hello.card.assets)))
            _log.info("joined the scheduler", worker_id=self.worker_id, lease=message.lease)
            return True
        if isinstance(message, SchedulerBeat) and self._welcome and message.epoch != self._welcome.epoch:
            self._leave(now, "the scheduler was restarted")
            return True
        return False

    def _expire(self, now: float) -> bool:
        if self._welcome is None or now - self._heard_at < self._welcome.lease_seconds:
            return False
        self._leave(now, "no beat from the scheduler within the lease")
        return True

    def _leave(self, now: float, reason: str) -> None:
        _log.warning("lost the scheduler", reason=reason, lease=self.lease)
        self.lease = self._welcome = None
        self._dealer.clear()
        self._next_hello = now

    def send(self, message: Message, *arrays: Array) -> None:
        """Send now or, when the scheduler is slow, later.

        A scheduler that takes nothing for so long that the outbox is full counts as lost.
        """
        try:
            self._dealer.send(wire.encode(message, *arrays))
        except OutboxFullError as error:
            self._leave(time.monotonic(), str(error))
            self._lost = True

    def say_hello_if_due(self, now: float) -> None:
        """Until welcomed, say hello every second."""
        if self.lease is None and now >= self._next_hello:
            self._next_hello = now + HELLO_INTERVAL_SECONDS
            self._dealer.clear()
            self.send(self._hello)

    def beat_is_due(self, now: float) -> bool:
        """Whether it is time for a beat; the next one is then due an interval later."""
        if self._welcome is None or now < self._next_beat:
            return False
        self._next_beat = now + self._welcome.beat_seconds
        return True

    def seconds_to_timer(self, now: float) -> float:
        """How long the loop may wait before a timer of this link is due."""
        return max(0.0, (self._next_hello if self._welcome is None else self._next_beat) - now)

    def _serve_assets(self) -> None:
        while (frames := self._asset_dealer.receive()) is not None:
            try:
                message = self._decode_asset(frames).message
            except WireError as error:
                _log.warning("malformed message on the asset socket", error=str(error))
                continue
            if isinstance(message, AssetGet):
                content = self._assets.get(message.sha256)
                self._asset_dealer.send(wire.encode(chunk_of(message.sha256, content, message.offset)))
        self._asset_dealer.flush()

    def close(self) -> None:
        """Let the last messages leave and close both sockets."""
        self._dealer.flush()
        self._dealer.close()
        self._asset_dealer.close()
        self._context.term()
