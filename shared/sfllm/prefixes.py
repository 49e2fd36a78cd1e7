"""Names for the beginnings of prompts, by which requests find the workers that have them in their cache.

A prompt is cut into chunks of `CHUNK_TOKENS`. The name of a chunk covers all chunks before it and the
request's cache salt, so that equal names mean equal beginnings that may be shared. The gateway makes the
names, the scheduler compares them, the worker says which of them its cache still has. They are hints: a
name that two beginnings share (one pair in 2**64) costs a prefill, never a wrong token.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from sfllm.wire import Array

CHUNK_TOKENS = 64
MAX_PREFIXES = 256
"""Names of one prompt: beginnings beyond 16,384 tokens are not told apart."""

MAX_SUMMARY_PREFIXES = 512
"""Names in a worker's beat: 4 KiB."""

_NAME_BYTES = 8
_CHAIN_BYTES = 16


def prefix_names(tokens: Array, cache_salt: str) -> Array:
    """The names (uint64) of a prompt's beginnings of 64, 128, 192, ... tokens.

    The last token is left out: it is always computed, so a prompt of exactly 64 tokens has none. The chain
    is 16 bytes long and keyed by the salt; a name is its first half.
    """
    count = min((len(tokens) - 1) // CHUNK_TOKENS, MAX_PREFIXES)
    names = bytearray()
    chain = blake2b(cache_salt.encode(), digest_size=_CHAIN_BYTES).digest()
    content = tokens.cast("B")
    chunk_bytes = CHUNK_TOKENS * tokens.itemsize
    for start in range(0, count * chunk_bytes, chunk_bytes):
        chain = blake2b(content[start : start + chunk_bytes], key=chain, digest_size=_CHAIN_BYTES).digest()
        names += chain[:_NAME_BYTES]
    return memoryview(array("Q", bytes(names)))
