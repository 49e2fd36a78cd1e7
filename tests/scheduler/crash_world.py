"""A core with workers that crash and gateways that submit again: a whole serving system without sockets.

A worker computes one token a step for each choice that it holds. When it is about to compute a token at
which a stream is poisonous, it crashes and loses the whole step; anybody may kill it besides.
"""

from __future__ import annotations

from itertools import count

from core_driver import EPOCH, GATEWAY, card

from sfllm.holdings import OpenChoice, digest
from sfllm.messages import (
    PROBATION_TOKENS,
    Capacity,
    Finished,
    GatewayBeat,
    GatewayHello,
    Grant,
    Interrupted,
    ListHeld,
    Message,
    Rejected,
    Sampling,
    Submit,
    Timings,
    Tokens,
    WorkerBeat,
    WorkerCancel,
    WorkerFinished,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.token_batch import TokenBatch, rows
from sfllm.wire import Array, as_array
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Event,
    FromGateway,
    FromWorker,
    Tick,
    ToGateway,
    ToWorker,
    WorkerUnreachable,
)
from sfllm_scheduler.core.state import PolicyValues

STEP_SECONDS = 0.05
STEPS_A_BEAT = 40


class Stream:
    """One request as its gateway sees it. It crashes whoever computes token `poison_at`."""

    def __init__(self, handle: int, length: int, poison_at: int | None = None) -> None:
        self.handle = handle
        self.length = length
        self.poison_at = poison_at
        self.tokens = 0
        self.attempt = 0
        self.attempt_began_at = 0
        self.suspects = 0
        self.crashes_alone = 0
        self.really_alone = 0
        self.end: str | None = None

    @property
    def progressed(self) -> bool:
        """Whether this attempt has got far enough to clear the request of older crashes."""
        return self.tokens - self.attempt_began_at >= PROBATION_TOKENS


class FakeWorker:
    """A worker process. `held` says at which token each attempt goes on."""

    def __init__(self, peer: bytes) -> None:
        self.peer = peer
        self.lease = 0
        self.held: dict[tuple[int, int], int] = {}


class CrashWorld:
    """Owns the core, the streams by handle and the workers; `crashes` counts what happened to them."""

    def __init__(self, workers: int, slots: int = 64, restart_steps: int = 5) -> None:
        self.core = SchedulerCore(PolicyValues(), EPOCH)
        self.now = 0.0
        self.steps = 0
        self.crashes = 0
        self.streams: dict[int, Stream] = {}
        self.workers: dict[bytes, FakeWorker] = {}
        self.joining: dict[int, int] = {}
        self._slots = slots
        self._restart_steps = restart_steps
        self._names = count(1)
        self._send(FromGateway(GATEWAY, GatewayHello(1)))
        for _ in range(workers):
            self._join()

    def submit(self, length: int, poison_at: int | None = None) -> Stream:
        """A new request."""
        stream = Stream(len(self.streams) + 1, length, poison_at)
        self.streams[stream.handle] = stream
        self._submit(stream)
        return stream

    def step(self) -> None:
        """Every worker computes a token for all that it holds, or crashes; time passes."""
        self.steps += 1
        self.now += STEP_SECONDS
        for _ in range(self.joining.pop(self.steps, 0)):
            self._join()
        for worker in list(self.workers.values()):
            if any(self.streams[handle].poison_at == at for (handle, _), at in worker.held.items()):
                self.kill(worker)
            else:
                self._compute(worker)
        if self.steps % STEPS_A_BEAT == 0:
            self._beat()
        self._send(Tick())
        self.core.check_integrity()

    def kill(self, worker: FakeWorker) -> None:
        """A worker is gone, with what it holds; another one starts in its place."""
        self.crashes += 1
        if len(worker.held) == 1:
            ((handle, _),) = worker.held
            stream = self.streams[handle]
            stream.really_alone = (0 if stream.progressed else stream.really_alone) + 1
        del self.workers[worker.peer]
        at = self.steps + self._restart_steps
        self.joining[at] = self.joining.get(at, 0) + 1
        self._send(WorkerUnreachable(worker.peer))

    @property
    def open(self) -> list[Stream]:
        """Streams that have not ended."""
        return [stream for stream in self.streams.values() if stream.end is None]

    # what the peers do ------------------------------------------------------------------

    def _join(self) -> None:
        name = f"W{next(self._names)}"
        worker = FakeWorker(b"w-" + name.encode())
        self.workers[worker.peer] = worker
        hello = WorkerHello(name, card(), Capacity(self._slots, 100_000, 4096))
        self._send(FromWorker(worker.peer, hello))

    def _submit(self, stream: Stream) -> None:
        message = Submit(
            request_id=f"r{stream.handle}",
            handle=stream.handle,
            attempt=stream.attempt,
            model="m",
            choices=(0,),
            generated_counts=(stream.tokens,),
            sampling=Sampling(max_tokens=stream.length, seed=1),
            priority=0,
            milliseconds_left=10_000_000,
            suspects=stream.suspects,
            crashes_alone=stream.crashes_alone,
        )
        arrays = (as_array("I", [1, 2, 3]), as_array("I", [0] * stream.tokens), as_array("Q", ()))
        self._send(FromGateway(GATEWAY, message, arrays))

    def _compute(self, worker: FakeWorker) -> None:
        batch = TokenBatch()
        ended = []
        for (handle, attempt), at in worker.held.items():
            batch.append(handle, attempt, 0, at, [at])
            worker.held[handle, attempt] = at + 1
            if at + 1 == self.streams[handle].length:
                ended.append((handle, attempt))
        if len(batch):
            self._send(FromWorker(worker.peer, WorkerTokens(worker.lease, GATEWAY), batch.arrays()))
        for handle, attempt in ended:
            worker.held.pop((handle, attempt), None)
            end = Finished(handle, attempt, 0, "length", -1, 3, 0, self.streams[handle].length, Timings())
            self._send(FromWorker(worker.peer, WorkerFinished(worker.lease, GATEWAY, end)))

    def _beat(self) -> None:
        mine = [OpenChoice(GATEWAY, stream.handle, stream.attempt, 0) for stream in self.open]
        self._send(FromGateway(GATEWAY, GatewayBeat(EPOCH, digest(mine))))
        for worker in list(self.workers.values()):
            held = [OpenChoice(GATEWAY, handle, attempt, 0) for handle, attempt in worker.held]
            self._send(
                FromWorker(
                    worker.peer, WorkerBeat(worker.lease, 1, 0, 0, 0, digest(held)), (as_array("Q", ()),)
                )
            )

    # what they hear -----------------------------------------------------------------------

    def _send(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            if isinstance(action, ToGateway):
                self._gateway_hears(action.message, action.arrays)
            elif isinstance(action, ToWorker) and action.peer in self.workers:
                self._worker_hears(self.workers[action.peer], action.message)

    def _worker_hears(self, worker: FakeWorker, message: Message) -> None:
        assert not isinstance(message, ListHeld), "the digests differ though nothing was lost"
        if isinstance(message, WorkerWelcome):
            worker.lease = message.lease
        elif isinstance(message, Grant):
            for entry in message.requests:
                worker.held[entry.handle, entry.attempt] = entry.generated_counts[0]
        elif isinstance(message, WorkerCancel):
            worker.held.pop((message.handle, message.attempt), None)

    def _gateway_hears(self, message: Message, arrays: tuple[Array, ...]) -> None:
        assert not isinstance(message, ListHeld), "the digests differ though nothing was lost"
        if isinstance(message, Tokens):
            for row in rows(arrays):
                stream = self.streams[row.handle]
                if row.attempt == stream.attempt:
                    assert row.start == stream.tokens, "a token is missing or came twice"
                    stream.tokens += len(row.ids)
        elif isinstance(message, Finished | Rejected | Interrupted):
            stream = self.streams[message.handle]
            assert message.attempt == stream.attempt
            assert stream.end is None
            if isinstance(message, Interrupted):
                self._again(stream, message.suspects)
            else:
                stream.end = message.reason if isinstance(message, Finished) else message.code

    def _again(self, stream: Stream, suspects: int) -> None:
        if stream.progressed:
            stream.crashes_alone = 0
        stream.suspects = suspects
        stream.crashes_alone += suspects == 1
        stream.attempt += 1
        stream.attempt_began_at = stream.tokens
        self._submit(stream)
