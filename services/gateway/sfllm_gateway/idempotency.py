"""Requests that may be sent again: what a client's `Idempotency-Key` makes of them. Pure.

Gateways are several and share nothing. So what a retry must find again follows from the request itself:
the seeds that the client left open, and the name of the answer, are digests of who asks, the key, the
path and the body. A retry on any gateway then gives the same text under the same name.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.generation import Generation

KEY_HEADER = "Idempotency-Key"
MAX_KEY_CHARACTERS = 255
NAME_DIGITS = 32
SEED_BYTES = 8


class Attempt(NamedTuple):
    """One of the times that a request with a key is sent.

    `owner` is a digest of the tenant and its key, `content` one of what is asked: the path and the body.
    """

    owner: bytes
    content: bytes

    @property
    def name(self) -> str:
        """The name of the answer, without the prefix of its endpoint."""
        return self._digest(b"name").hex()[:NAME_DIGITS]

    def seed(self, number: int) -> int:
        """The seed of prompt `number` of the request: 63 bits, as those that are drawn."""
        found = self._digest(b"seed %d" % number)[:SEED_BYTES]
        return int.from_bytes(found, "little") >> 1

    def seeded(self, generation: Generation) -> Generation:
        """The same work, with seeds of this attempt where the client chose none."""
        if generation.seeded:
            return generation
        samplings = [
            msgspec.structs.replace(sampling, seed=self.seed(number))
            for number, sampling in enumerate(generation.samplings)
        ]
        return generation._replace(samplings=samplings)

    def _digest(self, purpose: bytes) -> bytes:
        return hashlib.sha256(self.owner + self.content + purpose).digest()


def attempt_of(key: str | None, tenant: str, path: str, body: bytes) -> Attempt | None:
    """The attempt that a request is, None without a key. Raises 400 for a key that is none."""
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
        raise ServiceError(
            ErrorCode.INVALID_REQUEST,
            f"{KEY_HEADER}: must be 1 to {MAX_KEY_CHARACTERS} printable ASCII characters",
            param=KEY_HEADER,
        )
    return Attempt(_digest_of(tenant.encode(), key.encode()), _digest_of(path.encode(), body))


def _digest_of(first: bytes, second: bytes) -> bytes:
    """A digest of both, and of where the one ends and the other begins."""
    digest = hashlib.sha256(b"%d " % len(first) + first)
    digest.update(second)
    return digest.digest()
