"""A scheduler that takes nothing until the outbox is full counts as lost."""

import threading
from pathlib import Path

import zmq
from protocol_driver import mock_engine
from scheduler_peer import TIMEOUT_SECONDS

from sfllm import wire
from sfllm.messages import (
    WORKER_TO_SCHEDULER,
    Capacity,
    Grant,
    GrantedRequest,
    Message,
    ModelCard,
    Sampling,
    WorkerBeat,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.metrics import Metrics
from sfllm.scheduler_choice import SchedulerChoice
from sfllm.sockets import OutboxFullError, RouterLink
from sfllm.wire import Array, as_array
from sfllm_worker.link import SchedulerLink
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.protocol import WorkerProtocol
from sfllm_worker.service import WorkerService
from sfllm_worker.watchdog import Watchdog

IDENTITY = b"w-full"


class NarrowLink(SchedulerLink):
    """Its outbox can be declared full."""

    full = False

    def send(self, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        if self.full and isinstance(message, WorkerTokens):
            self.full = False
            raise OutboxFullError("the scheduler takes nothing")
        super().send(message, arrays)


def test_a_full_outbox_ends_the_lease_and_the_worker_joins_again(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    workers = RouterLink(context, f"ipc://{tmp_path}/workers")
    decode = wire.decoder(WORKER_TO_SCHEDULER)
    link = NarrowLink([f"ipc://{tmp_path}/workers"], [f"ipc://{tmp_path}/assets"], IDENTITY, {})
    engine = mock_engine()
    hello = WorkerHello("w-full", ModelCard("m", (), "m", 0, 128, 259, (256,), ()), Capacity(8, 512, 16))
    metrics = WorkerMetrics(Metrics("test_full_outbox:"), "m", "w-full")
    choice = SchedulerChoice("w-full", ["only"], 0.0)
    service = WorkerService(
        engine, WorkerProtocol(engine, hello), link, metrics, Watchdog(600.0, 0.0), choice
    )
    codes: list[int] = []
    loop = threading.Thread(target=lambda: codes.append(service.run()))
    loop.start()

    def next_of(kind: type[Message]) -> Message:
        while True:
            assert workers.socket.poll(TIMEOUT_SECONDS * 1000), "the worker is silent"
            _, frame = workers.receive() or (b"", b"")
            message = decode(frame).message
            if isinstance(message, kind):
                return message

    def send(message: Message, *arrays: Array) -> None:
        workers.send(IDENTITY, wire.encode(message, *arrays))

    try:
        next_of(WorkerHello)
        send(WorkerWelcome(1, 1, 0.05, 30.0))
        sampling = Sampling(max_tokens=100, seed=0)
        request = GrantedRequest(b"g", "r", 1, 0, (0,), 1, (0,), sampling, 0.0)
        link.full = True
        send(Grant(1, (request,)), as_array("I", [65]), as_array("I", []), as_array("Q", []))
        next_of(WorkerHello)
        send(WorkerWelcome(1, 2, 0.05, 30.0))
        beat = next_of(WorkerBeat)
        assert isinstance(beat, WorkerBeat)
        assert (beat.lease, beat.running, beat.waiting, beat.digest) == (2, 0, 0, 0)
        assert beat.free_kv_tokens == engine.kv_tokens
    finally:
        service.drain()
        loop.join(TIMEOUT_SECONDS)
        workers.close()
        context.term()
    assert codes == [0]
