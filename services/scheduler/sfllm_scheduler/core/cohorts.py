"""Which waiting requests go to a worker together: small pure functions behind one signature.

A policy looks at what waits for a model and at the room of one worker, and returns the
cohort to grant, most urgent first. It changes nothing. Whatever the policy:

- higher priority goes first, and within a priority the oldest request is the anchor;
- the cohort fits the worker's free slots and cache, and (but for the anchor) its step budget;
- within a priority no request is passed by more than `max_overtakes` later ones on workers
  that could run it. When that is used up, only the oldest may go next.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from sys import maxsize
from typing import NamedTuple

from sfllm_scheduler.core.requests import Rank, Request
from sfllm_scheduler.core.waiting import PriorityClass, WaitingRequests
from sfllm_scheduler.core.workers import Worker

LOOK_AHEAD = 64
"""Requests of a band that are looked past when they do not fit, so that one decision stays cheap."""


class Room:
    """What is left of one worker while a cohort is put together.

    `share` is the number of sequences after which the cohort is complete, so that a burst
    spreads over workers. `avoid` skips requests that were last on this worker. `prefill_tokens` is what
    is left of its window of outstanding prefill, and `uncached(request)` what of a request its cache lacks.
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
        self._share = share
        self._avoid = avoid

    @property
    def complete(self) -> bool:
        """Whether nothing more goes in."""
        return min(self.slots, self.kv_tokens, self._share, self.prefill_tokens) < 1

    def fits(self, request: Request) -> bool:
        """Whether the request could be granted now."""
        if self._avoid and request.submit.last_worker == self.worker.worker_id:
            return False
        return (
            self.worker.can_ever_run(request)
            and self.worker.slots_for(request) <= self.slots
            and self.worker.charge(request) <= self.kv_tokens
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
    to compute short prompts beside long ones.
    """

    anchor: Callable[[WaitingRequests, float], Request | None]
    cohort: Callable[[WaitingRequests, Room, float, int], list[Request]]
    by_prefix: bool
    shortest_first: bool


def oldest(waiting: WaitingRequests, _now: float) -> Request | None:
    """The oldest request of the most urgent priority class."""
    group = next(waiting.in_order(), None)
    return group.by_age[0] if group is not None else None


def length(waiting: WaitingRequests, room: Room, _now: float, max_overtakes: int) -> list[Request]:
    """Requests of the anchor's length band, then of its neighbours, nearest first.

    Like lengths in one prefill leave no short prompt stuck behind a long one.
    """
    cohort: list[Request] = []
    anchor_band: int | None = None
    for group in waiting.in_order():
        if anchor_band is None:
            anchor_band = group.by_age[0].band
        if not _fill(cohort, group, _nearest_first(group, anchor_band), room, max_overtakes):
            break
    return cohort


def fcfs(waiting: WaitingRequests, room: Room, _now: float, _max_overtakes: int) -> list[Request]:
    """Requests in the order of arrival, whatever their length; nobody passes who could run here."""
    cohort: list[Request] = []
    for group in waiting.in_order():
        if not _fill(cohort, group, iter(group.by_age), room, max_overtakes=0):
            break
    return cohort


POLICIES = {
    "fcfs": Policy(oldest, fcfs, by_prefix=False, shortest_first=False),
    "length": Policy(oldest, length, by_prefix=False, shortest_first=True),
    "prefix": Policy(oldest, fcfs, by_prefix=True, shortest_first=False),
    "auto": Policy(oldest, length, by_prefix=True, shortest_first=True),
}


def _nearest_first(group: PriorityClass, anchor_band: int) -> Iterator[Request]:
    """Candidates of a priority class: by distance from the anchor's band, then by age."""
    for band in sorted(group.bands, key=lambda band: (abs(band - anchor_band), band)):
        yield from group.bands[band]


def _fill(
    cohort: list[Request], group: PriorityClass, candidates: Iterator[Request], room: Room, max_overtakes: int
) -> bool:
    """Add requests of one priority class to the cohort; False when the cohort is complete."""
    passing = _Passing(group, room.worker, max_overtakes)
    skipped = 0
    for wanted in candidates:
        while wanted.rank not in passing.chosen:
            request = passing.next(wanted)
            if not room.fits(request):
                if request is not wanted:
                    return False  # it was passed often enough: it goes next, or nobody does
                skipped += 1
                break
            if cohort and room.uncached(request) > room.step_tokens:
                return False
            room.take(request)
            cohort.append(request)
            passing.choose(request)
            if room.complete:
                return False
        if skipped > LOOK_AHEAD:
            break
    return True


class _Passing:
    """Counts who passes whom while a cohort takes members of one priority class out of order."""

    def __init__(self, group: PriorityClass, worker: Worker, max_overtakes: int) -> None:
        self._group = group
        self._worker = worker
        self._max_overtakes = max_overtakes
        self._oldest = 0
        self._ranks: list[Rank] = []
        self.chosen: set[Rank] = set()

    def next(self, wanted: Request) -> Request:
        """`wanted`, or the oldest request that could run here when that may not be passed again."""
        if not self._worker.can_ever_run(wanted):
            return wanted
        by_age = self._group.by_age
        while by_age[self._oldest].rank in self.chosen or not self._worker.can_ever_run(by_age[self._oldest]):
            self._oldest += 1
        oldest = by_age[self._oldest]
        if wanted is oldest:
            return wanted
        younger = len(self._ranks) - bisect_right(self._ranks, oldest.rank)
        passed = self._group.overtaking(oldest.rank) + younger
        return wanted if passed < self._max_overtakes else oldest

    def choose(self, request: Request) -> None:
        """`request` joins the cohort."""
        self.chosen.add(request.rank)
        insort(self._ranks, request.rank)
