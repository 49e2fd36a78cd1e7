"""Waiting requests of one priority: a line for each tenant, and the heads of all lines together."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from operator import attrgetter

from sfllm_scheduler.core.banded import Banded
from sfllm_scheduler.core.lines import Line
from sfllm_scheduler.core.requests import Rank, Request
from sfllm_scheduler.core.tenants import FAIRNESS_TOKENS, Tenants
from sfllm_scheduler.core.urgency import Alarms, Pressed

LATE_AT_A_TIME = 64

_band = attrgetter("band")


class PriorityClass:
    """Waiting requests of one priority: a line for each tenant.

    The heads of the lines' bands lie together in `on_time` and `late`, but for tenants that are too far ahead
    of the least served one: their lines are parked until the others have caught up.
    """

    def __init__(self, tenants: Tenants, tenant_of: Callable[[Request], str]) -> None:
        self._tenants = tenants
        self._tenant_of = tenant_of
        self.lines: dict[str, Line] = {}
        self.on_time = Banded(_band)
        self.late = Banded(_band)
        self.parked: list[tuple[float, str]] = []
        self._by_served: list[tuple[float, str]] = []
        self._pressed = Pressed()
        self._becoming_late = Alarms()
        self.count = 0

    def add(self, request: Request) -> None:
        """Put a request at its place in the line of its tenant."""
        tenant = self._tenant_of(request)
        line = self.lines.get(tenant)
        if line is None:
            line = self._open_line(tenant)
        self._add_to(line, request, line.add)
        self._pressed.add(request)
        self._becoming_late.add(request.late_at, request)
        self.count += 1

    def remove(self, request: Request) -> None:
        """Take a request out."""
        line = self.line_of(request)
        self._remove_from(line, request, line.remove)
        self._pressed.discard(request)
        self._becoming_late.discard(request)
        self.count -= 1
        if not line.count:
            self._close_line(line)

    def note_time(self, now: float) -> None:
        """Set apart who is late by now, not too many at a time: a burst becomes late all at once."""
        for request in self._becoming_late.due(now, LATE_AT_A_TIME):
            line = self.line_of(request)
            self._remove_from(line, request, line.on_time.remove)
            request.late = True
            self._add_to(line, request, line.late.add)

    def review(self, tenant: str) -> None:
        """What a tenant was served has changed: give its line its new place."""
        line = self.lines.get(tenant)
        served = self._tenants.served(tenant)
        if line is None or line.served == served:
            return
        _drop(self._by_served, (line.served, tenant))
        insort(self._by_served, (served, tenant))
        if line.parked:
            _drop(self.parked, (line.served, tenant))
            insort(self.parked, (served, tenant))
        line.served = served
        if not line.parked and served > self._limit:
            self._park(line)
        self._unpark_those_in_reach()

    def forget_overtakers(self, tenant: str) -> None:
        """A request of that tenant has left, which may have been the oldest."""
        if tenant in self.lines:
            self.lines[tenant].forget_older()

    def line_of(self, request: Request) -> Line:
        """The line in which a waiting request stands."""
        return self.lines[self._tenant_of(request)]

    def heads(self, *, late: bool) -> Banded:
        """The oldest request of each line and band, of those that are late or of the others."""
        return self.late if late else self.on_time

    def in_band(self, band: int, *, late: bool) -> Iterator[Request]:
        """The requests of a band, late ones or the others, oldest first; parked lines are left out."""
        following: list[tuple[Rank, Request, Iterator[Request]]] = []
        for head in self.heads(late=late).members(band):
            while following and following[0][0] < head.rank:
                yield from _next_of(following)
            members = self.line_of(head).banded(late=late).members(band)
            next(members)
            yield head
            _follow(following, members)
        while following:
            yield from _next_of(following)

    def by_age(self) -> Iterator[Request]:
        """All requests that are not parked, oldest first."""
        lines = [line for line in self.lines.values() if not line.parked]
        following: list[tuple[Rank, Request, Iterator[Request]]] = []
        for line in lines:
            _follow(following, line.by_size.by_age())
        while following:
            yield from _next_of(following)

    def in_parked_lines(self) -> Iterator[Request]:
        """Requests of tenants that are ahead of others, the least served first."""
        for _, tenant in self.parked:
            yield from self.lines[tenant].by_size.by_age()

    def urgent(self, now: float) -> Iterator[Request]:
        """Requests that must start now to be in time, least slack first; parked lines are left out."""
        pressed = self._pressed.urgent(now)
        if not pressed:
            return iter(())
        return (request for request in pressed if not self.line_of(request).parked)

    @property
    def _limit(self) -> float:
        return self._by_served[0][0] + FAIRNESS_TOKENS

    def _open_line(self, tenant: str) -> Line:
        least = self._by_served[0][0] if self._by_served else None
        line = self.lines[tenant] = Line(tenant, self._tenants.lift(tenant, least))
        insort(self._by_served, (line.served, tenant))
        if line.served > self._limit:
            self._park(line)
        return line

    def _close_line(self, line: Line) -> None:
        del self.lines[line.tenant]
        _drop(self._by_served, (line.served, line.tenant))
        if line.parked:
            _drop(self.parked, (line.served, line.tenant))
        self._unpark_those_in_reach()

    def _park(self, line: Line) -> None:
        line.parked = True
        insort(self.parked, (line.served, line.tenant))
        for late in (False, True):
            for head in line.banded(late=late).heads():
                self.heads(late=late).remove(head)

    def _unpark(self, line: Line) -> None:
        line.parked = False
        _drop(self.parked, (line.served, line.tenant))
        for late in (False, True):
            for head in line.banded(late=late).heads():
                self.heads(late=late).add(head)

    def _unpark_those_in_reach(self) -> None:
        while self.parked and self.parked[0][0] <= self._limit:
            self._unpark(self.lines[self.parked[0][1]])

    def _add_to(self, line: Line, request: Request, add: Callable[[Request], None]) -> None:
        """Add a request to a line, and keep the head of its band right."""
        before = line.banded(late=request.late).first(request.band)
        add(request)
        if (before is None or request.rank < before.rank) and not line.parked:
            heads = self.heads(late=request.late)
            if before is not None:
                heads.remove(before)
            heads.add(request)

    def _remove_from(self, line: Line, request: Request, remove: Callable[[Request], None]) -> None:
        """Remove a request from a line, and keep the head of its band right."""
        band = line.banded(late=request.late)
        was_head = band.first(request.band) is request
        remove(request)
        if was_head and not line.parked:
            heads = self.heads(late=request.late)
            heads.remove(request)
            after = band.first(request.band)
            if after is not None:
                heads.add(after)


def _drop(places: list[tuple[float, str]], place: tuple[float, str]) -> None:
    """Take one out of a sorted list."""
    del places[bisect_left(places, place)]


def _follow(following: list[tuple[Rank, Request, Iterator[Request]]], members: Iterator[Request]) -> None:
    """Put the next of a line among those that the other lines have next."""
    request = next(members, None)
    if request is not None:
        heappush(following, (request.rank, request, members))


def _next_of(following: list[tuple[Rank, Request, Iterator[Request]]]) -> Iterator[Request]:
    """The oldest of what the lines have next; the one behind it takes its place."""
    _, request, members = heappop(following)
    yield request
    _follow(following, members)
