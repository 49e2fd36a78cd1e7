"""Tokens through the scheduler: messages of many rows, as fast as they are taken or at a given rate."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import zmq

from sfllm.messages import Capacity, Tokens, WorkerTokens
from sfllm.token_batch import TokenBatch
from sfllm.wire import decoder, encode

from .peers import Fleet, PeerError, drain
from .process import Scheduler

WORKERS = 64
GATEWAYS = 4
UNDER_WAY = 256
"""Messages that were sent and have not arrived, at most, when the scheduler takes what it can."""

STALLED_SECONDS = 20.0
_TOKENS = Tokens.kind
_decode = decoder((Tokens,))


class RelayResult(NamedTuple):
    """`cpu_microseconds` of the scheduler's process for each message, and tokens a second by the clock."""

    cpu_microseconds: float
    tokens_per_second: float


class LatencyResult(NamedTuple):
    """Milliseconds from the worker's send to the gateway's receive, with the peers' own part in them."""

    tokens_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float


def measure_relay(scheduler: Scheduler, *, rows: int, messages: int) -> RelayResult:
    """Pass on so many messages of so many rows as fast as they are taken."""
    fleet = _fleet(scheduler)
    try:
        frames = [_frame(fleet, worker, rows) for worker in range(WORKERS)]
        poller = _gateways(fleet)
        _pump(fleet, poller, frames, messages // 10)
        cpu, started = scheduler.cpu_seconds(), time.monotonic()
        _pump(fleet, poller, frames, messages)
        seconds, used = time.monotonic() - started, scheduler.cpu_seconds() - cpu
        return RelayResult(1e6 * used / messages, messages * rows / seconds)
    finally:
        fleet.close()


def measure_latency(
    scheduler: Scheduler, *, rows: int, tokens_per_second: float, seconds: float
) -> LatencyResult:
    """Send messages evenly at that rate; each carries its time of sending."""
    fleet = _fleet(scheduler)
    try:
        frames = [_frame(fleet, worker, rows) for worker in range(WORKERS)]
        poller = _gateways(fleet)
        _pump(fleet, poller, frames, 1000)
        took: list[int] = []
        interval = 1e9 * rows / tokens_per_second
        count = int(1e9 * seconds / interval)
        started, sent = time.monotonic_ns(), 0
        deadline = started + int(1e9 * (seconds + STALLED_SECONDS))
        while len(took) < count:
            now = time.monotonic_ns()
            due = min(count, int((now - started) / interval) + 1)
            while sent < due:
                index = sent % WORKERS
                fleet.workers[index].send(_stamped(frames[index], time.monotonic_ns()))
                sent += 1
            # Not 0: a loop that spins keeps libzmq's thread from this core, and measures itself.
            for gateway, _ in poller.poll(1 if sent < count else 100):
                arrived = drain(gateway)
                at = time.monotonic_ns()
                took += [at - _stamp(frame) for frame in arrived if frame[3] == _TOKENS]
            if now > deadline:
                raise PeerError("tokens do not arrive")
        last = (time.monotonic_ns() - started) / 1e9
        cuts = statistics.quantiles(took, n=100)
        return LatencyResult(count * rows / last, cuts[49] / 1e6, cuts[98] / 1e6)
    finally:
        fleet.close()


def _pump(fleet: Fleet, poller: zmq.Poller, frames: list[bytes], messages: int) -> None:
    sent = arrived = 0
    moved = time.monotonic()
    while arrived < messages:
        while sent < messages and sent - arrived < UNDER_WAY:
            fleet.workers[sent % WORKERS].send(frames[sent % WORKERS])
            sent += 1
        before = arrived
        for gateway, _ in poller.poll(100):
            arrived += sum(frame[3] == _TOKENS for frame in drain(gateway))
        if arrived > before:
            moved = time.monotonic()
        elif time.monotonic() - moved > STALLED_SECONDS:
            raise PeerError(f"{sent - arrived} messages do not arrive")


def _fleet(scheduler: Scheduler) -> Fleet:
    capacity = Capacity(256, 2**20, 2048)
    return Fleet(scheduler.gateway_address, scheduler.worker_address, GATEWAYS, WORKERS, capacity)


def _gateways(fleet: Fleet) -> zmq.Poller:
    poller = zmq.Poller()
    for gateway in fleet.gateways:
        poller.register(gateway, int(zmq.POLLIN))
    return poller


_HANDLES_AT = 4 + 4 + 3 * 4
"""Bytes before the first array: magic, version, kind, the body's size, the sizes of three arrays."""


def _frame(fleet: Fleet, worker: int, rows: int) -> bytes:
    batch = TokenBatch()
    for row in range(rows):
        batch.append(row, 0, 0, 100, [row])
    gateway = b"g-%d" % (worker % GATEWAYS)
    return encode(WorkerTokens(fleet.leases[worker], gateway), *batch.arrays())


def _stamped(frame: bytes, nanoseconds: int) -> bytes:
    """With the time in the place of the first handle, which nobody on the way looks at."""
    return frame[:_HANDLES_AT] + nanoseconds.to_bytes(8, "little") + frame[_HANDLES_AT + 8 :]


def _stamp(frame: bytes) -> int:
    return int(_decode(frame).arrays[0][0])
