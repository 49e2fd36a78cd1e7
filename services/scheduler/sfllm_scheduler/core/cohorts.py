"""Which waiting requests go to a worker together: small pure functions behind one signature.

A policy looks at what waits for a model and at the room of one worker, and returns the cohort to grant,
most urgent first. It changes nothing. Whatever the policy:

- higher priority goes first;
- the cohort fits the worker's free slots and cache, and (but for its first) its step budget and window;
- within a priority class and tenant no request is passed by more than `max_overtakes` later ones on
  workers that could run it (`routing.py` allows so many for each worker that serves the model). When that
  is used up, only the oldest may go next.

A cohort need not fill the worker: who grants asks again, and the next cohort has an anchor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from operator import attrgetter
from sys import maxsize
from typing import NamedTuple

from sfllm_scheduler.core.lines import Line
from sfllm_scheduler.core.passing import Passing
from sfllm_scheduler.core.priority_class import PriorityClass
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.urgency import response_ratio
from sfllm_scheduler.core.waiting import WaitingRequests
from sfllm_scheduler.core.workers import Worker

LOOK_AHEAD = 64
"""Requests that are looked past when they do not fit, so that one decision stays cheap."""

BAND_LOOK_AHEAD = 8
"""The same within one band: if so many do not fit, the others of like length hardly will."""

WIDEN_SECONDS = 0.5
"""For each so long that the anchor has waited, one more band on either side may join its cohort."""

PRIORITIES_LOOKED_AT = 16


class Room:
    """What is left of one worker while a cohort is put together.

    `share` is the number of sequences after which the cohort is complete, so that a burst spreads over
    workers. `avoid` skips requests that were last on this worker; `avoided` says that there was one.
    `prefill_tokens` is what is left of its window of outstanding prefill, and `uncached(request)` what of
    a request its cache lacks.
    """

    def __init__(
        self,
        worker: Worker,
        share: int,
        *,
        avoid: bool,
        prefill_tokens: int = maxsize,
        uncached: Callable[[Request], int] = attrgetter("tokens"),
    ) -> None:
        self.worker = worker
        self.prefill_tokens = prefill_tokens
        self.uncached = uncached
        self.slots = worker.free_slots
        self.kv_tokens = worker.free_kv_tokens
        self.step_tokens = worker.capacity.step_tokens
        self.avoided = False
        self._capacity = worker.capacity
        self._share = share
        self._avoid = avoid

    @property
    def complete(self) -> bool:
        """Whether nothing more goes in."""
        return self.slots < 1 or self.kv_tokens < 1 or self._share < 1 or self.prefill_tokens < 1

    def fits(self, request: Request) -> bool:
        """Whether the request could be granted now."""
        if self._avoid and request.submit.last_worker == self.worker.worker_id:
            self.avoided = True
            return False
        capacity = self._capacity
        return (
            request.longest < self.worker.context_limit
            and min(request.slots, capacity.slots) <= self.slots
            and min(request.kv_tokens, capacity.kv_tokens) <= self.kv_tokens
        )

    def take(self, request: Request) -> None:
        """Set room aside for a member of the cohort."""
        self.slots -= self.worker.slots_for(request)
        self._share -= request.slots
        self.kv_tokens -= self.worker.charge(request)
        uncached = self.uncached(request)
        self.prefill_tokens -= min(uncached, self.worker.capacity.step_tokens)
        self.step_tokens -= uncached


class Policy(NamedTuple):
    """`anchor(waiting, now)` is the most urgent ordinary request.

    `cohort(waiting, room, now, max_overtakes)` is what goes to that worker next, empty when nothing that
    waits fits. `by_prefix`: workers are chosen by what they have cached. `shortest_first`: they are told
    to compute short prompts beside long ones. `fair`: tenants are served in proportion to their weights.
    """

    anchor: Callable[[WaitingRequests, float], Request | None]
    cohort: Callable[[WaitingRequests, Room, float, int], list[Request]]
    by_prefix: bool
    shortest_first: bool
    fair: bool = False


def oldest(group: PriorityClass, _now: float) -> Request | None:
    """The request that came first, of tenants that are not ahead of others."""
    return next(group.by_age(), None)


def most_pressing(group: PriorityClass, now: float) -> Request | None:
    """The band head with the highest response ratio, or its line's oldest if that was passed too often.

    Requests that can still have their first token in the time wished for go before those that cannot: in
    a queue that is too long first come first served makes everybody late, and whom it is too late for
    gains nothing. (As adaptive LIFO does: Maurer, "Fail at Scale", ACM Queue 2015.)
    """
    group.note_time(now)
    heads = group.on_time.heads() or group.late.heads()
    if not heads:
        return None
    head, highest = heads[0], response_ratio(heads[0], now)
    for other in heads[1:]:
        ratio = response_ratio(other, now)
        if ratio > highest or (ratio == highest and other.uncached < head.uncached):
            head, highest = other, ratio
    line = group.line_of(head)
    return line.oldest if line.spent else head


def fcfs(waiting: WaitingRequests, room: Room, _now: float, _max_overtakes: int) -> list[Request]:
    """Requests in the order of arrival, whatever their length; nobody passes who could run here."""
    cohort = _Cohort(room, 0, local=False)
    for group in islice(waiting.in_order(), PRIORITIES_LOOKED_AT):
        cohort.fill(group, group.by_age(), LOOK_AHEAD)
        if cohort.complete:
            break
    return cohort.members


def by_arrival(waiting: WaitingRequests, room: Room, now: float, max_overtakes: int) -> list[Request]:
    """Requests in the order of arrival, but for those that another worker has more of in its cache."""
    cohort = _Cohort(room, max_overtakes, local=True)
    for group in islice(waiting.in_order(), PRIORITIES_LOOKED_AT):
        cohort.fill(group, group.urgent(now), BAND_LOOK_AHEAD)
        cohort.fill(group, group.by_age(), LOOK_AHEAD)
        if cohort.members:
            break
    return cohort.members


def by_length(
    waiting: WaitingRequests, room: Room, now: float, max_overtakes: int, *, local: bool
) -> list[Request]:
    """What is urgent, the most pressing request, its length band, and neighbouring bands as it ages.

    Like lengths in one prefill leave no short prompt stuck behind a long one. All other bands, and then
    tenants that are ahead of others, are looked through only if nothing else fits. `local` leaves out
    members that another worker has more of in its cache.
    """
    cohort = _Cohort(room, max_overtakes, local=local)
    for group in islice(waiting.in_order(), PRIORITIES_LOOKED_AT):
        cohort.fill(group, group.urgent(now), BAND_LOOK_AHEAD)
        anchor = most_pressing(group, now)
        if anchor is not None:
            cohort.fill(group, iter((anchor,)), BAND_LOOK_AHEAD)
        if anchor is not None and not cohort.complete and len(cohort.members) < group.count:
            reach = (now - anchor.rank.arrival) / WIDEN_SECONDS
            for late, band in _nearest_first(group, anchor):
                if cohort.complete or (cohort.members and abs(band - anchor.band) > reach):
                    break
                cohort.fill(group, group.in_band(band, late=late), BAND_LOOK_AHEAD)
        if not cohort.members:
            cohort.fill(group, group.in_parked_lines(), LOOK_AHEAD)
        if cohort.members:
            break
    return cohort.members


def _nearest_first(group: PriorityClass, anchor: Request) -> Iterator[tuple[bool, int]]:
    """Bands by their distance from the anchor's: first of requests that are late if it is, or on time."""
    for late in (anchor.late, not anchor.late):
        bands = group.heads(late=late).bands()
        for band in sorted(bands, key=lambda band: (abs(band - anchor.band), band)):
            yield late, band


def _first(
    choose: Callable[[PriorityClass, float], Request | None], *, urgent: bool
) -> Callable[[WaitingRequests, float], Request | None]:
    """The anchor of a whole queue: its first class's most urgent request, or else the one that is chosen."""

    def anchor(waiting: WaitingRequests, now: float) -> Request | None:
        group = next(waiting.in_order(), None)
        if group is None:
            return None
        first = next(group.urgent(now), None) if urgent else None
        return first or choose(group, now)

    return anchor


_BY_LENGTH = _first(most_pressing, urgent=True)

POLICIES = {
    "fcfs": Policy(_first(oldest, urgent=False), fcfs, by_prefix=False, shortest_first=False),
    "length": Policy(_BY_LENGTH, partial(by_length, local=False), by_prefix=False, shortest_first=True),
    "prefix": Policy(_first(oldest, urgent=True), by_arrival, by_prefix=True, shortest_first=False),
    "auto": Policy(
        _BY_LENGTH, partial(by_length, local=True), by_prefix=True, shortest_first=True, fair=True
    ),
}


class _Cohort:
    """A cohort while it is put together. `local`: no other worker may have more of its later members."""

    def __init__(self, room: Room, max_overtakes: int, *, local: bool) -> None:
        self.members: list[Request] = []
        self.complete = room.complete
        self._room = room
        self._most = room.slots
        self._max_overtakes = max_overtakes
        self._local = local
        self._chosen: set[Request] = set()
        self._passing: dict[Line, Passing] = {}

    def fill(self, group: PriorityClass, candidates: Iterator[Request], look_ahead: int) -> None:
        """Add requests of one priority class while they fit."""
        skipped = 0
        for wanted in () if self.complete else candidates:
            if wanted in self._chosen:
                continue
            if not self._add(wanted, self._passing_in(group.line_of(wanted))):
                skipped += 1
            if self.complete or skipped > look_ahead:
                return

    def _passing_in(self, line: Line) -> Passing | None:
        """Who may pass whom in a line; None if so few did that nobody's bound is near."""
        if len(line.overtakers) + self._most < self._max_overtakes:
            return None
        if line not in self._passing:
            self._passing[line] = Passing(line, self._room.worker, self._max_overtakes)
        return self._passing[line]

    def _add(self, wanted: Request, passing: Passing | None) -> bool:
        """Take a request in, and before it those of its line that may not be passed again."""
        while wanted not in self._chosen and not self.complete:
            request = wanted if passing is None else passing.next(wanted)
            if not self._room.fits(request):
                return False
            if self.members and not self._joins(request):
                return False
            self._room.take(request)
            self.members.append(request)
            self._chosen.add(request)
            if passing is not None:
                passing.choose(request)
            self.complete = self._room.complete or self._room.step_tokens < 1
        return True

    def _joins(self, request: Request) -> bool:
        uncached = self._room.uncached(request)
        if uncached > self._room.step_tokens:
            self.complete = True
            return False
        return not self._local or uncached <= request.uncached
