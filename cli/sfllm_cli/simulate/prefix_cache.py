"""Which beginnings of prompts a modelled worker still has, by their names: 64 tokens each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sfllm.prefixes import CHUNK_TOKENS, MAX_SUMMARY_PREFIXES


class PrefixCache:
    """Names that are in use, each by so many sequences, and idle ones in the order of their last use."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Room that all of it takes."""
        return CHUNK_TOKENS * (len(self._used) + len(self._idle))

    @property
    def idle_tokens(self) -> int:
        """Room that can be had back."""
        return CHUNK_TOKENS * len(self._idle)

    def longest(self, names: Sequence[int]) -> int:
        """How many names from the first on are here."""
        count = 0
        for name in names:
            if name not in self._used and name not in self._idle:
                break
            count += 1
        return count

    def use(self, names: Sequence[int]) -> int:
        """A sequence uses these; how many of them are new here."""
        new = 0
        for name in names:
            users = self._used.get(name)
            if users is not None:
                self._used[name] = users + 1
                continue
            self._used[name] = 1
            if name in self._idle:
                del self._idle[name]
            else:
                new += 1
        return new

    def leave(self, names: Sequence[int]) -> None:
        """A sequence uses these no more. The end of a prompt goes before its beginning."""
        for name in reversed(names):
            users = self._used[name] - 1
            if users:
                self._used[name] = users
            else:
                del self._used[name]
                self._idle[name] = None

    def evict(self, tokens: int) -> None:
        """Give back at least so much room, of what is idle."""
        for _ in range(min(-(-tokens // CHUNK_TOKENS), len(self._idle))):
            self._idle.popitem(last=False)

    def summary(self) -> list[int]:
        """The names for a beat: those in use, then the idle ones used last."""
        names = list(self._used)[-MAX_SUMMARY_PREFIXES:]
        for name in reversed(self._idle):
            if len(names) >= MAX_SUMMARY_PREFIXES:
                break
            names.append(name)
        return names
