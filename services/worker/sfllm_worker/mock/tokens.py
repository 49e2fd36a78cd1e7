"""What a mock worker says: a pure function of the request, so that any worker can go on with any stream.

Tokens are bytes. The next one is a printable ASCII character that is drawn by BLAKE2b from seed, choice,
position and prompt, and from nothing else: neither from the worker, nor from its batch or the attempt.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Sequence
from hashlib import blake2b

from sfllm.token_batch import Logprobs

TEXT_TOKENS = tuple(range(0x20, 0x7F))
"""Token ids that a mock worker generates: the byte values of space to tilde."""

EOS_TOKEN = 256
VOCAB_SIZE = 259
"""256 bytes, end of text, and the beginning and the end of a chat message."""


def prompt_digest(prompt: Sequence[int]) -> bytes:
    """16 bytes that stand for a prompt's token ids."""
    return blake2b(array("I", prompt).tobytes(), digest_size=16).digest()


def mock_token(
    seed: int,
    choice: int,
    position: int,
    digest: bytes,
    candidates: Sequence[int] = TEXT_TOKENS,
    banned: Collection[int] = (),
) -> int:
    """Output token number `position` of a choice: the drawn one of `candidates`.

    When that is `banned`, it is the next one that is not; when all are, the drawn one itself.
    """
    drawn = _draw(b"token", seed, choice, position, digest) % len(candidates)
    for offset in range(len(candidates)):
        token = candidates[(drawn + offset) % len(candidates)]
        if token not in banned:
            return token
    return candidates[drawn]


def mock_text(seed: int, choice: int, prompt: Sequence[int], count: int, start: int = 0) -> str:
    """Characters `start .. start + count` of a choice without restrictions."""
    digest = prompt_digest(prompt)
    return "".join(
        chr(mock_token(seed, choice, position, digest)) for position in range(start, start + count)
    )


def mock_logprobs(digest: bytes, position: int, token: int, top: int) -> Logprobs:
    """Made-up log probabilities: `token` has half of the probability or more, the next ones ever less.

    As many of the likeliest tokens as `top` asks for are reported beside it, itself first.
    """
    share = 0.5 + (_draw(b"share", 0, 0, position, digest) % 256) / 640
    ids, values = [token], [math.log(share)]
    other, rest = token, 1.0 - share
    for rank in range(min(top, VOCAB_SIZE)):
        if rank > 0:
            other, rest = (other + 1) % VOCAB_SIZE, rest / 2
        ids.append(other)
        values.append(math.log(rest) if rank > 0 else values[0])
    return Logprobs(len(ids), ids, values)


def _draw(purpose: bytes, seed: int, choice: int, position: int, digest: bytes) -> int:
    numbers = b"%s %d %d %d " % (purpose, seed, choice, position)
    return int.from_bytes(blake2b(numbers + digest, digest_size=8).digest(), "little")
