"""The workers of one model: who has room, who is least busy, and who has which prompt in its cache.

Workers that are ready for any request lie in a list sorted by load, kept right at every change of a worker:
so choosing one looks at a few, however large the fleet. A worker for which nothing that waits is fit is set
aside until something changes there; a new request looks whether it fits the roomiest of those.

The load is the expected cost of a request there in seconds, and the choice is the least sum of it and the
time for the tokens that the worker's cache lacks. Long contexts are not gathered on workers of their own: a
step costs the sum of its contexts (`speed.py`), whoever they are together with, and attention splits long
ones, so no sequence waits for a straggler; spreading context evenly is what keeps the slowest step short.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from sortedcontainers import SortedList

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_scheduler.core.prefix_index import PrefixIndex
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.workers import Worker

PROBES = 8
"""Workers of a list that are asked whether a request fits, until one is found."""

HOLDERS = 4
"""Holders of a prompt's longest beginning that are compared with the least busy worker."""


class Place(NamedTuple):
    """A worker's place in a list; `lease` is unique, and the older one goes first."""

    value: float
    lease: int


class Fleet:
    """The workers of a model by routing id, and what has to be found among them in no time.

    `slots` is what those that take requests run together, `serving` how many those are, and `special` has
    those that are on trial or kept free for a suspect, by lease.
    """

    def __init__(self) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.prefixes = PrefixIndex()
        self.serving = 0
        self.slots = 0
        self.special: dict[int, Worker] = {}
        self._by_lease: dict[int, Worker] = {}
        self._counted: dict[int, int] = {}
        self._ready: SortedList[Place] = SortedList()
        self._aside: SortedList[Place] = SortedList()
        self._places: dict[int, tuple[SortedList[Place], Place]] = {}

    @property
    def ready_count(self) -> int:
        """Workers that may be asked to take more."""
        return len(self._ready)

    def join(self, worker: Worker) -> None:
        """A worker with a new lease."""
        self.workers[worker.peer] = self._by_lease[worker.lease] = worker
        self.prefixes.join(worker.lease)
        self.update(worker)

    def leave(self, worker: Worker) -> bool:
        """A worker is gone. Whether it was here."""
        if self.workers.get(worker.peer) is not worker:
            return False
        self._take_out(worker.lease)
        self._count(worker.lease, 0)
        self.special.pop(worker.lease, None)
        self.prefixes.leave(worker.lease)
        del self.workers[worker.peer], self._by_lease[worker.lease]
        return True

    def update(self, worker: Worker) -> None:
        """Something changed at a worker: its room, its load, or whether it takes requests."""
        lease = worker.lease
        if lease not in self._by_lease:
            return
        self._count(lease, 0 if worker.draining else worker.capacity.slots)
        if worker.probation or worker.reserved is not None:
            self.special[lease] = worker
        else:
            self.special.pop(lease, None)
        self._take_out(lease)
        if worker.is_ready:
            self._put(self._ready, Place(worker.load, lease))

    def set_aside(self, worker: Worker) -> None:
        """Nothing that waits fits this worker now."""
        self._take_out(worker.lease)
        self._put(self._aside, Place(-worker.free_kv_tokens, worker.lease))

    def look_again(self, most: int | None = None) -> None:
        """Ask workers again that were set aside, the roomiest ones first, all or so many of them."""
        for _, lease in list(islice(self._aside, most)):
            self.update(self._by_lease[lease])

    def note_arrival(self, request: Request) -> None:
        """A request came. It is the only one that can fit where the others did not."""
        worker = self._first_that_fits(request, self._aside) if self._aside else None
        if worker is not None:
            self.update(worker)

    def uncached(self, worker: Worker, request: Request) -> int:
        """Tokens of a waiting request that a worker would have to compute."""
        names = request.prefixes
        cached = self.prefixes.cached(worker.lease, names) if len(names) else 0
        return request.tokens - CHUNK_TOKENS * cached

    def least_uncached(self, request: Request) -> int:
        """The same for the worker that has most of it."""
        return request.tokens - CHUNK_TOKENS * self.prefixes.longest(request.prefixes)

    def least_busy(self) -> Worker | None:
        """The ready worker with the least load."""
        return self._by_lease[self._ready[0].lease] if self._ready else None

    def by_load(self) -> Iterator[Worker]:
        """The ready workers, the least busy first. Only while none changes."""
        return (self._by_lease[place.lease] for place in self._ready)

    def choose(self, request: Request, *, by_prefix: bool) -> Worker | None:
        """Where a waiting request would be served soonest; None when no worker that is looked at has room.

        One that lost its last worker goes to another if it can. `by_prefix` weighs in what caches have.
        """
        last = request.submit.last_worker
        options = []
        other = self._first_that_fits(request, self._ready) or self._first_that_fits(request, self._aside)
        if other is not None:
            options.append(other)
        if by_prefix and len(request.prefixes):
            options += self._ready_holders(request)
        if len(options) < 2:
            return options[0] if options else None
        return min(options, key=lambda worker: (worker.worker_id == last, self._cost(worker, request)))

    def places(self) -> tuple[list[Place], list[Place]]:
        """The ready workers' places, and those of workers that were set aside."""
        return list(self._ready), list(self._aside)

    def _cost(self, worker: Worker, request: Request) -> float:
        return worker.load + worker.speed.prefill_token * self.uncached(worker, request)

    def _ready_holders(self, request: Request) -> Iterator[Worker]:
        length = self.prefixes.longest(request.prefixes)
        if length:
            for lease in islice(self.prefixes.holders(request.prefixes[length - 1]), HOLDERS):
                worker = self._by_lease[lease]
                if lease in self._places and _fits(worker, request):
                    yield worker

    def _first_that_fits(self, request: Request, places: SortedList[Place]) -> Worker | None:
        last = None
        for _, lease in islice(places, PROBES):
            worker = self._by_lease[lease]
            if _fits(worker, request):
                if worker.worker_id != request.submit.last_worker:
                    return worker
                last = worker
        return last

    def _count(self, lease: int, slots: int) -> None:
        before = self._counted.pop(lease, 0)
        self.slots += slots - before
        self.serving += (slots > 0) - (before > 0)
        if slots:
            self._counted[lease] = slots

    def _put(self, places: SortedList[Place], place: Place) -> None:
        places.add(place)
        self._places[place.lease] = places, place

    def _take_out(self, lease: int) -> None:
        found = self._places.pop(lease, None)
        if found is not None:
            places, place = found
            places.remove(place)


def _fits(worker: Worker, request: Request) -> bool:
    return (
        worker.can_ever_run(request)
        and worker.slots_for(request) <= worker.free_slots
        and worker.charge(request) <= worker.free_kv_tokens
    )
