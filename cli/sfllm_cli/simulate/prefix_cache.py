"""Which beginnings of prompts a modelled worker still has, by their names: 64 tokens each."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class PrefixCache:
    """Names that are in use, each by so many sequences, and idle ones in the order of their last use."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, name: int) -> bool:
        return name in self._used or name in self._idle

    @property
    def used(self) -> int:
        """Names in use."""
        return len(self._used)

    @property
    def idle(self) -> int:
        """Names whose room can be had back."""
        return len(self._idle)

    def longest(self, names: Sequence[int]) -> int:
        """How many names from the first on are here."""
        count = 0
        for name in names:
            if name not in self._used and name not in self._idle:
                break
            count += 1
        return count

    def idle_among(self, names: Sequence[int]) -> int:
        """How many of these are idle."""
        return sum(name in self._idle for name in names)

    def use(self, names: Sequence[int]) -> None:
        """A sequence uses these, which were here or are new."""
        used = self._used
        for name in names:
            users = used.get(name)
            if users is None:
                used[name] = 1
                self._idle.pop(name, None)
            else:
                used[name] = users + 1

    def leave(self, names: Sequence[int]) -> None:
        """A sequence uses these no more. The end of a prompt goes before its beginning."""
        used = self._used
        for name in reversed(names):
            users = used[name] - 1
            if users:
                used[name] = users
            else:
                del used[name]
                self._idle[name] = None

    def evict(self, names: int) -> None:
        """Drop so many idle names, those used longest ago first. Raises KeyError when there are fewer."""
        for _ in range(names):
            self._idle.popitem(last=False)

    def check_integrity(self, references: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the names in use are those that sequences refer to, each so often."""
        users = Counter(name for names in references for name in names)
        assert self._used == users
        assert not self._idle.keys() & users.keys()
