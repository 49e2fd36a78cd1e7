"""The worker's sockets: messages from and to its scheduler, and the files that gateways need."""

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
    Message,
    WorkerWelcome,
)
from sfllm.sockets import DealerLink
from sfllm.wire import Array, Decoded, WireError

_log = structlog.get_logger()

MAX_MESSAGES_A_TURN = 256
"""Between two steps at most so many are read, so that a flood cannot stop the model."""

LAST_WORDS_SECONDS = 1.0
"""How long `close` waits for the scheduler to take what is left to say."""


class SchedulerLink:
    """Owner of both sockets until `close`. Not safe for two threads at once: see `beats.py`."""

    def __init__(
        self, worker_address: str, asset_address: str, identity: bytes, assets: Mapping[str, bytes]
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = DealerLink(self._context, worker_address, identity)
        self._asset_dealer = DealerLink(self._context, asset_address, identity)
        self._offer = AssetOffer(tuple(asset_of(name, content) for name, content in sorted(assets.items())))
        self._assets = {asset_of(name, content).sha256: content for name, content in assets.items()}
        self._decode = wire.decoder(SCHEDULER_TO_WORKER)
        self._decode_asset = wire.decoder(ASSETS)
        self._poller = zmq.Poller()
        self._poller.register(self._dealer.socket, zmq.POLLIN)
        self._poller.register(self._asset_dealer.socket, zmq.POLLIN)

    def wait(self, seconds: float) -> None:
        """Sleep until a message comes, at most `seconds`."""
        self._poller.poll(math.ceil(max(0.0, seconds) * 1000))

    def receive(self) -> list[Decoded]:
        """Messages that came since the last call; questions for assets are answered here."""
        messages: list[Decoded] = []
        for _ in range(MAX_MESSAGES_A_TURN):
            frame = self._dealer.receive()
            if frame is None:
                break
            try:
                decoded = self._decode(frame)
            except WireError as error:
                _log.warning("malformed message from the scheduler", error=str(error))
                continue
            if isinstance(decoded.message, WorkerWelcome):
                self._asset_dealer.send(wire.encode(self._offer))
            messages.append(decoded)
        self._serve_assets()
        self._dealer.flush()
        return messages

    def send(self, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        """Send now or, when the scheduler is slow, later. Raises `OutboxFullError` when it takes nothing."""
        self._dealer.send(wire.encode(message, *arrays))

    def clear(self) -> None:
        """Forget what waits: it was for a scheduler that is gone."""
        self._dealer.clear()

    def _serve_assets(self) -> None:
        for _ in range(MAX_MESSAGES_A_TURN):
            frame = self._asset_dealer.receive()
            if frame is None:
                break
            try:
                message = self._decode_asset(frame).message
            except WireError as error:
                _log.warning("malformed message on the asset socket", error=str(error))
                continue
            if isinstance(message, AssetGet):
                content = self._assets.get(message.sha256)
                self._asset_dealer.send(wire.encode(chunk_of(message.sha256, content, message.offset)))
        self._asset_dealer.flush()

    def close(self) -> None:
        """Let the last messages leave and close both sockets."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while not self._dealer.flush() and (left := deadline - time.monotonic()) > 0:
            self._dealer.socket.poll(math.ceil(left * 1000), zmq.POLLOUT)
        self._dealer.close()
        self._asset_dealer.close()
        self._context.term()
