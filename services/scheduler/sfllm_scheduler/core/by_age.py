"""Requests in the order of their age.

Most come at the end and leave at the front, so both cost nothing; but any can leave at any time (a cancel, a
deadline), and a retried one comes back in its old place: those are found by bisection, and a list is moved
by memmove, 8 bytes a request. (A list of chunks takes several times as long for each of these.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from sfllm_scheduler.core.requests import Request

_rank = attrgetter("rank")
_GONE: Any = None
LEAST_GONE = 32


class ByAge:
    """Requests, oldest first. The first `_start` places are those of requests that have left."""

    __slots__ = ("_requests", "_start")

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._start = 0

    def __len__(self) -> int:
        return len(self._requests) - self._start

    def __iter__(self) -> Iterator[Request]:
        requests = self._requests
        for index in range(self._start, len(requests)):
            yield requests[index]

    @property
    def first(self) -> Request:
        """The oldest. Raises IndexError when there is none."""
        return self._requests[self._start]

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        requests = self._requests
        if len(requests) == self._start or requests[-1].rank < request.rank:
            requests.append(request)
        else:
            insort(requests, request, lo=self._start, key=_rank)

    def remove(self, request: Request) -> None:
        """Take a request out. Raises ValueError when it is not here."""
        requests, start = self._requests, self._start
        if start < len(requests) and requests[start] is request:
            requests[start] = _GONE
            self._start = start + 1
            if self._start >= LEAST_GONE and 2 * self._start >= len(requests):
                del requests[: self._start]
                self._start = 0
            return
        index = bisect_left(requests, request.rank, lo=start, key=_rank)
        if index == len(requests) or requests[index] is not request:
            raise ValueError("the request is not here")
        del requests[index]
