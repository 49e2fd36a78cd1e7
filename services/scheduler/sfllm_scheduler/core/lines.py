"""The line of one tenant in one priority class, and how often those in it were overtaken."""

from __future__ import annotations

from bisect import bisect_right, insort
from operator import attrgetter

from sfllm_scheduler.core.banded import Banded
from sfllm_scheduler.core.requests import Rank, Request

_rank = attrgetter("rank")
_band = attrgetter("band")
_size_band = attrgetter("size_band")
SLACK_RANKS = 64


class Line:
    """Waiting requests of one tenant and priority, by band of uncached tokens and by band of size.

    `overtakers` are the ranks, sorted, of granted requests that are later than the oldest one waiting (and
    some that are not any more). Their number bounds how often anyone was overtaken: whoever passed a younger
    request has passed every older one too. `served` is the tenant's count of service by which this line has
    its place among others (`tenants.py`), `parked` says that it is too far ahead to be served now.
    """

    def __init__(self, tenant: str, served: float) -> None:
        self.tenant = tenant
        self.served = served
        self.parked = False
        self.count = 0
        self.on_time = Banded(_band)
        self.late = Banded(_band)
        self.by_size = Banded(_size_band)
        self.overtakers: list[Rank] = []
        self._bound: int | None = None
        self._most = 0
        self._oldest: Request | None = None

    def banded(self, *, late: bool) -> Banded:
        """Its requests by band of uncached tokens: those that are late, or the others."""
        return self.late if late else self.on_time

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        self.banded(late=request.late).add(request)
        self.by_size.add(request)
        self.count += 1
        if self._oldest is not None and request.rank < self._oldest.rank:
            self._oldest = request

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self.banded(late=request.late).remove(request)
        self.by_size.remove(request)
        self.count -= 1
        if self._oldest is request:
            self._oldest = None

    @property
    def oldest(self) -> Request:
        """The request that came first. Only while there is one."""
        if self._oldest is None:
            self._oldest = min(self.by_size.heads(), key=_rank)
        return self._oldest

    @property
    def spent(self) -> bool:
        """Whether the oldest may not be overtaken any more."""
        bound = self._bound
        if bound is None or len(self.overtakers) < bound:
            return False
        return self.overtaking(self.oldest.rank) >= bound

    def overtaking(self, oldest: Rank) -> int:
        """How many granted requests are later than `oldest`."""
        return len(self.overtakers) - bisect_right(self.overtakers, oldest)

    def note_granted(self, ranks: list[Rank], bound: int) -> None:
        """Remember who passed others, after the granted ones were removed.

        Counts above the highest `bound` so far make no difference; keeping the latest ranks keeps those
        below exact.
        """
        self._bound = bound
        self._most = max(self._most, bound)
        for rank in ranks:
            insort(self.overtakers, rank)
        self.forget_older()
        over = len(self.overtakers) - self._most
        if over > self._most + SLACK_RANKS:
            del self.overtakers[:over]

    def forget_older(self) -> None:
        """Drop what is not later than the oldest: it passed nobody who is still here.

        Not before that is half of them, since what stays is moved.
        """
        if not self.count:
            self.overtakers.clear()
        elif len(self.overtakers) > SLACK_RANKS:
            older = bisect_right(self.overtakers, self.oldest.rank)
            if 2 * older >= len(self.overtakers):
                del self.overtakers[:older]
