"""Names for prefixes: a block's hash stands for its tokens and for all that come before it.

Each hash covers the hash of the block before (the chain begins with the request's cache salt),
so that equal hashes mean equal prefixes, as in vLLM's automatic prefix caching. BLAKE2b keeps
an adversary from making two prefixes with one name.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

HASH_BYTES = 16


def extend_hashes(hashes: list[bytes], tokens: list[int], block_size: int, cache_salt: str) -> None:
    """Add to `hashes` those of the full blocks of `tokens` that it does not cover yet."""
    parent = hashes[-1] if hashes else blake2b(cache_salt.encode(), digest_size=HASH_BYTES).digest()
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("I", tokens[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
