"""Deadlines in a heap, so that finding the next one looks at no request that is not due."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from sfllm_scheduler.core.requests import Key

SLACK_ENTRIES = 64


class Deadlines:
    """When each attempt must be over. Entries of ended ones are removed before they are half of all."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Key, int]] = []
        self._live: dict[tuple[Key, int], float] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def stored(self) -> int:
        """Entries in memory, those of ended requests included."""
        return len(self._heap)

    def add(self, key: Key, attempt: int, at: float) -> None:
        """Remember a deadline."""
        self._live[key, attempt] = at
        heappush(self._heap, (at, key, attempt))

    def discard(self, key: Key, attempt: int) -> None:
        """The attempt has ended."""
        self._live.pop((key, attempt), None)
        if len(self._heap) > 2 * len(self._live) + SLACK_ENTRIES:
            self._heap = [(at, key, attempt) for (key, attempt), at in self._live.items()]
            heapify(self._heap)

    def due(self, now: float) -> list[Key]:
        """Take out the requests whose deadline has passed."""
        keys = []
        while self._heap and self._heap[0][0] <= now:
            at, key, attempt = heappop(self._heap)
            if self._live.get((key, attempt)) == at:
                del self._live[key, attempt]
                keys.append(key)
        return keys
