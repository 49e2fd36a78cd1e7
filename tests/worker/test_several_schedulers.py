"""A real worker process between two schedulers that a test plays: it belongs to one of them at a time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from scheduler_peer import GATEWAY, MOCK, TIMEOUT_SECONDS

from sfllm import wire
from sfllm.messages import (
    NO_LEASE,
    WORKER_TO_SCHEDULER,
    Drain,
    Grant,
    GrantedRequest,
    Message,
    Sampling,
    SchedulerBeat,
    WorkerBeat,
    WorkerBye,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerReturned,
    WorkerUnknown,
    WorkerWelcome,
)
from sfllm.rendezvous import ranked
from sfllm.sockets import RouterLink
from sfllm.wire import as_array

MOVE_SECONDS = 90.0
"""Far longer than any worker waits before it moves to a scheduler that is there."""


class Scheduler:
    """One scheduler's socket for workers, bound when the test wants it to be there."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, epoch: int) -> None:
        self.link = RouterLink(context, address)
        self.epoch = epoch
        self.seen: list[Message] = []
        self.leases = 0
        self.peer = b""
        self._decode = wire.decoder(WORKER_TO_SCHEDULER)

    def send(self, message: Message, *arrays: wire.Array) -> None:
        self.link.send(self.peer, wire.encode(message, *arrays))

    def turn(self) -> None:
        """Take what is there, answer probes, and beat."""
        while received := self.link.receive():
            self.peer, frame = received
            message = self._decode(frame).message
            if isinstance(message, WorkerBeat) and message.lease == NO_LEASE:
                self.send(WorkerUnknown(self.epoch))
            elif isinstance(message, WorkerBeat):
                self.send(SchedulerBeat(self.epoch))
            self.seen.append(message)

    def welcome(self) -> None:
        self.leases += 1
        self.send(WorkerWelcome(self.epoch, self.leases, 0.2, 30.0))

    def grant(self, handle: int, max_tokens: int) -> None:
        sampling = Sampling(max_tokens=max_tokens, seed=1, ignore_eos=True)
        request = GrantedRequest(GATEWAY, f"r-{handle}", handle, 0, (0,), 3, (0,), sampling, 0.0)
        arrays = as_array("I", (5, 6, 7)), as_array("I", ()), as_array("Q", ())
        self.send(Grant(self.leases, (request,)), *arrays)

    def has(self, kind: type[Message]) -> bool:
        return any(isinstance(message, kind) for message in self.seen)

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.seen if isinstance(message, kind)]


class Pair:
    """A mock worker and the schedulers that it knows: `better` is the one that it should belong to."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        addresses = [f"ipc://{directory}/{name}" for name in "ab"]
        assets = ",".join(f"{address}-assets" for address in addresses)
        command = [sys.executable, "-m", "sfllm_worker", *MOCK, f"--asset-address={assets}"]
        self.log = directory / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--worker-address={','.join(addresses)}"], stdout=log, stderr=log
            )
        self.schedulers: list[Scheduler] = []
        self.until(lambda: "worker ready" in self.log.read_text())
        found = re.search(r"worker_id=.*?(w-[0-9a-f]{16})", self.log.read_text())
        assert found is not None
        self.better, self.worse = (addresses[index] for index in ranked(found[1], addresses))

    def start(self, address: str, epoch: int) -> Scheduler:
        scheduler = Scheduler(self.context, address, epoch)
        self.schedulers.append(scheduler)
        return scheduler

    def until(self, condition: Callable[[], bool], seconds: float = TIMEOUT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            poller = zmq.Poller()
            for scheduler in self.schedulers:
                poller.register(scheduler.link.socket, zmq.POLLIN)
            poller.poll(50)
            for scheduler in self.schedulers:
                scheduler.turn()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_SECONDS)
        for scheduler in self.schedulers:
            scheduler.link.close()
        self.context.term()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    running = Pair(tmp_path)
    yield running
    running.close()


def test_a_worker_goes_where_it_is_welcome_and_moves_by_drain_when_the_better_one_is_back(pair: Pair) -> None:
    worse = pair.start(pair.worse, epoch=1)
    pair.until(lambda: worse.has(WorkerHello))
    worse.welcome()
    better = pair.start(pair.better, epoch=2)
    granted = 0

    def ended() -> int:
        return len(worse.of(WorkerFinished)) + len(worse.of(WorkerReturned))

    def is_draining_with_work() -> bool:
        """Two requests at a time, half of one apart: the worker is never idle."""
        nonlocal granted
        while not worse.has(WorkerDraining) and ended() > granted - 2:
            granted += 1
            worse.grant(granted, max_tokens=200 if granted == 1 else 400)
        return worse.has(WorkerDraining)

    pair.until(is_draining_with_work, MOVE_SECONDS)
    # What was said to it while it was not there, it does not hear.
    assert not better.has(WorkerHello), "the worker was not free yet"
    pair.until(lambda: worse.has(WorkerBye))
    assert ended() == granted, "what had begun was to end first, and the rest to be given back"
    pair.until(lambda: better.has(WorkerHello))
    better.welcome()
    better.grant(1, max_tokens=5)
    pair.until(lambda: better.has(WorkerFinished))
    assert worse.of(WorkerBye) == [WorkerBye(1)]


def test_a_welcome_that_comes_after_the_worker_went_on_is_answered_with_a_goodbye(pair: Pair) -> None:
    better, worse = pair.start(pair.better, epoch=1), pair.start(pair.worse, epoch=2)
    pair.until(lambda: better.has(WorkerHello))
    pair.until(lambda: worse.has(WorkerHello))
    worse.welcome()
    pair.until(lambda: any(isinstance(m, WorkerBeat) and m.lease == 1 for m in worse.seen))
    better.welcome()
    pair.until(lambda: better.has(WorkerBye))
    assert better.of(WorkerBye) == [WorkerBye(1)]
    assert not worse.has(WorkerBye)


def test_a_worker_that_is_refused_leaves_although_there_are_other_schedulers(pair: Pair) -> None:
    better = pair.start(pair.better, epoch=1)
    pair.start(pair.worse, epoch=2)
    pair.until(lambda: better.has(WorkerHello))
    better.welcome()
    better.send(Drain(1))
    assert pair.process.wait(TIMEOUT_SECONDS) == 0
