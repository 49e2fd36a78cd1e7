"""Keyed uniform numbers: the same key gives the same number on every machine and in every batch.

Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). The
key is a request's seed and the counter is (output position, choice, purpose), so a stream
that moves to another worker goes on with the numbers it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


class Purpose(IntEnum):
    """What a number is drawn for; different purposes never share numbers."""

    SAMPLE = 0


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> list[Words]:
    """Four 32-bit words (in uint64 arrays) for every counter and key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int], purpose: Purpose
) -> npt.NDArray[np.float32]:
    """One float32 in [0, 1) per entry, with 24 random bits each."""
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    choice = np.array(choices, dtype=np.uint64)
    zero = np.zeros_like(seed)
    words = philox4x32((position, choice, zero + np.uint64(purpose), zero), (seed & _MASK, seed >> _HALF))
    bits: npt.NDArray[np.float32] = (words[0] >> np.uint64(8)).astype(np.float32)
    return bits * np.float32(2.0**-24)
