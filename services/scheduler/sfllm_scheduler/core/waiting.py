"""Requests that wait for a worker of one model, ordered by priority, age and length band; suspects apart.

Lists sorted by age serve better than heaps here: any request can leave at any time (a
cancel, a deadline) and a retried one comes back in its old place; bisection finds both,
and nothing stale is left behind.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from sfllm_scheduler.core.requests import Key, Rank, Request

_rank = attrgetter("rank")
_urgency = attrgetter("priority", "rank")


class PriorityClass:
    """Waiting requests of one priority.

    `by_age` holds all of them, oldest first, and `bands` the same by length band.
    `overtakers` are the ranks, sorted, of granted requests that are later than the oldest
    one waiting. Its length bounds how often anyone was overtaken: whoever passed a younger
    request has passed every older one too.
    """

    def __init__(self) -> None:
        self.by_age: list[Request] = []
        self.bands: dict[int, list[Request]] = {}
        self.overtakers: list[Rank] = []

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        insort(self.by_age, request, key=_rank)
        insort(self.bands.setdefault(request.band, []), request, key=_rank)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        _remove(self.by_age, request, _rank)
        band = self.bands[request.band]
        _remove(band, request, _rank)
        if not band:
            del self.bands[request.band]

    def overtaking(self, oldest: Rank) -> int:
        """How many granted requests are later than `oldest`."""
        return len(self.overtakers) - bisect_right(self.overtakers, oldest)

    def note_granted(self, ranks: list[Rank], count_up_to: int) -> None:
        """Remember who passed others, after the granted ones were removed.

        Counts above `count_up_to` make no difference; keeping the latest ranks keeps those below exact.
        """
        for rank in ranks:
            insort(self.overtakers, rank)
        if self.by_age:
            del self.overtakers[: bisect_right(self.overtakers, self.by_age[0].rank)]
        del self.overtakers[: max(0, len(self.overtakers) - count_up_to)]


class WaitingRequests:
    """Everything that waits for one model. The `suspects` among it are in no class, the most urgent first."""

    def __init__(self) -> None:
        self.classes: dict[int, PriorityClass] = {}
        self._priorities: list[int] = []
        self._by_submission: dict[Key, Request] = {}
        self.suspects: list[Request] = []

    def __len__(self) -> int:
        return len(self._by_submission)

    def __contains__(self, request: Request) -> bool:
        return self._by_submission.get(request.key) is request

    @property
    def ordinary_count(self) -> int:
        """How many of them are no suspects."""
        return len(self._by_submission) - len(self.suspects)

    def before(self, priority: int) -> int:
        """How many of them a new request of that priority would wait for."""
        urgent = (group for number, group in self.classes.items() if number <= priority)
        return len(self.suspects) + sum(len(group.by_age) for group in urgent)

    def add(self, request: Request) -> None:
        """Put a request into the queue."""
        self._by_submission[request.key] = request
        if request.suspects:
            insort(self.suspects, request, key=_urgency)
            return
        if request.priority not in self.classes:
            self.classes[request.priority] = PriorityClass()
            insort(self._priorities, request.priority)
        self.classes[request.priority].add(request)

    def remove(self, request: Request) -> None:
        """Take a request out: it was cancelled, expired or rejected."""
        del self._by_submission[request.key]
        if request.suspects:
            _remove(self.suspects, request, _urgency)
            return
        self.classes[request.priority].remove(request)
        self._drop_if_empty(request.priority)

    def grant(self, cohort: list[Request], max_overtakes: int) -> None:
        """Take a cohort, or a group of suspects, out and remember whom its members overtook.

        Suspects neither overtake nor are overtaken: they go by other rules.
        """
        if cohort[0].suspects:
            for request in cohort:
                self.remove(request)
            return
        ranks: dict[int, list[Rank]] = {}
        for request in cohort:
            del self._by_submission[request.key]
            self.classes[request.priority].remove(request)
            ranks.setdefault(request.priority, []).append(request.rank)
        for priority, granted in ranks.items():
            self.classes[priority].note_granted(granted, max_overtakes)
            self._drop_if_empty(priority)

    def in_order(self) -> Iterator[PriorityClass]:
        """The priority classes of all but the suspects, most urgent first; none is empty."""
        return (self.classes[priority] for priority in self._priorities)

    def by_submission(self) -> Iterator[Request]:
        """All requests, the one that was submitted longest ago first."""
        return iter(self._by_submission.values())

    def _drop_if_empty(self, priority: int) -> None:
        if not self.classes[priority].by_age:
            del self.classes[priority]
            del self._priorities[bisect_left(self._priorities, priority)]


def _remove(ordered: list[Request], request: Request, order: Callable[[Request], Any]) -> None:
    index = bisect_left(ordered, order(request), key=order)
    if index == len(ordered) or ordered[index] is not request:
        raise KeyError(f"{request.key} does not wait here")
    del ordered[index]
