"""Virtual time: what is to happen when, and nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Agenda:
    """The simulation's clock and its heap of (time, order of entry, what to do). Times are in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._entered = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time: float, do: Callable[[], None]) -> None:
        """Do this at `time`, or right after what is due now when that has passed."""
        self._entered += 1
        heappush(self._heap, (max(time, self.now), self._entered, do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do this in so many seconds."""
        self.at(self.now + seconds, do)

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Let things happen up to and including `until`, or earlier once `stop()` says so."""
        while self._heap and self._heap[0][0] <= until and not stop():
            self.now, _, do = heappop(self._heap)
            self.happened += 1
            do()
        if not stop():
            self.now = max(self.now, until)
