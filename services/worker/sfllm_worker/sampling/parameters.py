"""How the rows of a batch choose their tokens, as integers that travel to a device in one copy."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.native import GREEDY_BELOW_TEMPERATURE

Integers = npt.NDArray[np.int64]

FACTOR, LOWEST, TOP_K, TOP_P, SEED, CHOICE, POSITION = range(7)
"""Columns. `FACTOR` and `LOWEST` are the bits of float32 numbers, `TOP_P` those of a float64 number.

A token's weight is `2 ** ((logit - largest logit) * FACTOR)`: 1 for the likeliest one. Factor 0 is greedy.
Tokens of a weight below `LOWEST` are not drawn: because of min-p, or because it is less than a unit.
"""
FIELDS = 8

UNIT_BITS = 40
"""Weights are counted in units of 2 to the power of minus so many."""


class ParameterTable:
    """Keeps the batch before: where a row's request is still the same, only its position is new."""

    def __init__(self) -> None:
        self._known: list[Sampling | None] = []
        self._table = np.zeros((0, FIELDS), dtype=np.int64)

    def fill(self, rows: Sequence[SamplingRow]) -> Integers:
        """`[n, FIELDS]` of these rows, valid until the next call."""
        count = len(rows)
        if count > len(self._known):
            self._table = np.zeros((2 * count, FIELDS), dtype=np.int64)
            self._known = [None] * (2 * count)
        table, known = self._table[:count], self._known
        for index, row in enumerate(rows):
            if known[index] is not row.sampling:
                table[index] = encode(row.sampling)
                known[index] = row.sampling
        table[:, CHOICE] = [row.choice for row in rows]
        table[:, POSITION] = [row.position for row in rows]
        return table


def encode(sampling: Sampling) -> tuple[int, ...]:
    """The columns of a row; choice and position are 0."""
    greedy = sampling.temperature < GREEDY_BELOW_TEMPERATURE
    factor = 0.0 if greedy else math.log2(math.e) / sampling.temperature
    lowest = max(sampling.min_p, 2.0**-UNIT_BITS)
    seed = _int64(sampling.seed)
    top_p = struct.unpack("<q", struct.pack("<d", sampling.top_p))[0]
    return _float32_bits(factor), _float32_bits(lowest), sampling.top_k, top_p, seed, 0, 0, 0


def is_greedy(row: SamplingRow) -> bool:
    """Whether the row takes the first largest logit."""
    return row.sampling.temperature < GREEDY_BELOW_TEMPERATURE


def _float32_bits(value: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def _int64(value: int) -> int:
    """The number with the same lower 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (value >> 63 << 64)
