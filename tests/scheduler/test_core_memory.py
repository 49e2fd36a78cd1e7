"""The core's tables hold what is live, and for a short while what has ended; nothing else grows."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType

from core_driver import EPOCH, GATEWAY, card, finished

from sfllm.messages import (
    ALL_CHOICES,
    Cancel,
    Capacity,
    GatewayBeat,
    GatewayHello,
    Grant,
    GrantedRequest,
    Sampling,
    Submit,
    WorkerBeat,
    WorkerFinished,
    WorkerHello,
)
from sfllm.wire import as_array
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import Event, FromGateway, FromWorker, Tick, ToWorker
from sfllm_scheduler.core.state import PolicyValues

REQUESTS = 200_000
REQUESTS_A_TURN = 200
WORKER = b"w-1"


class Load:
    """One gateway and one worker; every turn a bunch of requests that end in all kinds of ways."""

    def __init__(self) -> None:
        self.core = SchedulerCore(PolicyValues(lease_seconds=1.0, beat_seconds=0.3), EPOCH)
        self.now = 0.0
        self.handle = 0
        self.lease = 1
        self.granted: list[GrantedRequest] = []
        self._arrays = as_array("I", [1, 2, 3]), as_array("I", ()), as_array("Q", ())
        self.send(FromGateway(GATEWAY, GatewayHello(1)))
        self.send(FromWorker(WORKER, WorkerHello("W1", card(), Capacity(150, 100_000, 4096))))

    def send(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            if isinstance(action, ToWorker) and isinstance(action.message, Grant):
                self.granted += action.message.requests

    def turn(self) -> None:
        """Most finish; one in ten is cancelled in the queue or while it runs, one in fifty expires."""
        for number in range(REQUESTS_A_TURN):
            self.handle += 1
            self.submit(number)
        self.send(Tick())
        granted, self.granted = self.granted, []
        for entry in granted:
            if entry.handle % 10 == 0:
                self.send(FromGateway(GATEWAY, Cancel(entry.handle, entry.attempt, ALL_CHOICES, "test")))
            else:
                self.send(FromWorker(WORKER, WorkerFinished(self.lease, GATEWAY, finished(entry))))
        self.now += 0.3
        self.beat()

    def submit(self, number: int) -> None:
        message = Submit(
            request_id="r",
            handle=self.handle,
            attempt=number % 3,
            model="m",
            choices=(0,),
            generated_counts=(0,),
            sampling=Sampling(max_tokens=4, seed=1),
            priority=number % 7,
            milliseconds_left=10 if number % 50 == 0 else 60_000,
            suspects=4 if number % 40 == 1 else 0,
        )
        self.send(FromGateway(GATEWAY, message, self._arrays))

    def beat(self) -> None:
        state = self.core.state
        self.send(FromGateway(GATEWAY, GatewayBeat(1, state.gateways[GATEWAY].digest)))
        self.send(
            FromWorker(
                WORKER, WorkerBeat(self.lease, 1, 0, 0, 0, state.workers[WORKER].digest), self._arrays[2:]
            )
        )
        self.send(Tick())

    def come_to_rest(self) -> None:
        """Serve what waits, and wait until what has ended is forgotten."""
        for _ in range(40):
            granted, self.granted = self.granted, []
            for entry in granted:
                self.send(FromWorker(WORKER, WorkerFinished(self.lease, GATEWAY, finished(entry))))
            self.now += 0.3
            self.beat()


def objects_of(root: object) -> int:
    """How many objects can be reached from `root`, without modules, classes and functions."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        thing = stack.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | FunctionType):
            seen.add(id(thing))
            stack += gc.get_referents(thing)
    return len(seen)


def test_two_hundred_thousand_requests_leave_nothing_in_memory() -> None:
    load = Load()
    for _ in range(20):
        load.turn()
    load.come_to_rest()
    before = objects_of(load.core)
    while load.handle < REQUESTS:
        load.turn()
        state = load.core.state
        assert len(state.recent) <= 8192
        assert state.deadlines.stored <= 2 * len(state.deadlines) + 65
    load.come_to_rest()
    load.core.check_integrity()
    assert objects_of(load.core) <= before + 100
