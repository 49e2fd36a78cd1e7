"""Which KV blocks are free, who refers to the others, and which hold a prefix worth finding again.

Pure bookkeeping of block numbers; the tensors are in `cache.py`. Block 0 is never
handed out: padding rows of a captured graph may write to it.

A full block may be published under the hash of all tokens up to its end (`prefix_hash.py`). It
can be found by that hash as long as its content stands: while someone refers to it, and after
that until the block is needed for something else. Free blocks are reused in the order in which
they fell free, those without a hash first, so that the prefixes used last live longest (LRU,
each operation in constant time).

Steps are launched before the earlier ones were read (`engine/engine.py`). A block that nobody refers
to any more is *deferred*, not free, until the last step that may still read or write it was read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Owner of the block numbers `1 .. num_blocks - 1`.

    Invariants: every block is referenced, or it is free, or it is deferred because a step that was
    not read may touch it, so that free + referenced + deferred is the total at every moment; a hash
    names one block and a block has at most one hash. Steps are numbered from 1 and read in order.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs block 0 and at least one more, got {num_blocks}")
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._deferred: set[int] = set()
        self._busy_until: dict[int, int] = {}
        self._settled_step = 0
        self._ever_used = 0
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to, those that can still be found by a hash included."""
        return len(self._free)

    @property
    def num_deferred(self) -> int:
        """Blocks that nobody refers to, but that a step which was not read may touch."""
        return len(self._deferred)

    @property
    def ever_used(self) -> int:
        """No block above this one was ever handed out."""
        return self._ever_used

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises ValueError when so many are not free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self._ever_used = max(self._ever_used, *blocks, 0)
        self.unpublish(blocks)
        return blocks

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that is here. `share` them before anything else."""
        found = []
        for prefix_hash in hashes:
            block = self._block_of.get(prefix_hash)
            if block is None:
                break
            found.append(block)
        return found

    def has(self, prefix_hash: bytes) -> bool:
        """Whether the block of that hash is here."""
        return prefix_hash in self._block_of

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are free: sharing those takes them out of the free ones."""
        return sum(block in self._free for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more sequence refers to each of these blocks, which others refer to or `find` gave."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._hash_of, f"block {block} is free and holds nothing"
                if block in self._deferred:
                    self._deferred.remove(block)
                else:
                    del self._free[block]
            self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence refers to `block`: it must be copied before it is written."""
        return self._references[block] > 1

    def release(self, blocks: Sequence[int], last_step: int = 0) -> None:
        """One sequence less refers to each of these blocks; those without a reference become free.

        `last_step` is the last step in which that sequence had them: until it was read they are
        deferred. A table's last blocks are forgotten before its first ones, which more prompts share.
        """
        is_busy = last_step > self._settled_step
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was released twice"
            self._references[block] -= 1
            if is_busy:
                self._busy_until[block] = max(last_step, self._busy_until.get(block, 0))
            if self._references[block] == 0:
                if block in self._busy_until:
                    self._deferred.add(block)
                else:
                    self._set_free(block)

    def settle(self, step: int) -> None:
        """All steps up to this one were read: what was deferred for them is free."""
        self._settled_step = step
        if self._busy_until:
            for block in [block for block, last in self._busy_until.items() if last <= step]:
                del self._busy_until[block]
                if block in self._deferred:
                    self._deferred.remove(block)
                    self._set_free(block)

    def _set_free(self, block: int) -> None:
        self._free[block] = None
        if block not in self._hash_of:
            self._free.move_to_end(block, last=False)

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Let `block`, which is full and will not be written again, be found by its hash."""
        assert self._references[block] > 0, f"block {block} is free and cannot be published"
        if prefix_hash not in self._block_of and block not in self._hash_of:
            self._block_of[prefix_hash] = block
            self._hash_of[block] = prefix_hash

    def unpublish(self, blocks: Iterable[int]) -> None:
        """These blocks can no longer be found."""
        for block in blocks:
            prefix_hash = self._hash_of.pop(block, None)
            if prefix_hash is not None:
                del self._block_of[prefix_hash]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the invariants hold."""
        assert 0 not in self._free, "the padding block is free"
        for block, references in enumerate(self._references[1:], start=1):
            idle = (block in self._free) + (block in self._deferred)
            assert idle == (references == 0), f"block {block}: {references} references"
        assert self._deferred <= self._busy_until.keys()
        assert all(last > self._settled_step for last in self._busy_until.values())
        assert {block: name for name, block in self._block_of.items()} == self._hash_of
