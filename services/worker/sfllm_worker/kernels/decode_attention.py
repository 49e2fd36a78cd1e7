"""Paged attention of one query per sequence, with the context split among programs.

A program takes one key head of one sequence and one split of its context, of fixed size and place, so that
splits never depend on the batch (flash-decoding; Dao et al. 2023). All query heads of the group share its
loads. A row whose context lies in one split is finished there; other rows leave partial results in scratch,
which a second kernel merges in order. The same compiled program computes a row whatever the batch and the
longest context of the launch, so its bits never depend on them.
"""

from __future__ import annotations

from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.attention_scratch import SPLIT_TOKENS, DecodeScratch
from sfllm_worker.kernels.attention_tiles import (
    Scoring,
    add_tile,
    common_shapes,
    load_tile,
    power_of_two,
    squashed,
    variant,
)
from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import PLAIN, AttentionOptions

_WARPS = 4
_STAGES = 3  # two tiles of keys and values on their way, with which three programs fit a processor
_MERGED_SPLITS = 16
"""Splits that are merged at a time."""


@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["tables_at", "contexts_at"],
)
def _decode_kernel(
    out_at: tl.tensor,
    mixed_at: tl.tensor,
    stats_at: tl.tensor,
    q_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    tables_at: tl.tensor,
    contexts_at: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    context = tl.load(contexts_at + row).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0)
    first_split = first // SPLIT
    begin = (first_split + tl.program_id(2)) * SPLIT
    if begin >= context:
        return
    end = tl.minimum(begin + SPLIT, context)
    start = begin
    if WINDOWED:
        start = tl.maximum(begin, first // TILE * TILE)

    members = tl.arange(0, GROUP_ROWS)
    heads = kv_head * GROUP + members
    dims = tl.arange(0, DIM_WIDTH)
    used = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_at + row * q_stride + heads[:, None] * q_head_stride + dims[None, :], mask=used, other=0.0)

    best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mixed = tl.zeros([GROUP_ROWS, DIM_WIDTH], tl.float32)
    table_at = tables_at + row * table_stride
    keys_at += kv_head * (BLOCK_SIZE * DIM)
    values_at += kv_head * (BLOCK_SIZE * DIM)
    # Blocks are looked up a tile ahead: a load that waits for another in its own turn of the loop would
    # have its turn only every second stage of the pipeline.
    tokens = tl.arange(0, TILE)
    positions = start + tokens
    blocks = tl.load(table_at + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int32)
    for at in range(start, end, TILE):
        positions = at + tokens
        seen = positions < end
        if WINDOWED:
            seen = seen & (positions >= first)
        offsets = blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * DIM
        ahead = positions + TILE
        blocks = tl.load(table_at + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int32)
        keys = load_tile(keys_at, offsets, seen, DIM, DIM_WIDTH, True)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if CAPPED:
            scores = squashed(scores, inner)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        values = load_tile(values_at, offsets, seen, DIM, DIM_WIDTH, True)
        best, total, mixed = add_tile(best, total, mixed, scores, values, factor)

    if (context - 1) // SPLIT == first_split:
        mixed = mixed / total[:, None]
        target = out_at + (row * HEADS + heads)[:, None] * DIM + dims[None, :]
        tl.store(target, mixed.to(out_at.dtype.element_ty), mask=used)
    else:
        place = (row * tl.num_programs(2) + tl.program_id(2)) * HEADS + heads
        tl.store(mixed_at + place[:, None] * DIM + dims[None, :], mixed, mask=used)
        tl.store(stats_at + place * 2, best, mask=members < GROUP)
        tl.store(stats_at + place * 2 + 1, total, mask=members < GROUP)


@triton.jit(do_not_specialize=["window", "splits"], do_not_specialize_on_alignment=["contexts_at"])
def _merge_kernel(
    out_at: tl.tensor,
    mixed_at: tl.tensor,
    stats_at: tl.tensor,
    contexts_at: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    context = tl.load(contexts_at + row).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0)
    count = (context - 1) // SPLIT - first // SPLIT + 1
    if count <= 1:
        return
    place = row * splits * HEADS + head
    best = tl.full([MERGED], float("-inf"), tl.float32)
    for at in range(0, count, MERGED):
        numbers = at + tl.arange(0, MERGED)
        found = tl.load(stats_at + (place + numbers * HEADS) * 2, mask=numbers < count, other=float("-inf"))
        best = tl.maximum(best, found)
    highest = tl.max(best, axis=0)

    dims = tl.arange(0, DIM_WIDTH)
    total = 0.0
    mixed = tl.zeros([DIM_WIDTH], tl.float32)
    for at in range(0, count, MERGED):
        numbers = at + tl.arange(0, MERGED)
        valid = numbers < count
        places = place + numbers * HEADS
        found = tl.load(stats_at + places * 2, mask=valid, other=float("-inf"))
        weights = tl.exp2(found - highest)
        total += tl.sum(weights * tl.load(stats_at + places * 2 + 1, mask=valid, other=0.0), axis=0)
        used = valid[:, None] & (dims < DIM)[None, :]
        parts = tl.load(mixed_at + places[:, None] * DIM + dims[None, :], mask=used, other=0.0)
        mixed += tl.sum(weights[:, None] * parts, axis=0)
    target = out_at + (row * HEADS + head) * DIM + dims
    tl.store(target, (mixed / total).to(out_at.dtype.element_ty), mask=dims < DIM)


def decode_attention(
    out: Tensor,
    q: Tensor,
    layer: KVLayer,
    block_tables: Tensor,
    context_lens: Tensor,
    rows: int,
    longest: int,
    scratch: DecodeScratch,
    options: AttentionOptions = PLAIN,
) -> None:
    """Attend with the first `rows` rows of `q`, each the newest token of its sequence.

    `q` `[>= rows, heads, head_dim]` may be strided but for its last dimension; `out` is contiguous and of
    the same shape. `block_tables` and `context_lens` are int64, a row a sequence. `longest` bounds the
    contexts of the launch: it sets the grid and nothing else, so that a captured launch serves any
    contexts up to it. The scratch must have been reserved for both.
    """
    heads, dim = q.shape[1:]
    scoring = Scoring.of(options, dim)
    splits = scratch.splits(longest, scoring.window)
    kv_heads, block_size = layer.k.shape[1:3]
    shape = _shape(heads, kv_heads, dim, block_size, scratch.split, q.element_size())
    windowed = scoring.window > 0
    _decode_kernel[rows, kv_heads, splits](
        out, scratch.mixed, scratch.stats, q, layer.k, layer.v, block_tables, context_lens,
        q.stride(0), q.stride(1), layer.k.stride(0), block_tables.stride(0),
        scoring.window, scoring.inner, scoring.factor,
        **shape, WINDOWED=windowed, CAPPED=scoring.capped, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[rows, heads](
            out, scratch.mixed, scratch.stats, context_lens, scoring.window, splits,
            HEADS=heads, DIM=dim, DIM_WIDTH=shape["DIM_WIDTH"], SPLIT=scratch.split,
            MERGED=_MERGED_SPLITS, WINDOWED=windowed, num_warps=_WARPS,
        )  # fmt: skip


def _shape(
    heads: int, kv_heads: int, dim: int, block_size: int, split: int, element_bytes: int
) -> dict[str, int]:
    """The kernel's constants. Tiles are as large as leaves room for several programs on a processor."""
    group, width = heads // kv_heads, power_of_two(dim)
    tile = max(16, min(64 * 256 // (width * element_bytes), split))
    return {
        "HEADS": heads, "GROUP": group, "GROUP_ROWS": power_of_two(group), "DIM": dim, "DIM_WIDTH": width,
        "BLOCK_SIZE": block_size, "SPLIT": split, "TILE": tile,
    }  # fmt: skip


def variants() -> list[Variant]:
    """Both kernels for common shapes, with and without a window and a cap."""
    forms = []
    for form in common_shapes():
        shape = _shape(form.heads, form.kv_heads, form.dim, form.block_size, SPLIT_TOKENS, 2)
        constants = {**shape, "WINDOWED": form.special, "CAPPED": form.special}
        name = f"decode_attention-{form.label}"
        forms.append(variant(name, _decode_kernel, form.dtype, constants, _WARPS, _STAGES))
    for dtype, dim, special in product(("bf16", "fp16"), (64, 128, 256), (False, True)):
        name = f"decode_merge-{dtype}-d{dim}" + "-special" * special
        constants = {
            "HEADS": 16, "DIM": dim, "DIM_WIDTH": power_of_two(dim), "SPLIT": SPLIT_TOKENS,
            "MERGED": _MERGED_SPLITS, "WINDOWED": special,
        }  # fmt: skip
        forms.append(variant(name, _merge_kernel, dtype, constants))
    return forms
