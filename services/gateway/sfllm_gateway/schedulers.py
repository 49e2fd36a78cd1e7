"""Which of several schedulers gets a request. Pure: numbers in, a choice out.

Requests that begin alike should meet, because workers cache the beginnings of prompts; but no scheduler may
get much more than its share. So each request ranks the schedulers by weighted rendezvous hashing of its
first prefix (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates"; weights as in
Schindelhauer and Schomaker 2005, "Weighted distributed hash tables"): every gateway ranks alike without
talking to others, and when a scheduler goes only its own requests move. The first in the rank that is below
its bound is taken (Mirrokni, Thorup and Zadimoghaddam 2018, "Consistent hashing with bounded loads").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple

from sfllm.prefixes import CHUNK_TOKENS, prefix_names
from sfllm_gateway.stream import Request

LOAD_BOUND = Fraction(5, 4)
"""A scheduler has at most so many times the average of open requests for each unit of weight."""

_HASH_BITS = 64


class Candidate(NamedTuple):
    """A scheduler that could take a request: its `weight` (workers of the model) is at least 1."""

    address: str
    weight: int
    open_requests: int


def routing_key(request: Request) -> bytes:
    """What is hashed: the first prefix of the prompt or, of a prompt that has none, the request's id."""
    beginning = request.prompt[: CHUNK_TOKENS + 1]
    names = prefix_names(memoryview(beginning), request.cache_salt)
    return names.tobytes() or request.request_id.encode()


def choose(key: bytes, candidates: Sequence[Candidate]) -> int:
    """The position of the candidate that gets one request more. There must be at least one."""
    if len(candidates) == 1:
        return 0
    total = 1 + sum(each.open_requests for each in candidates)
    weights = sum(each.weight for each in candidates)
    # In whole numbers, since a rounding error would let one request more pass a bound that is met exactly.
    # The bounds add up to more than there will be, so that at least one candidate is below its own.
    free = (
        position
        for position, each in enumerate(candidates)
        if each.open_requests * weights * LOAD_BOUND.denominator < LOAD_BOUND.numerator * total * each.weight
    )
    return max(free, key=lambda position: _score(key, candidates[position]))


def _score(key: bytes, candidate: Candidate) -> float:
    """The chance that this candidate's score is the largest of all is proportional to its weight."""
    digest = blake2b(candidate.address.encode(), key=key[:64], digest_size=_HASH_BITS // 8).digest()
    uniform = (int.from_bytes(digest, "little") + 0.5) / 2**_HASH_BITS
    return candidate.weight / -math.log(uniform)
