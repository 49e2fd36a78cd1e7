"""How often requests were overtaken in the queue, counted from outside: by arrivals and grants alone."""

from __future__ import annotations

from typing import NamedTuple

from sortedcontainers import SortedList


class _Arrival(NamedTuple):
    """When a request came so many waited, and so many had been granted."""

    waiting: int
    granted: int


class _Line:
    """The waiting requests of one tenant, by number."""

    __slots__ = ("arrivals", "granted", "waiting")

    def __init__(self) -> None:
        self.waiting: SortedList[int] = SortedList()
        self.arrivals: dict[int, _Arrival] = {}
        self.granted = 0


class Overtakes:
    """Counts, for each request, those of its tenant that came later and were granted earlier.

    Numbers ascend in the order of arrival. Each request costs the logarithm of the queue: of the grants
    since it came, those of older requests are as many as wait no more of the ones it found waiting.
    """

    def __init__(self) -> None:
        self.most = 0
        self._lines: dict[str, _Line] = {}

    def came(self, tenant: str, number: int) -> None:
        """A request waits from now on."""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line()
        line.arrivals[number] = _Arrival(len(line.waiting), line.granted)
        line.waiting.add(number)

    def granted(self, tenant: str, number: int) -> None:
        """A request goes to a worker. One that does not wait here is left out."""
        line = self._lines.get(tenant)
        arrival = None if line is None else line.arrivals.pop(number, None)
        if line is None or arrival is None:
            return
        older_waiting = line.waiting.bisect_left(number)
        older_granted = arrival.waiting - older_waiting
        self.most = max(self.most, line.granted - arrival.granted - older_granted)
        del line.waiting[older_waiting]
        line.granted += 1

    def forget(self) -> None:
        """Nobody waits any more: the queue is lost."""
        self._lines.clear()

    def left(self, tenant: str, number: int) -> None:
        """A request waits no more without a grant. Younger ones take it for one that was granted."""
        line = self._lines.get(tenant)
        if line is not None and line.arrivals.pop(number, None) is not None:
            line.waiting.remove(number)
