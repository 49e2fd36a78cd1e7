"""Has the kernel give the memory of a cache before its blocks are first used."""

from __future__ import annotations

from torch import Tensor

from sfllm_worker import large_pages
from sfllm_worker.kv.cache import KVCache

PIECE_BYTES = 2 * 2**20
"""Of each layer's keys or values, given at once: a large page."""

AHEAD = 4
"""One part in so many of the cache is ready beyond the blocks that were used so far."""


class MemoryAhead:
    """Gives memory to the host's blocks that come next, a piece at a time, while there is nothing else to do.

    A cache takes memory as it is written (`large_pages.zeros`). A page's first use stops the
    step for as long as the kernel needs to find and clear it: in a virtual machine that was measured to
    be 6 ms for 2 MiB, a fifth of a prompt's time. All of the cache at once would keep a start waiting for
    seconds, and take memory that may never be needed.

    Invariant: blocks below `_ready`, and the next ones of the first `_parts_done` parts, have memory or
    were used.
    """

    def __init__(self, kv: KVCache) -> None:
        self._parts: list[Tensor] = [part for layer in kv.layers for part in (layer.k, layer.v)]
        self._piece_blocks = max(1, PIECE_BYTES // kv.layers[0].k[0].nbytes)
        self._num_blocks = kv.num_blocks
        self._ready = self._parts_done = 0

    def advance(self, used: int) -> bool:
        """Give a piece its memory, in milliseconds; False when enough blocks beyond `used` ones have it."""
        if used > self._ready:
            self._ready, self._parts_done = used, 0
        if not self._parts or self._ready >= min(self._num_blocks, used + self._num_blocks // AHEAD):
            return False
        piece = self._parts[self._parts_done][self._ready : self._ready + self._piece_blocks]
        if not large_pages.populate(piece):
            self._parts.clear()  # memory comes as it is used
            return False
        self._parts_done += 1
        if self._parts_done == len(self._parts):
            self._ready, self._parts_done = self._ready + self._piece_blocks, 0
        return True
