"""What the attention kernels share: a step of the online softmax and where tokens lie in a paged cache.

The softmax works in base 2: `exp2(factor * s - best)` needs one fused multiply-add and one instruction,
and `factor` carries the scale. It follows FlashAttention (Dao et al. 2022, arXiv:2205.14135). Tiles start
at multiples of their size in the sequence, wherever the queries stand, and a tile that a query does not see
leaves its sums as they are to the bit: so no result depends on what shares a program or a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import triton
import triton.language as tl

from sfllm_worker.kernels.variant import Variant
from sfllm_worker.model.attention import AttentionOptions

LOG2_E = math.log2(math.e)


class Scoring(NamedTuple):
    """How products of queries and keys become exponents of two, as arguments of the kernels."""

    window: int
    """Positions that a query sees, 0 for all."""
    inner: float
    """With a soft cap: what products are multiplied by inside of it, for `tanh` in terms of `exp2`."""
    factor: float
    """What products, or the squashed ones, are multiplied by to be exponents of two."""
    capped: bool

    @classmethod
    def of(cls, options: AttentionOptions, head_dim: int) -> Scoring:
        """Fold a layer's options for heads of `head_dim`. Raises `ValueError` for a scale below zero."""
        scale = head_dim**-0.5 if options.scale is None else options.scale
        if scale <= 0:
            raise ValueError(f"attention's scale must be positive, not {scale}")
        window = options.window or 0
        if options.soft_cap is None:
            return cls(window, 0.0, scale * LOG2_E, capped=False)
        cap = options.soft_cap
        return cls(window, 2 * scale / cap * LOG2_E, cap * LOG2_E, capped=True)


def power_of_two(count: int, least: int = 16) -> int:
    """The smallest power of two that holds `count`, and no less than what `tl.dot` takes."""
    return max(least, 1 << (count - 1).bit_length())


_TYPES = {
    "inner": "fp32", "factor": "fp32", "mixed_at": "*fp32", "stats_at": "*fp32",
    "tiles_at": "*i64", "tables_at": "*i64", "contexts_at": "*i64", "slots_at": "*i64",
}  # fmt: skip
_ALIGNED_FLOATS = ("mixed_at", "stats_at")
_UNALIGNED = ("table_stride", "window", "splits")


class Shape(NamedTuple):
    """A model's attention, as far as kernels are compiled for it."""

    dtype: str
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    special: bool
    """Whether there are a window and a soft cap."""

    @property
    def label(self) -> str:
        """The part of a form's name that tells it from others of its kernel."""
        plain = f"{self.dtype}-d{self.dim}-h{self.heads}x{self.kv_heads}-b{self.block_size}"
        return plain + "-special" * self.special


def common_shapes() -> list[Shape]:
    """Groups of one to eight heads in bfloat16, and one of each head size in float16."""
    groups = ((8, 8), (16, 8), (9, 3), (32, 8), (16, 2))
    shapes = [
        Shape("bf16", *heads, dim, size, special)
        for dim, heads, size, special in product((64, 128, 256), groups, (16, 64), (False, True))
    ]
    shapes += [Shape("bf16", 32, 32, 96, 16, special) for special in (False, True)]
    return shapes + [
        Shape("fp16", 16, 8, dim, 16, special) for dim, special in product((64, 128, 256), (False, True))
    ]


def variant(
    name: str, kernel: Any, dtype: str, constants: Mapping[str, Any], num_warps: int = 4, num_stages: int = 3
) -> Variant:
    """A form of an attention kernel, whose arguments' types follow from their names."""
    signature = {}
    for argument in kernel.arg_names:
        usual = f"*{dtype}" if argument.endswith("_at") else "i32"
        signature[argument] = "constexpr" if argument in constants else _TYPES.get(argument, usual)
    loose = {*_TYPES, *constants, *_UNALIGNED}.difference(_ALIGNED_FLOATS)
    aligned = tuple(argument for argument in signature if argument not in loose)
    return Variant(name, kernel, signature, constants, aligned, num_warps, num_stages)


@triton.jit
def squashed(scores: tl.tensor, inner: tl.tensor) -> tl.tensor:
    """`tanh`, whose argument is doubled and turned to base 2 by `inner`."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * inner))


@triton.jit
def load_tile(
    base_at: tl.tensor,
    token_offsets: tl.tensor,
    tokens: tl.tensor,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """Keys or values `[tokens, DIM_WIDTH]`; zeros where `tokens` is false and past the head's end.

    With `CHECKED` false all tokens are read.
    """
    dims = tl.arange(0, DIM_WIDTH)
    at = base_at + token_offsets[:, None] + dims[None, :]
    if CHECKED and DIM < DIM_WIDTH:
        tile = tl.load(at, mask=tokens[:, None] & (dims < DIM)[None, :], other=0.0)
    elif CHECKED:
        tile = tl.load(at, mask=tokens[:, None], other=0.0)
    elif DIM < DIM_WIDTH:
        tile = tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def add_tile(
    best: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    scores: tl.tensor,
    values: tl.tensor,
    factor: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take a tile's scores and values into the running maximum, the sum of weights and the mix of values.

    `best` is in exponents of two, `scores` are before `factor` and -inf where a query does not look.
    """
    new_best = tl.maximum(best, tl.max(scores, axis=1) * factor)
    # A query that has seen nothing yet: the difference of two infinities would not be a number.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
    kept = tl.exp2(best - shift)  # exactly 1 when the tile brought nothing larger
    total = tl.fma(total, kept, tl.sum(weights, axis=1))
    mixed = tl.dot(weights.to(values.dtype), values, mixed * kept[:, None], input_precision="ieee")
    return new_best, total, mixed
