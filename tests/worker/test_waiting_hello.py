"""Of the hellos that a worker says while there is no connection, the scheduler gets one in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sfllm import wire
from sfllm.messages import (
    NO_LEASE,
    WORKER_TO_SCHEDULER,
    Capacity,
    Message,
    ModelCard,
    WorkerBeat,
    WorkerHello,
)
from sfllm.sockets import RouterLink
from sfllm.wire import as_array
from sfllm_worker.link import SchedulerLink

PATIENCE_SECONDS = 30.0
HELLO = WorkerHello("w-1", ModelCard("m", (), "m", 0, 128, 259, (256,), ()), Capacity(8, 512, 16))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/workers"


@pytest.fixture
def link(tmp_path: Path, address: str) -> Iterator[SchedulerLink]:
    made = SchedulerLink([address], [f"ipc://{tmp_path}/assets"], b"w-1", {})
    yield made
    made.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


def heard(router: RouterLink) -> list[type[Message]]:
    """Kinds of all messages up to a beat."""
    decode, kinds = wire.decoder(WORKER_TO_SCHEDULER), []
    while WorkerBeat not in kinds:
        assert router.socket.poll(PATIENCE_SECONDS * 1000), "the worker is silent"
        received = router.receive()
        if received is not None:
            kinds.append(type(decode(received[1]).message))
    return kinds


def say_hellos_and_a_beat(link: SchedulerLink) -> None:
    for _ in range(20):
        link.send(HELLO)
    link.send(WorkerBeat(NO_LEASE, 0, 0, 0, 0), (as_array("Q", ()),))


def test_one_hello_waits_for_a_scheduler_that_is_not_there_yet_or_not_any_more(
    link: SchedulerLink, address: str, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    for _ in range(2):
        say_hellos_and_a_beat(link)
        router = RouterLink(context, address)
        try:
            assert heard(router) == [WorkerHello, WorkerBeat]
            deadline = time.monotonic() + PATIENCE_SECONDS
            while router.receive() is None:  # connected, as the link finds out: it holds none back
                assert time.monotonic() < deadline
                link.send(HELLO)
        finally:
            router.close()
        while link.seconds_lost(time.monotonic()) == 0.0:
            assert time.monotonic() < deadline, "the link does not see that the connection is lost"
