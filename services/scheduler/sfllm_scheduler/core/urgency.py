"""Which request is most pressing: by response ratio, and by deadlines whose slack is nearly gone."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter
from sys import maxsize

from sortedcontainers import SortedKeyList

from sfllm_scheduler.core.requests import Rank, Request

REQUEST_COST_TOKENS = 64
"""What a request costs besides its prompt, in prompt tokens: places in steps."""

NEARLY_GONE_SECONDS = 2.0
"""Slack below which a request goes first: some steps of a loaded worker, after which it would be too late."""

SLACK_ENTRIES = 64


LATE_SHARE = 0.9
"""Part of the time to a first token after which a waiting request counts as late, less its own prefill."""


def response_ratio(request: Request, now: float) -> float:
    """How long it has waited for each token of prompt that it needs computed.

    Highest response ratio next (Brinch Hansen 1971): short prompts go first, but waiting always wins in
    the end. (The ratio proper is 1 more, which changes no order.)
    """
    return (now - request.rank.arrival) / (request.uncached + REQUEST_COST_TOKENS)


class Alarms:
    """Requests with a time each at which something changes; those that leave before are forgotten."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._added = 0
        self._members: set[Request] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at: float, request: Request) -> None:
        """Remember a request until then."""
        self._added += 1
        self._members.add(request)
        heappush(self._heap, (at, self._added, request))

    def discard(self, request: Request) -> None:
        """A request has left."""
        self._members.discard(request)
        if len(self._heap) > 2 * len(self._members) + SLACK_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[2] in self._members]
            heapify(self._heap)

    def due(self, now: float, most: int = maxsize) -> list[Request]:
        """Take out those whose time has come, or so many of them."""
        due: list[Request] = []
        while self._heap and self._heap[0][0] <= now and len(due) < most:
            request = heappop(self._heap)[2]
            if request in self._members:
                self._members.remove(request)
                due.append(request)
        return due


class Pressed:
    """Requests by the time at which they must start to meet their deadline, earliest first.

    Most requests start long before that; those whose slack is nearly gone lie in a sorted list. One that
    can no longer make it leaves that list: it would push others aside for nothing, and waits on by its
    other merits.
    """

    def __init__(self) -> None:
        self._alarms = Alarms()
        self._urgent: SortedKeyList[Request, tuple[float, Rank]] = SortedKeyList(
            key=attrgetter("latest_start", "rank")
        )

    @property
    def stored(self) -> int:
        """Entries in memory, those of requests that have left included."""
        return len(self._alarms) + len(self._urgent)

    def add(self, request: Request) -> None:
        """A request waits."""
        self._alarms.add(request.latest_start - NEARLY_GONE_SECONDS, request)

    def discard(self, request: Request) -> None:
        """A request does not wait any more."""
        self._alarms.discard(request)
        if self._urgent:
            self._urgent.discard(request)

    def urgent(self, now: float) -> Sequence[Request]:
        """Those whose slack is nearly gone, least slack first."""
        for request in self._alarms.due(now):
            self._urgent.add(request)
        while self._urgent and self._urgent[0].latest_start < now:
            self._urgent.pop(0)
        return self._urgent
