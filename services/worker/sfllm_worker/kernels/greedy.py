"""The first largest logit of each row, and whether the row can be trusted.

Each block of the vocabulary gives one integer, a key: a float's bits in an order that integers have, and
below them the complement of the token's number. The largest key is the largest logit and, among equals, the
first token; a NaN is larger than everything. So the second stage is a maximum too, no order of programs or
threads changes it, and the sampled choice takes its largest logit from the same keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant

BLOCK = 1024
"""Tokens of the vocabulary that one program of the first stage reads."""
_WARPS, _MERGE_WARPS = 4, 2

LOWEST_KEY = tl.constexpr(-(2**63))
"""Below the keys of all logits."""


class Chosen(NamedTuple):
    """What kernels write of each row."""

    packed: Tensor
    """int64 `[2, n]` on the device: `tokens`, then `sound`."""

    @property
    def tokens(self) -> Tensor:
        """int64 `[n]`, always tokens of the vocabulary."""
        return self.packed[0]

    @property
    def sound(self) -> Tensor:
        """int64 `[n]`: 1, or 0 where the row has a NaN, or where its largest logit is not finite."""
        return self.packed[1]


@triton.jit
def block_key(
    logits_at: tl.tensor, first: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The largest key, int64, of `BLOCK` tokens from `first` on of the row at `logits_at`."""
    token = first + tl.arange(0, BLOCK)
    logit = tl.load(logits_at + token, mask=token < vocab_size, other=float("-inf"))
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # there is only one zero
    is_nan = ~(tl.abs(logit) <= float("inf"))
    order = tl.where(is_nan, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64), axis=0)


@triton.jit
def largest_key(keys_at: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """The largest of a row's keys, of which there are `blocks`."""
    block = tl.arange(0, WIDTH)
    return tl.max(tl.load(keys_at + block, mask=block < blocks, other=LOWEST_KEY), axis=0)


@triton.jit
def key_logit(key: tl.tensor) -> tl.tensor:
    """The logit, float32, of a key."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_token(key: tl.tensor) -> tl.tensor:
    """The token, int64, of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def is_sound(logit: tl.tensor) -> tl.tensor:
    """Whether a row with this largest logit is sound; NaN compares as false."""
    return tl.abs(logit) < float("inf")


@triton.jit
def _survey_kernel(
    keys_at: tl.tensor,
    logits_at: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = block_key(logits_at + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    tl.store(keys_at + row * tl.num_programs(0) + block, key)


@triton.jit(do_not_specialize_on_alignment=["sound_at"])
def _merge_kernel(
    tokens_at: tl.tensor, sound_at: tl.tensor, keys_at: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    key = largest_key(keys_at + row * blocks, blocks, WIDTH)
    tl.store(tokens_at + row, key_token(key))
    tl.store(sound_at + row, is_sound(key_logit(key)).to(tl.int64))


def survey(logits: Tensor) -> Tensor:
    """The keys int64 `[n, blocks]` of rows of logits, float32 `[n, vocab_size]` of any row stride."""
    rows, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, BLOCK)
    keys = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    _survey_kernel[blocks, rows](keys, logits, logits.stride(0), vocab_size, BLOCK=BLOCK, num_warps=_WARPS)
    return keys


def choose_greedily(logits: Tensor) -> Chosen:
    """The first largest logit of each row of `logits`, float32 `[n, vocab_size]` of any row stride."""
    keys = survey(logits)
    rows, blocks = keys.shape
    chosen = Chosen(torch.empty(2, rows, dtype=torch.int64, device=logits.device))
    width = triton.next_power_of_2(blocks)
    _merge_kernel[(rows,)](chosen.tokens, chosen.sound, keys, blocks, WIDTH=width, num_warps=_MERGE_WARPS)
    return chosen


def variants() -> list[Variant]:
    """Logits are float32 whatever the model's dtype; the widths are those of 49k to 262k tokens."""
    survey_types = {"keys_at": "*i64", "logits_at": "*fp32", "logits_stride": "i32", "vocab_size": "i32"}
    merge_types = {"tokens_at": "*i64", "sound_at": "*i64", "keys_at": "*i64", "blocks": "i32"}
    forms = [
        Variant(
            name="greedy_survey",
            kernel=_survey_kernel,
            signature={**survey_types, "BLOCK": "constexpr"},
            constants={"BLOCK": BLOCK},
            aligned=("keys_at", "logits_at", "logits_stride", "vocab_size"),
            num_warps=_WARPS,
        )
    ]
    return forms + [
        Variant(
            name=f"greedy_merge_{width}",
            kernel=_merge_kernel,
            signature={**merge_types, "WIDTH": "constexpr"},
            constants={"WIDTH": width},
            aligned=("tokens_at", "keys_at"),
            num_warps=_MERGE_WARPS,
        )
        for width in (64, 256)
    ]
