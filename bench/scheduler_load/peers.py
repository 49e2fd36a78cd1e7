"""Gateways and workers that are as cheap as can be: sockets, and frames that lie ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from sfllm.messages import (
    SCHEDULER_TO_GATEWAY,
    SCHEDULER_TO_WORKER,
    Capacity,
    GatewayHello,
    GatewayWelcome,
    Message,
    ModelCard,
    Models,
    WorkerHello,
    WorkerWelcome,
)
from sfllm.wire import Decoded, decoder, encode

MODEL = "m"
VOCAB_SIZE = 50_000
CARD = ModelCard(MODEL, (), MODEL, 0, 100_000, VOCAB_SIZE, (2,), ())
PATIENCE_MILLISECONDS = 30_000
HIGH_WATER_MARK = 200_000

decode_for_gateway = decoder(SCHEDULER_TO_GATEWAY)
decode_for_worker = decoder(SCHEDULER_TO_WORKER)

Socket = zmq.Socket[bytes]
M = TypeVar("M", bound=Message)

_EVENTS, _POLLIN, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK)


class PeerError(Exception):
    """The scheduler did not answer as it should."""


class Fleet:
    """Connected gateways and workers of one model. Owns its sockets until `close`.

    `leases` are the workers'.
    """

    def __init__(
        self, gateway_address: str, worker_address: str, gateways: int, workers: int, capacity: Capacity
    ) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, workers + gateways + 16)
        self.gateways = [self._connect(gateway_address, b"g-%d" % index) for index in range(gateways)]
        self.workers = [self._connect(worker_address, b"w-%d" % index) for index in range(workers)]
        for index, worker in enumerate(self.workers):
            worker.send(encode(WorkerHello(f"W{index}", CARD, capacity)))
        self.leases = [_wait(worker, WorkerWelcome, decode_for_worker).lease for worker in self.workers]
        for gateway in self.gateways:
            gateway.send(encode(GatewayHello(1)))
            _wait(gateway, GatewayWelcome, decode_for_gateway)
            _wait(gateway, Models, decode_for_gateway)

    def _connect(self, address: str, identity: bytes) -> Socket:
        peer = self._context.socket(zmq.DEALER)
        peer.setsockopt(zmq.ROUTING_ID, identity)
        peer.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        peer.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(address)
        return peer

    def poller(self) -> zmq.Poller:
        """For all of them."""
        poller = zmq.Poller()
        for peer in (*self.gateways, *self.workers):
            poller.register(peer, _POLLIN)
        return poller

    def close(self) -> None:
        """Close all sockets."""
        self._context.destroy(linger=0)


def drain(peer: Socket) -> list[bytes]:
    """All frames that are here."""
    frames = []
    while int(peer.getsockopt(_EVENTS)) & _POLLIN:
        frames.append(peer.recv(_NOBLOCK))
    return frames


def _wait(peer: Socket, kind: type[M], decode: Callable[[bytes], Decoded]) -> M:
    deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
    while time.monotonic() < deadline:
        if peer.poll(100):
            message = decode(peer.recv()).message
            if isinstance(message, kind):
                return message
    raise PeerError(f"no {kind.__name__} came from the scheduler")
