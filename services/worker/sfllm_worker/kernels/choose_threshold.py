"""The smallest weight that top-k and top-p keep, exactly and without a sort.

The bits of floats that are not negative stand in the order of the floats. "At least `k` tokens weigh `t` or
more", and likewise a share of the mass, holds for all `t` up to some largest one, which is the weight of the
last token that is kept. So that weight is found by narrowing a range of bits sevenfold with each look at the
row, until one token, or one value, is left in it. Looks pass over blocks whose largest logit is too small.
Sums are of integers, weights in units of `2**-40`: they are the same in any order, and nothing runs past the
end. What is lighter than a unit is never drawn, as float32 sums would hardly ever let it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sfllm_worker.kernels.greedy import key_logit
from sfllm_worker.sampling.parameters import UNIT_BITS

PIVOTS = tl.constexpr(8)
UNITS = tl.constexpr(2.0**UNIT_BITS)
COUNT = tl.constexpr(52)
"""A tally is a number of tokens from this bit on, and their mass in units below."""
ONE = tl.constexpr(1 << 52)
MASS = tl.constexpr((1 << 52) - 1)
ABOVE_ALL = tl.constexpr(0x3F800001)
"""The bits of the float after 1, which no weight reaches."""
_SLACK = tl.constexpr(16)
"""`exp2` need not be monotonic in its last bits: so much may a token outweigh its block's largest logit."""


@triton.jit
def weigh(
    logits_at: tl.tensor,
    block: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    factor: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The bits of the weights of a block of a row's tokens, zero past the vocabulary, and their tallies."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_at + token, mask=token < vocab_size, other=float("-inf"))
    weights = tl.exp2((logits - best) * factor)
    return weights.to(tl.int32, bitcast=True), (weights * UNITS).to(tl.int64) + ONE


@triton.jit
def reaches(
    keys_at: tl.tensor, block: tl.tensor, best: tl.tensor, factor: tl.tensor, lowest: tl.tensor
) -> tl.tensor:
    """Whether a block of a row may have a token that weighs `lowest` or more."""
    largest = tl.exp2((key_logit(tl.load(keys_at + block)) - best) * factor)
    return largest.to(tl.int32, bitcast=True) + _SLACK >= lowest


@triton.jit
def pivots_between(lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """Where a look counts: at `lowest`, just above it, and evenly from there to below `highest`."""
    pivot = tl.arange(0, PIVOTS)
    step = (highest - lowest + PIVOTS - 2) // (PIVOTS - 1)
    return lowest + tl.where(pivot < 2, pivot, (pivot - 1) * step)


@triton.jit
def look(
    logits_at: tl.tensor,
    keys_at: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    factor: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """For each pivot: itself, the smallest weight from it on, how many tokens reach it, and their mass."""
    pivots = pivots_between(lowest, highest)
    tallies = tl.zeros([PIVOTS, BLOCK], tl.int64)
    smallest = tl.full([PIVOTS, BLOCK], ABOVE_ALL, tl.int32)
    for block in range(BLOCKS):
        if reaches(keys_at, block, best, factor, lowest):
            bits, tally = weigh(logits_at, block, vocab_size, best, factor, BLOCK)
            reached = bits[None, :] >= pivots[:, None]
            tallies += tl.where(reached, tally[None, :], 0)
            smallest = tl.minimum(smallest, tl.where(reached, bits[None, :], ABOVE_ALL))
    counts = tl.sum(tallies >> COUNT, axis=1)
    masses = tl.sum(tallies & MASS, axis=1)
    return pivots, tl.min(smallest, axis=1), counts, masses


@triton.jit
def element(values: tl.tensor, index: tl.tensor) -> tl.tensor:
    """The element, or zero past the end."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == index, values, 0), axis=0)


@triton.jit
def settle(
    logits_at: tl.tensor,
    keys_at: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    factor: tl.tensor,
    pivots: tl.tensor,
    smallest: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    wanted_count: tl.tensor,
    wanted_mass: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The largest weight such that enough tokens, and enough mass, reach it; and that mass.

    The first four tensors are what a look from a weight that is reached by enough up to the top has found.
    """
    highest = tl.full([], ABOVE_ALL, tl.int32)
    above = tl.full([], 0, tl.int64)
    lowest, mass = element(pivots, 0), element(masses, 0)
    searching = True
    while searching:
        enough = (pivots < highest) & (counts >= wanted_count) & (masses.to(tl.float64) >= wanted_mass)
        last = tl.sum((enough | (tl.arange(0, PIVOTS) == 0)).to(tl.int32), axis=0) - 1
        lowest, mass = element(smallest, last), element(masses, last)
        following = element(pivots, last + 1)
        if (last < PIVOTS - 1) & (following < highest):
            highest, above = following, element(counts, last + 1)
        searching = (highest - lowest > 1) & (element(counts, last) - above > 1)
        if searching:
            pivots, smallest, counts, masses = look(
                logits_at, keys_at, vocab_size, best, factor, lowest, highest, BLOCKS, BLOCK
            )
    return lowest, mass
