"""Microseconds of the scheduler's core for a request's whole life, by length of queue and size of fleet.

`python bench/scheduler_core.py [--policy auto] [--requests 5000]`. No sockets: messages go straight into the
core. A queue of the given length is filled first; then every turn a few requests end, as many come, and the
core is told that time has passed. What is printed should grow no faster than the logarithm of either number.
"""

from __future__ import annotations

import argparse
import gc
import random
import time

from sfllm.messages import (
    Capacity,
    Finished,
    GatewayHello,
    Grant,
    GrantedRequest,
    ModelCard,
    Sampling,
    Submit,
    Timings,
    WorkerBeat,
    WorkerFinished,
    WorkerHello,
    WorkerProgress,
    WorkerWelcome,
)
from sfllm.wire import as_array
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import Event, FromGateway, FromWorker, Tick, ToWorker
from sfllm_scheduler.core.state import PolicyValues

QUEUES = (100, 1_000, 10_000, 100_000)
FLEETS = (1, 10, 100, 1_000)
GATEWAY = b"g-1"
SLOTS = 16
ENDS_A_TURN = 8
LENGTHS = (64, 100, 300, 700, 1500, 3000)
TENANTS = 20
TURN_SECONDS = 0.01
SETTLED_A_TURN = 100


class Load:
    """One gateway and many workers around a core."""

    def __init__(self, policy: str, workers: int, seed: int) -> None:
        values = PolicyValues(policy=policy, max_queue_requests=10**7, beat_seconds=1e6, lease_seconds=1e9)
        self.core = SchedulerCore(values, 1)
        self.now = 0.0
        self.granted: list[tuple[bytes, GrantedRequest]] = []
        self.leases: dict[bytes, int] = {}
        self.grants: dict[bytes, int] = {}
        self._random = random.Random(seed)
        self._handle = 0
        self._prompts = {tokens: as_array("I", range(tokens)) for tokens in LENGTHS}
        self._none = as_array("I", ())
        self.send(FromGateway(GATEWAY, GatewayHello(1)))
        card = ModelCard("m", (), "m", 0, 8192, 1000, (2,), ())
        for number in range(workers):
            peer = b"w-%d" % number
            self.grants[peer] = 0
            self.send(FromWorker(peer, WorkerHello(f"W{number}", card, Capacity(SLOTS, 10**6, 2048))))
            beat = WorkerBeat(self.leases[peer], 1, 0, 0, 10**6)
            self.send(FromWorker(peer, beat, (as_array("Q", ()),)))

    def send(self, event: Event) -> None:
        """An event into the core; grants are noted, and workers are done with their prompts at once."""
        progress = []
        for action in self.core.handle(event, self.now):
            if isinstance(action, ToWorker):
                if isinstance(action.message, Grant):
                    self.granted += ((action.peer, entry) for entry in action.message.requests)
                    self.grants[action.peer] += 1
                    progress.append(action.peer)
                elif isinstance(action.message, WorkerWelcome):
                    self.leases[action.peer] = action.message.lease
        for peer in dict.fromkeys(progress):
            self.send(FromWorker(peer, WorkerProgress(self.leases[peer], self.grants[peer], 0)))

    def submit(self) -> None:
        """A request of some length from some tenant."""
        self._handle += 1
        tokens = self._random.choice(LENGTHS)
        message = Submit(
            request_id="r",
            handle=self._handle,
            attempt=0,
            model="m",
            choices=(0,),
            generated_counts=(0,),
            sampling=Sampling(max_tokens=256, seed=1),
            priority=0,
            milliseconds_left=1_000_000_000,
            tenant=f"t{self._random.randrange(TENANTS)}",
        )
        arrays = (self._prompts[tokens], self._none, as_array("Q", ()))
        self.send(FromGateway(GATEWAY, message, arrays))

    def finish_one(self) -> None:
        """Some running request ends."""
        index = self._random.randrange(len(self.granted))
        self.granted[index], self.granted[-1] = self.granted[-1], self.granted[index]
        peer, entry = self.granted.pop()
        generated = self._random.randint(1, 256)
        end = Finished(
            entry.handle, 0, 0, "stop", 2, entry.prompt_count, 0, generated, Timings(0.0, 0.1, 1.0)
        )
        self.send(FromWorker(peer, WorkerFinished(self.leases[peer], GATEWAY, end)))

    def fill(self, queue: int) -> None:
        """Keep all workers busy and so many requests waiting."""
        while self.core.state.waiting_count < queue:
            for _ in range(queue + 1 - self.core.state.waiting_count):
                self.submit()
            self.tick()
        for _ in range(queue // SETTLED_A_TURN):
            self.run(ENDS_A_TURN)  # the whole queue becomes late, once

    def tick(self) -> None:
        """Time passes; it takes several turns until all windows are used."""
        self.now += TURN_SECONDS
        self.send(Tick())

    def run(self, requests: int) -> float:
        """Microseconds a request, for so many that come, are granted and end."""
        began = time.process_time()
        for _ in range(requests // ENDS_A_TURN):
            for _ in range(min(ENDS_A_TURN, len(self.granted))):
                self.finish_one()
                self.submit()
            self.tick()
        return (time.process_time() - began) / requests * 1e6


def main() -> None:
    """Print a table: a line for each length of the queue, a column for each size of the fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--queues", type=int, nargs="+", default=QUEUES)
    parser.add_argument("--fleets", type=int, nargs="+", default=FLEETS)
    options = parser.parse_args()
    print("queue \\ fleet" + "".join(f"{fleet:>10}" for fleet in options.fleets))
    for queue in options.queues:
        cells = []
        for fleet in options.fleets:
            load = Load(options.policy, fleet, seed=1)
            load.fill(queue)
            gc.collect()
            cells.append(load.run(options.requests))
        print(f"{queue:>13}" + "".join(f"{cell:>10.0f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
