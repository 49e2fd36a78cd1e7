"""A digest of what one side of a link holds, by which the other side notices that it holds something else.

The unit is an open choice: one of a request's `n` sequences that has not ended. Both sides of a link
keep the digest of the choices that they believe open between them, every beat carries it, and when
the two differ the scheduler asks for the list. So a lost grant, cancel or end, a restarted process
and a healed network need no code of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from hashlib import blake2b
from operator import xor
from typing import NamedTuple


class OpenChoice(NamedTuple):
    """A choice of an attempt of a request, named in the whole system."""

    gateway: bytes
    handle: int
    attempt: int
    choice: int


def fingerprint(held: OpenChoice) -> int:
    """64 bits that stand for one open choice, the same in every process."""
    numbers = b"%d %d %d " % (held.handle, held.attempt, held.choice)
    return int.from_bytes(blake2b(numbers + held.gateway, digest_size=8).digest(), "little")


def digest(held: Iterable[OpenChoice]) -> int:
    """The digest of a set: 0 when it is empty. A member is added, or removed, by xor of its fingerprint."""
    return reduce(xor, map(fingerprint, held), 0)
