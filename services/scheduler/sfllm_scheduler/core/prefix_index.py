"""Which workers have which beginnings of prompts in their cache, as far as the scheduler can know.

Of a worker counts what its last beat listed, and what it was granted since the beat before that: a beat
says nothing of grants that were under way, and grants that count at once let nobody choose a worker by
what it had a second ago. Names may be wrong (a cache evicts); they are hints, which cost a prefill at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from sfllm.prefixes import MAX_SUMMARY_PREFIXES

MAX_NAMES = 8192
"""Names that are kept of one worker; the oldest go first."""


class PrefixIndex:
    """Names by worker and workers by name; a worker is called by the number of its lease.

    Looking up the longest beginning is a binary search, for who has a beginning has all shorter ones too
    (where that is not so, a shorter one may be found).
    """

    def __init__(self) -> None:
        self._names: dict[int, dict[int, None]] = {}
        self._since_beat: dict[int, dict[int, None]] = {}
        # Most names have one holder, so a set is made only for the second one.
        self._holders: dict[int, int | dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def join(self, worker: int) -> None:
        """A worker with an empty cache."""
        self._names[worker] = {}
        self._since_beat[worker] = {}

    def leave(self, worker: int) -> None:
        """A worker is gone, and its cache with it."""
        for name in self._names.pop(worker):
            self._drop_holder(name, worker)
        del self._since_beat[worker]

    def grant(self, worker: int, names: Iterable[int]) -> None:
        """A request with these beginnings goes to a worker."""
        known, since_beat = self._names[worker], self._since_beat[worker]
        granted = dict.fromkeys(names)
        since_beat |= granted
        for name in granted:
            if name not in known and self._holders.setdefault(name, worker) != worker:
                self._add_holder(name, worker)
        known |= granted
        self._trim(worker)

    def beat(self, worker: int, summary: Iterable[int]) -> None:
        """A worker lists what it has, most recently used first; a list that is too long is cut."""
        known = self._names[worker]
        kept = dict.fromkeys(islice(summary, MAX_SUMMARY_PREFIXES)) | self._since_beat[worker]
        self._since_beat[worker] = {}
        for name in known.keys() - kept.keys():
            self._drop_holder(name, worker)
        for name in kept.keys() - known.keys():
            self._add_holder(name, worker)
        self._names[worker] = kept
        self._trim(worker)

    def cached(self, worker: int, names: Sequence[int]) -> int:
        """How many of the beginnings a worker has."""
        known = self._names[worker]
        return _longest(names, known.__contains__) if known else 0

    def longest(self, names: Sequence[int]) -> int:
        """How many of the beginnings the worker has that has most of them."""
        return _longest(names, self._holders.__contains__)

    def holders(self, name: int) -> Iterator[int]:
        """The workers that have a beginning, the one that got it last first."""
        holders = self._holders.get(name)
        if holders is None:
            return iter(())
        return iter((holders,)) if isinstance(holders, int) else reversed(holders)

    def names(self, worker: int) -> set[int]:
        """All that a worker has."""
        return set(self._names[worker])

    def held_by_name(self) -> dict[int, list[int]]:
        """The workers that have each name, sorted. Reads everything."""
        return {name: sorted(self.holders(name)) for name in self._holders}

    def _trim(self, worker: int) -> None:
        known = self._names[worker]
        if len(known) > MAX_NAMES:
            for name in list(islice(known, len(known) - MAX_NAMES)):
                del known[name]
                self._since_beat[worker].pop(name, None)
                self._drop_holder(name, worker)

    def _add_holder(self, name: int, worker: int) -> None:
        holders = self._holders.get(name)
        if holders is None:
            self._holders[name] = worker
        elif isinstance(holders, int):
            self._holders[name] = {holders: None, worker: None}
        else:
            holders[worker] = None

    def _drop_holder(self, name: int, worker: int) -> None:
        holders = self._holders[name]
        if isinstance(holders, int):
            del self._holders[name]
            return
        del holders[worker]
        if len(holders) == 1:
            (self._holders[name],) = holders


def _longest(names: Sequence[int], has: Callable[[int], bool]) -> int:
    """How many leading names there are, found by halving. What is found is there, whatever else is not."""
    if not names or not has(names[0]):
        return 0
    low, high = 1, len(names)
    while low < high:
        middle = (low + high + 1) // 2
        if has(names[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return low
