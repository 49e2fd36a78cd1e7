"""The blocks of a modelled worker's cache, counted rather than kept."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.prefix_cache import PrefixCache


class Blocks:
    """Blocks that single sequences have, and those of beginnings, which any number shares.

    Invariant: `own` and those of the cache's names are at most `total`. A sequence that decodes takes a
    block when its context is a multiple of a block, which happens in every `size`th step: so sequences are
    counted by the remainder of their turn, and a run of steps need not look at each.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total = total
        self.size = size
        self.own = 0
        self.cache = PrefixCache()
        self._rows = 0
        self._turns = [0] * size
        self._name_blocks = CHUNK_TOKENS // size

    def needed(self, tokens: int, names: int) -> int:
        """Blocks that a sequence of so many tokens has for itself, when it shares those of so many names."""
        return -(-tokens // self.size) - self._name_blocks * names

    @property
    def free(self) -> int:
        """Blocks that nobody refers to, those of idle beginnings included."""
        return self.total - self.own - self._name_blocks * self.cache.used

    def fits(self, count: int, names: Sequence[int]) -> bool:
        """Whether there are so many blocks for a sequence that refers to names which are in the cache."""
        return count <= self.free - self._name_blocks * self.cache.idle_among(names)

    def take(self, count: int, names: Sequence[int]) -> None:
        """A sequence takes blocks, which must fit, and refers to these names."""
        self.cache.use(names)
        self.own += count
        self._make_room()

    def give(self, count: int, names: Sequence[int]) -> None:
        """A sequence gives blocks back, and refers to beginnings no more."""
        self.own -= count
        self.cache.leave(names)

    def publish(self, names: Sequence[int]) -> None:
        """Blocks of one sequence become those of beginnings; what others had published is kept once."""
        self.own -= self._name_blocks * len(names)
        self.cache.use(names)

    def begin_decode(self, step: int, context: int) -> None:
        """A sequence decodes from that step on."""
        self._rows += 1
        self._turns[(step - context) % self.size] += 1

    def end_decode(self, step: int, context: int) -> None:
        """It decodes no more; with the numbers of its beginning, or of any step since."""
        self._rows -= 1
        self._turns[(step - context) % self.size] -= 1

    def for_decode(self, step: int, steps: int) -> int:
        """Blocks that decoding takes in so many steps from that one on."""
        rounds, rest = divmod(steps, self.size)
        turns = self._turns
        return rounds * self._rows + sum(turns[(step + ahead) % self.size] for ahead in range(rest))

    def steps_that_fit(self, step: int, most: int) -> int:
        """How many steps from that one on can decode before blocks run out; `most` at most."""
        free = self.free
        if most // self.size * self._rows + self._rows <= free or self.for_decode(step, most) <= free:
            return most
        rounds, free = divmod(free, self._rows)
        steps = rounds * self.size
        while (free := free - self._turns[(step + steps) % self.size]) >= 0:
            steps += 1
        return steps

    def decoded(self, step: int, steps: int) -> None:
        """So many steps from that one on have decoded."""
        self.own += self.for_decode(step, steps)
        self._make_room()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the invariant holds."""
        assert self.own >= 0
        assert self.own + self._name_blocks * (self.cache.used + self.cache.idle) <= self.total
        assert self._rows == sum(self._turns)
        assert min(self._turns) >= 0

    def _make_room(self) -> None:
        cache = self.cache
        over = self.own + self._name_blocks * (cache.used + cache.idle) - self.total
        if over > 0:
            cache.evict(-(-over // self._name_blocks))
