"""Virtual time: what happens next, and nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """The clock of a simulation and its heap of things to do. Times are in seconds.

    What is due at the same time happens in the order in which it was entered, so a run repeats itself.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._entered = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time: float, do: Callable[..., None], *arguments: object) -> None:
        """Do this at `time`, which has not passed yet."""
        self._entered += 1
        heappush(self._heap, (time, self._entered, do, arguments))

    def after(self, seconds: float, do: Callable[..., None], *arguments: object) -> None:
        """Do this in so many seconds."""
        self.at(self.now + seconds, do, *arguments)

    def run(self, until: float, stop: Callable[[], bool]) -> None:
        """Let things happen up to `until`, or until `stop()` says so or nothing is left."""
        heap = self._heap
        while heap and heap[0][0] <= until and not stop():
            self.now, _, do, arguments = heappop(heap)
            self.happened += 1
            do(*arguments)
