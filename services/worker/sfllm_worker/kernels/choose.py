"""Sampled choice of tokens: temperature, min-p, top-k, top-p, and the inverse of the cumulative sum.

A token's weight is its probability over that of the likeliest one: float32 in `[0, 1]`. Three launches:
`greedy.survey` finds the largest logit; one adds up each block of the vocabulary; the last finds the smallest
weight that is kept, and takes the token at which the running sum of kept weights, in the order of tokens,
passes a keyed uniform number's share of their sum.

Thresholds are found by looks at the row, not by sorting it: see `choose_threshold.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.choose_threshold import (
    ABOVE_ALL,
    COUNT,
    MASS,
    PIVOTS,
    element,
    look,
    pivots_between,
    reaches,
    settle,
    weigh,
)
from sfllm_worker.kernels.greedy import BLOCK, Chosen, is_sound, key_logit, key_token, largest_key, survey
from sfllm_worker.kernels.variant import Variant
from sfllm_worker.sampling import parameters

_TALLY_WARPS, _DRAW_WARPS = 4, 8

_FIELDS = tl.constexpr(parameters.FIELDS)
_FACTOR, _LOWEST, _TOP_K, _TOP_P, _SEED, _CHOICE, _POSITION = (
    tl.constexpr(column)
    for column in (
        parameters.FACTOR,
        parameters.LOWEST,
        parameters.TOP_K,
        parameters.TOP_P,
        parameters.SEED,
        parameters.CHOICE,
        parameters.POSITION,
    )
)
_VOCABULARY_LIMIT = 1 << 21
"""A tally of so many tokens overflows."""


@triton.jit
def _float32(field: tl.tensor) -> tl.tensor:
    return field.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tally_kernel(
    tallies_at: tl.tensor,
    keys_at: tl.tensor,
    logits_at: tl.tensor,
    fields_at: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    factor = _float32(tl.load(fields_at + row * _FIELDS + _FACTOR))
    if factor > 0:
        best = key_logit(largest_key(keys_at + row * BLOCKS, BLOCKS, WIDTH))
        if is_sound(best):
            lowest = tl.load(fields_at + row * _FIELDS + _LOWEST).to(tl.int32)
            bits, tally = weigh(logits_at + row * logits_stride, block, vocab_size, best, factor, BLOCK)
            reached = bits[None, :] >= pivots_between(lowest, ABOVE_ALL)[:, None]
            tallies = tl.sum(tl.where(reached, tally[None, :], 0), axis=1)
            at = (row * BLOCKS + block) * PIVOTS + tl.arange(0, PIVOTS)
            tl.store(tallies_at + at, tallies)


@triton.jit
def _share(fields_at: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """`mass` times the row's uniform number of 24 bits, rounded down; see `sampling/philox.py`."""
    position = tl.load(fields_at + _POSITION).to(tl.uint32)
    choice = tl.load(fields_at + _CHOICE).to(tl.uint32)
    zero = position * 0
    word, _, _, _ = tl.philox(tl.load(fields_at + _SEED), position, choice, zero, zero)
    uniform = (word >> 8).to(tl.int64)
    return uniform * (mass >> 24) + ((uniform * (mass & 0xFFFFFF)) >> 24)


@triton.jit
def _drawn(
    tallies_at: tl.tensor,
    keys_at: tl.tensor,
    logits_at: tl.tensor,
    fields_at: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    factor: tl.tensor,
    first: tl.tensor,
    lowest: tl.tensor,
    mass: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The token, of those that weigh `lowest` or more, all of them `mass`, that the row's number hits.

    Tallies tell the mass of blocks where `lowest` is `first`.
    """
    number = tl.arange(0, WIDTH)
    target = _share(fields_at, mass)
    # The block in which the running sum passes the target, and the sum before it.
    if lowest == first:
        held = tl.load(tallies_at + number * PIVOTS, mask=number < BLOCKS, other=0) & MASS
        block = tl.sum(((tl.cumsum(held, axis=0) <= target) & (number < BLOCKS)).to(tl.int32), axis=0)
        before = tl.sum(tl.where(number < block, held, 0), axis=0)
    else:
        block = tl.full([], -1, tl.int32)
        before = tl.full([], 0, tl.int64)
        inside = tl.full([], 0, tl.int64)
        while (before + inside <= target) & (block < BLOCKS - 1):
            before += inside
            block += 1
            inside = tl.full([], 0, tl.int64)
            if reaches(keys_at, block, best, factor, lowest):
                bits, tally = weigh(logits_at, block, vocab_size, best, factor, BLOCK)
                inside = tl.sum(tl.where(bits >= lowest, tally & MASS, 0), axis=0)
    bits, tally = weigh(logits_at, block, vocab_size, best, factor, BLOCK)
    ends = before + tl.cumsum(tl.where(bits >= lowest, tally & MASS, 0), axis=0)
    token = block * BLOCK + tl.sum((ends <= target).to(tl.int32), axis=0)
    return tl.minimum(token, vocab_size - 1).to(tl.int64)


@triton.jit(do_not_specialize_on_alignment=["sound_at"])
def _draw_kernel(
    tokens_at: tl.tensor,
    sound_at: tl.tensor,
    tallies_at: tl.tensor,
    keys_at: tl.tensor,
    logits_at: tl.tensor,
    fields_at: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    keys_at += row * BLOCKS
    logits_at += row * logits_stride
    fields_at += row * _FIELDS
    key = largest_key(keys_at, BLOCKS, WIDTH)
    best = key_logit(key)
    sound = is_sound(best)
    tl.store(tokens_at + row, key_token(key))
    tl.store(sound_at + row, sound.to(tl.int64))
    factor = _float32(tl.load(fields_at + _FACTOR))
    if sound & (factor > 0):
        pivot, number = tl.arange(0, PIVOTS), tl.arange(0, WIDTH)
        tallies_at += row * BLOCKS * PIVOTS
        at = tallies_at + number[:, None] * PIVOTS + pivot[None, :]
        tallies = tl.load(at, mask=(number < BLOCKS)[:, None], other=0)
        counts, masses = tl.sum(tallies >> COUNT, axis=0), tl.sum(tallies & MASS, axis=0)
        first = tl.load(fields_at + _LOWEST).to(tl.int32)
        pivots = pivots_between(first, ABOVE_ALL)
        smallest = pivots
        lowest, mass = first, element(masses, 0)
        top_k = tl.load(fields_at + _TOP_K)
        top_p = tl.load(fields_at + _TOP_P).to(tl.float64, bitcast=True)

        limited = (top_k > 0) & (top_k < element(counts, 0))
        if limited:
            lowest, mass = settle(
                logits_at, keys_at, vocab_size, best, factor,
                pivots, smallest, counts, masses, top_k, -1.0, BLOCKS, BLOCK,
            )  # fmt: skip
        if top_p < 1:
            if limited:
                pivots, smallest, counts, masses = look(
                    logits_at, keys_at, vocab_size, best, factor, lowest, ABOVE_ALL, BLOCKS, BLOCK
                )
            lowest, mass = settle(
                logits_at, keys_at, vocab_size, best, factor,
                pivots, smallest, counts, masses, 0, top_p * mass.to(tl.float64), BLOCKS, BLOCK,
            )  # fmt: skip

        token = _drawn(
            tallies_at, keys_at, logits_at, fields_at, vocab_size, best, factor,
            first, lowest, mass, BLOCKS, BLOCK, WIDTH,
        )  # fmt: skip
        tl.store(tokens_at + row, token)


def choose(logits: Tensor, fields: Tensor) -> Chosen:
    """A token for each row of `logits`, float32 `[n, vocab_size]` of any row stride.

    `fields` int64 `[n, FIELDS]` on the same device are those of `sampling/parameters.py`.
    """
    rows, vocab_size = logits.shape
    if vocab_size >= _VOCABULARY_LIMIT:
        raise ValueError(f"a vocabulary must have fewer than {_VOCABULARY_LIMIT} tokens, not {vocab_size}")
    keys = survey(logits)
    blocks = keys.shape[1]
    width = triton.next_power_of_2(blocks)
    tallies = torch.empty(rows, blocks, PIVOTS.value, dtype=torch.int64, device=logits.device)
    stride = logits.stride(0)
    sizes = {"BLOCKS": blocks, "BLOCK": BLOCK, "WIDTH": width}
    _tally_kernel[blocks, rows](
        tallies, keys, logits, fields, stride, vocab_size, **sizes, num_warps=_TALLY_WARPS
    )
    chosen = Chosen(torch.empty(2, rows, dtype=torch.int64, device=logits.device))
    _draw_kernel[(rows,)](
        chosen.tokens, chosen.sound, tallies, keys, logits, fields, stride, vocab_size,
        **sizes, num_warps=_DRAW_WARPS,
    )  # fmt: skip
    return chosen


_TYPES = {
    "tokens_at": "*i64", "sound_at": "*i64", "tallies_at": "*i64", "keys_at": "*i64", "logits_at": "*fp32",
    "fields_at": "*i64", "logits_stride": "i32", "vocab_size": "i32",
}  # fmt: skip


def variants() -> list[Variant]:
    """Both kernels for vocabularies of 49k, 128k and up to 262k tokens."""
    forms = []
    for name, kernel, warps in (("tally", _tally_kernel, _TALLY_WARPS), ("draw", _draw_kernel, _DRAW_WARPS)):
        for blocks in (48, 125, 149, 256):
            constants = {"BLOCKS": blocks, "BLOCK": BLOCK, "WIDTH": triton.next_power_of_2(blocks)}
            signature = {name: _TYPES.get(name, "constexpr") for name in kernel.arg_names}
            aligned = tuple(name for name in signature if name not in {*constants, "sound_at"})
            forms.append(Variant(f"choose_{name}_{blocks}", kernel, signature, constants, aligned, warps))
    return forms
