"""Finding computed prefixes in the cache, and waiting for those that are being computed."""

from __future__ import annotations

from bisect import bisect_left

from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool
from sfllm_worker.kv.prefix_hash import extend_hashes


class Prefixes:
    """Owner of what is being computed: which running sequence will publish which hash.

    Invariant: every entry's sequence is running and has not published that block yet. So whoever
    waits for an entry waits for progress, and is free to compute by itself when the leader is gone.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._leaders: dict[bytes, Sequence] = {}
        self.queried_tokens = 0
        self.hit_tokens = 0

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix, but never of all its tokens: one must be computed.

        Sequences of which something is wanted with every prompt token compute everything.
        """
        if sequence.needs_whole_prompt:
            return []
        return self._pool.find(self._hashes(sequence)[: self._usable(sequence)])

    def count_known(self, sequence: Sequence) -> int:
        """Blocks of its longest prefix that is cached or being computed; cheap, and rarely wrong.

        It looks for the end by bisection, as if a block was never there without those before it.
        """
        if sequence.needs_whole_prompt:
            return 0
        hashes, usable = self._hashes(sequence), self._usable(sequence)
        if not usable or self._is_unknown(hashes[0]):
            return 0
        return bisect_left(hashes, True, 1, usable, key=self._is_unknown)

    def _is_unknown(self, block_hash: bytes) -> bool:
        return block_hash not in self._leaders and not self._pool.has(block_hash)

    def hashes_of(self, sequence: Sequence) -> list[bytes]:
        """The names of a sequence's full blocks."""
        return self._hashes(sequence)

    def has(self, block_hash: bytes) -> bool:
        """Whether the block of that name is in the cache."""
        return self._pool.has(block_hash)

    def leader_of(self, sequence: Sequence, cached: list[int]) -> Sequence | None:
        """The running sequence that is about to publish the block which follows the `cached` ones."""
        if len(cached) >= self._usable(sequence):
            return None
        return self._leaders.get(sequence.hashes[len(cached)]) if sequence.hashes else None

    def admitted(self, sequence: Sequence, cached: list[int]) -> None:
        """`sequence` runs from now on and computes what follows the `cached` blocks."""
        if sequence.cached_tokens is None:
            sequence.cached_tokens = len(cached) * self._block_size
            self.queried_tokens += len(sequence.tokens)
            self.hit_tokens += sequence.cached_tokens
        for prefix_hash in self._hashes(sequence)[len(cached) :]:
            self._leaders.setdefault(prefix_hash, sequence)

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Blocks of a running sequence that its tokens `start .. end - 1` filled can be found from now on."""
        hashes = self._hashes(sequence)
        for index in range(start // self._block_size, end // self._block_size):
            self._pool.publish(sequence.block_table[index], hashes[index])
            self._forget(hashes[index], sequence)

    def stopped(self, sequence: Sequence) -> None:
        """`sequence` runs no more; nobody waits for it."""
        for prefix_hash in sequence.hashes:
            self._forget(prefix_hash, sequence)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise AssertionError unless the invariant holds."""
        for prefix_hash, leader in self._leaders.items():
            assert leader in running, "a prefix is waited for that nobody computes"
            own_block = leader.block_table[leader.hashes.index(prefix_hash)]
            assert own_block not in self._pool.find([prefix_hash]), "a prefix is waited for that is here"

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        extend_hashes(sequence.hashes, sequence.tokens, self._block_size, sequence.cache_salt)
        return sequence.hashes

    def _usable(self, sequence: Sequence) -> int:
        return (len(sequence.tokens) - 1) // self._block_size

    def _forget(self, prefix_hash: bytes, sequence: Sequence) -> None:
        if self._leaders.get(prefix_hash) is sequence:
            del self._leaders[prefix_hash]
