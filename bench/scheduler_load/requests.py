"""Requests through the scheduler: submitted, admitted, granted, finished, at a steady number that waits."""

from __future__ import annotations

import random
import time
from typing import NamedTuple

from sfllm.messages import (
    Capacity,
    Finished,
    Grant,
    Rejected,
    Sampling,
    Submit,
    Timings,
    WorkerFinished,
    WorkerProgress,
)
from sfllm.prefixes import prefix_names
from sfllm.wire import as_array, encode

from .frames import FIRST_NUMBER, MARK, Template
from .peers import MODEL, VOCAB_SIZE, Fleet, PeerError, Socket, decode_for_gateway, decode_for_worker, drain
from .process import Scheduler

GATEWAYS = 4
KINDS_OF_REQUESTS = 64
"""Different lengths, tenants and prompts."""

LONGEST_PROMPT = 2048
STEP_TOKENS = 2048
SLOTS = 8
"""Of each worker. All of them are filled, so that whatever else was submitted waits."""

STALLED_SECONDS = 20.0
_FINISHED, _REJECTED = Finished.kind, Rejected.kind


class RequestsResult(NamedTuple):
    """`cpu_microseconds` of the scheduler's process for each request, and requests a second by the clock."""

    cpu_microseconds: float
    per_second: float
    requests: int


class _Load:
    """Keeps `waiting` requests in the queue beyond what the workers hold."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        draw = random.Random(seed)
        self._submits = [_submit(draw, kind) for kind in range(KINDS_OF_REQUESTS)]
        self._ends = [
            [_end(lease, b"g-%d" % index) for index in range(len(fleet.gateways))] for lease in fleet.leases
        ]
        self._grants = [0] * len(fleet.workers)
        self._number_of = {b"g-%d" % index: index for index in range(len(fleet.gateways))}
        self._next = FIRST_NUMBER
        self.finished = 0

    def submit(self, gateway: int) -> None:
        """One more request."""
        template = self._submits[self._next % KINDS_OF_REQUESTS]
        self._fleet.gateways[gateway].send(template.fill(self._next))
        self._next += 1

    def on_worker(self, index: int, peer: Socket) -> None:
        """Whatever is granted has been computed at once."""
        lease = self._fleet.leases[index]
        for frame in drain(peer):
            message, _ = decode_for_worker(frame)
            if not isinstance(message, Grant):
                continue
            self._grants[index] += 1
            peer.send(encode(WorkerProgress(lease, self._grants[index], 0)))
            for entry in message.requests:
                end = self._ends[index][self._number_of[entry.gateway]]
                peer.send(end.fill(entry.handle))

    def on_gateway(self, index: int, peer: Socket) -> None:
        """For each request that ended another one comes."""
        for frame in drain(peer):
            kind = frame[3]
            if kind == _FINISHED:
                self.finished += 1
                self.submit(index)
            elif kind == _REJECTED:
                raise PeerError(f"a request was rejected: {decode_for_gateway(frame).message}")

    def run(self, until: int) -> None:
        """Go on until so many have finished."""
        poller = self._fleet.poller()
        workers = {peer: index for index, peer in enumerate(self._fleet.workers)}
        gateways = {peer: index for index, peer in enumerate(self._fleet.gateways)}
        moved = time.monotonic()
        while self.finished < until:
            before = self.finished
            for peer, _ in poller.poll(100):
                if peer in workers:
                    self.on_worker(workers[peer], peer)
                else:
                    self.on_gateway(gateways[peer], peer)
            if self.finished > before:
                moved = time.monotonic()
            elif time.monotonic() - moved > STALLED_SECONDS:
                raise PeerError(f"nothing has finished for {STALLED_SECONDS:.0f} s")


def measure(
    scheduler: Scheduler, *, waiting: int, workers: int, requests: int, seed: int = 0
) -> RequestsResult:
    """Run `requests` through a fleet while about `waiting` others wait."""
    capacity = Capacity(SLOTS, SLOTS * 2 * LONGEST_PROMPT, STEP_TOKENS)
    fleet = Fleet(scheduler.gateway_address, scheduler.worker_address, GATEWAYS, workers, capacity)
    try:
        load = _Load(fleet, seed)
        for number in range(waiting + workers * SLOTS):
            load.submit(number % GATEWAYS)
        load.run(max(1, requests // 4))  # until what was submitted at once is in the queue
        cpu, started, finished = scheduler.cpu_seconds(), time.monotonic(), load.finished
        load.run(finished + requests)
        done, seconds = load.finished - finished, time.monotonic() - started
        return RequestsResult(1e6 * (scheduler.cpu_seconds() - cpu) / done, done / seconds, done)
    finally:
        fleet.close()


def _submit(draw: random.Random, kind: int) -> Template:
    tokens = as_array("I", [draw.randrange(VOCAB_SIZE) for _ in range(int(LONGEST_PROMPT ** draw.random()))])
    message = Submit(
        *(f"chatcmpl-{kind:024d}", MARK, 0, MODEL, (0,), (0,), Sampling(256, kind), 0, 3_600_000),
        tenant=f"{kind % 8:016x}",
    )
    return Template(message, tokens, as_array("I", []), prefix_names(tokens, ""))


def _end(lease: int, gateway: bytes) -> Template:
    finished = Finished(MARK, 0, 0, "length", -1, 100, 0, 128, Timings(0.1, 0.2, 0.3))
    return Template(WorkerFinished(lease, gateway, finished), as_array("f", ()))
