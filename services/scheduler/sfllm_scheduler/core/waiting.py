"""Requests that wait for a worker of one model: by priority, then tenant, then length; suspects apart.

Adding a request, finding the next one and removing any cost the logarithm of their number and a pass over
the length bands, of which there are at most some forty.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from operator import attrgetter

from sortedcontainers import SortedKeyList

from sfllm_scheduler.core.priority_class import PriorityClass
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.tenants import OUTPUT_WEIGHT, Tenants

COUNTED_PRIORITIES = 64
"""Priorities that are looked through to say how many requests go first; clients choose them freely."""


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
