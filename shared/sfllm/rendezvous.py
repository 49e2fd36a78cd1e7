"""Which of several schedulers: the rules that gateways, workers and the simulator share. Pure.

Everybody ranks schedulers by rendezvous hashing (Thaler and Ravishankar 1998, "Using name-based mappings to
increase hit rates"): all rank alike without talking to each other, and when a scheduler goes only what was
its own moves. Workers rank by their ids (`ranked`).

Requests that begin alike should meet, because workers cache the beginnings of prompts; but no scheduler may
get much more than its share. So each request ranks the schedulers by its first prefix, weighted by their
workers (weights as in Schindelhauer and Schomaker 2005, "Weighted distributed hash tables"), and the first in
the rank that is below its bound is taken (Mirrokni, Thorup and Zadimoghaddam 2018, "Consistent hashing with
bounded loads").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple

from sfllm.wire import Array

LOAD_BOUND = Fraction(5, 4)
"""A scheduler has at most so many times the average of open requests for each unit of weight."""

_HASH_BITS = 64


class Candidate(NamedTuple):
    """A scheduler that could take a request: its `weight` (workers of the model) is at least 1."""

    address: str
    weight: int
    open_requests: int


def member_key(member_id: str) -> bytes:
    """What is hashed of a member, such as a worker."""
    return blake2b(member_id.encode()).digest()


def ranked(member_id: str, addresses: Sequence[str]) -> list[int]:
    """The positions of `addresses`, first the one that this member should belong to."""
    key = member_key(member_id)

    def score(index: int) -> bytes:
        return blake2b(addresses[index].encode(), key=key, digest_size=16).digest()

    return sorted(range(len(addresses)), key=score, reverse=True)


def routing_key(prefix_names: Array, request_id: str) -> bytes:
    """What is hashed of a request: its first prefix (`sfllm.prefixes`) or, if it has none, its id."""
    return prefix_names[:1].tobytes() or request_id.encode()


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
