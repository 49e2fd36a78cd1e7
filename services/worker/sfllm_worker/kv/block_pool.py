"""Which KV blocks are free and how many sequences refer to each of the others.

Pure bookkeeping of block numbers; the tensors are in `cache.py`. Block 0 is never
handed out: padding rows of a captured graph may write to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Owner of the block numbers `1 .. num_blocks - 1`.

    Invariant: every block is either in the free list with no reference, or referenced at
    least once and not in the list; so free + referenced is the total at every moment.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs block 0 and at least one more, got {num_blocks}")
        self._references = [0] * num_blocks
        self._free = deque(range(1, num_blocks))

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises ValueError when so many are not free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more sequence refers to each of these blocks."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence refers to `block`: it must be copied before it is written."""
        return self._references[block] > 1

    def release(self, blocks: Iterable[int]) -> None:
        """One sequence less refers to each of these blocks; those without a reference become free."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} was released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the invariant holds."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert 0 not in free, "the padding block is in the free list"
        for block, references in enumerate(self._references[1:], start=1):
            assert (references == 0) == (block in free), f"block {block}: {references} references"
