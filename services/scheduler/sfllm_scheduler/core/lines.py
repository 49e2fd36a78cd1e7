"""The line of one tenant in one priority class, and how often those in it were overtaken."""

from __future__ import annotations

from bisect import bisect_right, insort
from operator import attrgetter

from sfllm_scheduler.core.banded import Banded
from sfllm_scheduler.core.requests import Rank, Request

_rank = attrgetter("rank")


class Line:
    """Waiting requests of one tenant and priority, by band of uncached tokens and by band of size.

    `overtakers` are the ranks, sorted, of granted requests that are later than the oldest one waiting. Its
    length bounds how often anyone was overtaken: whoever passed a younger request has passed every older
    one too. `served` is the tenant's count of service by which this line has its place among others
    (`tenants.py`), and `parked` says that the tenant is too far ahead to be served now.
    """

    def __init__(self, tenant: str, served: float) -> None:
        self.tenant = tenant
        self.served = served
        self.parked = False
        self.count = 0
        self.on_time = Banded(attrgetter("band"))
        self.late = Banded(attrgetter("band"))
        self.by_size = Banded(attrgetter("size_band"))
        self.overtakers: list[Rank] = []
        self._bound: int | None = None
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
        return self._bound is not None and len(self.overtakers) >= self._bound

    def overtaking(self, oldest: Rank) -> int:
        """How many granted requests are later than `oldest`."""
        return len(self.overtakers) - bisect_right(self.overtakers, oldest)

    def note_granted(self, ranks: list[Rank], bound: int) -> None:
        """Remember who passed others, after the granted ones were removed.

        Counts above `bound` make no difference; keeping the latest ranks keeps those below exact.
        """
        self._bound = bound
        for rank in ranks:
            insort(self.overtakers, rank)
        self.forget_older()
        del self.overtakers[: max(0, len(self.overtakers) - bound)]

    def forget_older(self) -> None:
        """Drop what is not later than the oldest: it passed nobody who is still here."""
        if self.overtakers:
            oldest = self.oldest.rank if self.count else self.overtakers[-1]
            del self.overtakers[: bisect_right(self.overtakers, oldest)]
