"""The workers of one model: who has room, who is least busy, and who has which prompt in its cache.

Workers that are ready for any request lie in a list sorted by load. Those that have changed get their new
places when the list is next looked at, so that many messages in a row cost one move; choosing a worker
looks at a few, however large the fleet. (Plain lists: to move the 80 KB of 10,000 places is a microsecond's
work, less than what a tree costs.) A worker for which nothing that waits is fit is set
aside until something changes there; a new request looks whether it fits the roomiest of those.

The load is the expected cost of a request there in seconds, and the choice is the least sum of it and the
time for the tokens that the worker's cache lacks. Long contexts are not gathered on workers of their own: a
step costs the sum of its contexts (`speed.py`), whoever they are together with, and attention splits long
ones, so no sequence waits for a straggler; spreading context evenly is what keeps the slowest step short.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_scheduler.core.prefix_index import PrefixIndex
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.workers import Worker

PROBES = 8
"""Workers of a list that are asked whether a request fits, until one is found."""

HOLDERS = 4
"""Holders of a prompt's longest beginning that are compared with the least busy worker."""


Place = tuple[float, int]
"""A worker's place in a list: a value and its lease, which is unique; the older one goes first."""


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
        self._ready: list[Place] = []
        self._aside: list[Place] = []
        self._places: dict[int, tuple[list[Place], Place]] = {}
        self._changed: dict[int, Worker] = {}
        self._context_limits: list[int] = []

    @property
    def ready_count(self) -> int:
        """Workers that may be asked to take more."""
        if self._changed:
            self._settle()
        return len(self._ready)

    @property
    def any_place(self) -> bool:
        """Whether any worker has room, for some request at least."""
        if self._changed:
            self._settle()
        return bool(self._ready or self._aside)

    @property
    def any_aside(self) -> bool:
        """Whether a worker is set aside, unless it has changed since."""
        return bool(self._aside)

    @property
    def context_limit(self) -> int:
        """Contexts that some worker could run are shorter than this; 0 without workers."""
        return self._context_limits[-1] if self._context_limits else 0

    def join(self, worker: Worker) -> None:
        """A worker with a new lease."""
        self.workers[worker.peer] = self._by_lease[worker.lease] = worker
        self.prefixes.join(worker.lease)
        insort(self._context_limits, worker.context_limit)
        self.update(worker)

    def leave(self, worker: Worker) -> bool:
        """A worker is gone. Whether it was here."""
        if self.workers.get(worker.peer) is not worker:
            return False
        self._take_out(worker.lease)
        self._changed.pop(worker.lease, None)
        self._count(worker.lease, 0)
        self.special.pop(worker.lease, None)
        del self._context_limits[bisect_left(self._context_limits, worker.context_limit)]
        self.prefixes.leave(worker.lease)
        del self.workers[worker.peer], self._by_lease[worker.lease]
        return True

    def update(self, worker: Worker) -> None:
        """Something changed at a worker: its room, its load, or whether it takes requests."""
        lease = worker.lease
        if lease not in self._by_lease:
            return
        slots = 0 if worker.draining else worker.capacity.slots
        if self._counted.get(lease, 0) != slots:
            self._count(lease, slots)
        if worker.probation or worker.reserved is not None:
            self.special[lease] = worker
        elif lease in self.special:
            del self.special[lease]
        self._changed[lease] = worker

    def set_aside(self, worker: Worker) -> None:
        """Nothing that waits fits this worker now."""
        self._changed.pop(worker.lease, None)
        self._take_out(worker.lease)
        self._put(self._aside, (-worker.free_kv_tokens, worker.lease))

    def look_again(self, most: int | None = None) -> None:
        """Ask workers again that were set aside, the roomiest ones first, all or so many of them."""
        if self._aside:
            self._settle()
            for _, lease in self._aside[:most]:
                self.update(self._by_lease[lease])

    def note_arrival(self, request: Request) -> None:
        """A request came. It is the only one that can fit where the others did not."""
        if self._aside:
            self._settle()
            worker = self._first_that_fits(request, self._aside)
            if worker is not None:
                self.update(worker)

    def uncached(self, worker: Worker, request: Request) -> int:
        """Tokens of a waiting request that a worker would have to compute."""
        names = request.names
        if not names:
            return request.tokens
        return request.tokens - CHUNK_TOKENS * self.prefixes.cached(worker.lease, names)

    def least_uncached(self, request: Request) -> int:
        """The same for the worker that has most of it."""
        return request.tokens - CHUNK_TOKENS * self.prefixes.longest(request.names)

    def least_busy(self) -> Worker | None:
        """The ready worker with the least load."""
        self._settle()
        return self._by_lease[self._ready[0][1]] if self._ready else None

    def by_load(self) -> Iterator[Worker]:
        """The ready workers, the least busy first. Only while none changes."""
        self._settle()
        return (self._by_lease[lease] for _, lease in self._ready)

    def choose(self, request: Request, *, by_prefix: bool) -> Worker | None:
        """Where a waiting request would be served soonest; None when no worker that is looked at has room.

        One that lost its last worker goes to another if it can. `by_prefix` weighs in what caches have.
        """
        if self._changed:
            self._settle()
        other = self._first_that_fits(request, self._ready) or self._first_that_fits(request, self._aside)
        if not by_prefix or not request.names:
            return other
        options = [] if other is None else [(other, self.uncached(other, request))]
        options += ((worker, left) for worker, left in self._ready_holders(request) if worker is not other)
        if len(options) < 2:
            return options[0][0] if options else None
        last = request.submit.last_worker
        return min(options, key=lambda option: (option[0].worker_id == last, _cost(*option)))[0]

    def places(self) -> tuple[list[Place], list[Place]]:
        """The ready workers' places, and those of workers that were set aside."""
        self._settle()
        return list(self._ready), list(self._aside)

    def _ready_holders(self, request: Request) -> Iterator[tuple[Worker, int]]:
        """Workers that have most of a request and room for it, with the tokens that they lack."""
        names = request.names
        length = self.prefixes.longest(names)
        if length:
            left = request.tokens - CHUNK_TOKENS * length
            for lease in islice(self.prefixes.holders(names[length - 1]), HOLDERS):
                if lease in self._places:
                    worker = self._by_lease[lease]
                    if _fits(worker, request):
                        yield worker, left

    def _first_that_fits(self, request: Request, places: list[Place]) -> Worker | None:
        last = None
        for _, lease in places[:PROBES]:
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

    def _settle(self) -> None:
        """Give the workers that have changed their new places."""
        ready, places = self._ready, self._places
        for lease, worker in self._changed.items():
            place = (worker.load, lease) if worker.is_ready else None
            found = places.get(lease)
            if found is not None:
                if found[0] is ready and found[1] == place:
                    continue
                self._take_out(lease)
            if place is not None:
                insort(ready, place)
                places[lease] = ready, place
        self._changed.clear()

    def _put(self, places: list[Place], place: Place) -> None:
        insort(places, place)
        self._places[place[1]] = places, place

    def _take_out(self, lease: int) -> None:
        found = self._places.pop(lease, None)
        if found is not None:
            places, place = found
            del places[bisect_left(places, place)]


def _fits(worker: Worker, request: Request) -> bool:
    capacity = worker.capacity
    return (
        request.longest < worker.context_limit
        and min(request.slots, capacity.slots) <= capacity.slots - worker.used_slots
        and min(request.kv_tokens, capacity.kv_tokens) <= capacity.kv_tokens - worker.used_kv_tokens
    )


def _cost(worker: Worker, uncached: int) -> float:
    """Seconds that so many tokens take there, behind what is there already."""
    return worker.load + worker.speed.prefill_token * uncached
