"""Requests that wait for a worker of one model: by priority, then tenant, then length; suspects apart.

Adding a request, finding the next one and removing any cost the logarithm of their number and a pass over
the length bands, of which there are at most some forty.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from itertools import islice
from operator import attrgetter

from sortedcontainers import SortedKeyList

from sfllm_scheduler.core.banded import Banded
from sfllm_scheduler.core.lines import Line
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.tenants import FAIRNESS_TOKENS, OUTPUT_WEIGHT, Tenants
from sfllm_scheduler.core.urgency import Alarms, Pressed

COUNTED_PRIORITIES = 64
"""Priorities that are looked through to say how many requests go first; clients choose them freely."""

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


class WaitingRequests:
    """Everything that waits for one model. The `suspects` among it are in no class, the most urgent first.

    `fair` keeps a line for each tenant; otherwise all stand in one. `weights` are the tenants' shares.
    `ordinary_count` says how many are no suspects.
    """

    def __init__(self, *, fair: bool = False, weights: Mapping[str, float] | None = None) -> None:
        self.classes: dict[int, PriorityClass] = {}
        self.tenants = Tenants(weights or {})
        self.suspects: SortedKeyList[Request, tuple[int, Rank]] = SortedKeyList(
            key=attrgetter("priority", "rank")
        )
        self.by_band: Counter[int] = Counter()
        self.ordinary_count = 0
        self._fair = fair
        self._priorities: list[int] = []
        self._spare: PriorityClass | None = None
        self._by_submission: dict[Key, Request] = {}

    def __len__(self) -> int:
        return len(self._by_submission)

    def __contains__(self, request: Request) -> bool:
        return self._by_submission.get(request.key) is request

    def before(self, priority: int) -> int:
        """How many of them, at least, a new request of that priority would wait for."""
        classes = min(bisect_right(self._priorities, priority), COUNTED_PRIORITIES)
        urgent = islice(self._priorities, classes)
        return len(self.suspects) + sum(self.classes[number].count for number in urgent)

    def add(self, request: Request) -> None:
        """Put a request into the queue."""
        self._by_submission[request.key] = request
        if request.suspects:
            self.suspects.add(request)
            return
        self.ordinary_count += 1
        self.by_band[request.band] += 1
        group = self.classes.get(request.priority)
        if group is None:
            group = self._spare or PriorityClass(self.tenants, self._tenant_of)
            self._spare = None
            self.classes[request.priority] = group
            insort(self._priorities, request.priority)
        group.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out: it was cancelled, expired or rejected."""
        self._take_out(request)
        group = self.classes.get(request.priority)
        if group is not None and not request.suspects:
            group.forget_overtakers(self._tenant_of(request))
            self._drop_if_empty(request.priority)

    def grant(self, cohort: list[Request], max_overtakes: int) -> None:
        """Take a cohort, or a group of suspects, out; remember whom its members overtook, and charge them.

        Suspects neither overtake nor are overtaken: they go by other rules.
        """
        passing: dict[tuple[int, str], list[Rank]] = {}
        for request in cohort:
            tenant = self._tenant_of(request)
            line = None if request.suspects else self.classes[request.priority].lines[tenant]
            self._take_out(request)
            self.tenants.charge(tenant, request)
            if line is not None and line.count:
                passing.setdefault((request.priority, tenant), []).append(request.rank)
        for (priority, tenant), ranks in passing.items():
            group = self.classes[priority]
            if tenant in group.lines:
                group.lines[tenant].note_granted(ranks, max_overtakes)
                group.review(tenant)
        for request in cohort:
            self._drop_if_empty(request.priority)

    def leads(self, request: Request) -> bool:
        """Whether an ordinary request that waits is the oldest of its line, with others behind it."""
        if request.suspects:
            return False
        line = self.classes[request.priority].line_of(request)
        return line.count > 1 and line.oldest is request

    def settle(self, request: Request, output: float) -> None:
        """Of a request that was granted a choice has ended, so many output tokens longer than expected."""
        self._adjust(request, output * OUTPUT_WEIGHT)

    def refund(self, request: Request) -> None:
        """An attempt was lost: its tenant is charged when it is granted again."""
        if request.charged:
            self._adjust(request, -request.charged)

    def in_order(self) -> Iterator[PriorityClass]:
        """The priority classes of all but the suspects, most urgent first; none is empty."""
        return (self.classes[priority] for priority in self._priorities)

    def by_submission(self) -> Iterator[Request]:
        """All requests, the one that was submitted longest ago first."""
        return iter(self._by_submission.values())

    def _tenant_of(self, request: Request) -> str:
        return request.tenant if self._fair else ""

    def _adjust(self, request: Request, tokens: float) -> None:
        tenant = self._tenant_of(request)
        self.tenants.adjust(tenant, request, tokens)
        group = self.classes.get(request.priority)
        if group is not None:
            group.review(tenant)

    def _take_out(self, request: Request) -> None:
        del self._by_submission[request.key]
        if request.suspects:
            self.suspects.remove(request)
            return
        self.ordinary_count -= 1
        self.classes[request.priority].remove(request)
        left = self.by_band[request.band] - 1
        if left:
            self.by_band[request.band] = left
        else:
            del self.by_band[request.band]

    def _drop_if_empty(self, priority: int) -> None:
        """Drop a class without requests, but keep one for the next request: to make one takes a while."""
        group = self.classes.get(priority)
        if group is not None and not group.count:
            del self.classes[priority]
            del self._priorities[bisect_left(self._priorities, priority)]
            self._spare = group


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
