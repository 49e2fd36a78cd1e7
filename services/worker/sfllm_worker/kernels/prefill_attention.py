"""Paged attention of ragged chunks: each query sees the cache up to its own position, in place.

A program takes a tile of a chunk's queries for one key head: rows are (query, head of the group), so that
the group shares every load and small models still fill the matrix units. The list of tiles is made on the
host once a step, those with most to read first, so that no long one starts last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _walk(
    best: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    q: tl.tensor,
    own: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    table_at: tl.tensor,
    block_stride: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take the positions from `start` to `stop` into the sums of queries that stand at `own`.

    Without `MASKED`, every query sees all of them. Nothing is read from `end` on.
    """
    tokens = tl.arange(0, TILE)
    # Blocks are looked up a tile ahead: a load that waits for another in its own turn of the loop would
    # have its turn only every second stage of the pipeline.
    positions = start + tokens
    blocks = tl.load(table_at + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int32)
    for at in range(start, stop, TILE):
        positions = at + tokens
        offsets = blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * DIM
        ahead = positions + TILE
        blocks = tl.load(table_at + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int32)
        keys = load_tile(keys_at, offsets, positions < end, DIM, DIM_WIDTH, MASKED)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if CAPPED:
            scores = squashed(scores, inner)
        if MASKED:
            seen = positions[None, :] <= own[:, None]
            if WINDOWED:
                seen = seen & (positions[None, :] > own[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        values = load_tile(values_at, offsets, positions < end, DIM, DIM_WIDTH, MASKED)
        best, total, mixed = add_tile(best, total, mixed, scores, values, factor)
    return best, total, mixed


@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["tiles_at", "tables_at", "contexts_at"],
)
def _prefill_kernel(
    out_at: tl.tensor,
    q_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    tiles_at: tl.tensor,
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
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    tile_at = tiles_at + tl.program_id(0) * 4
    sequence = tl.load(tile_at)
    token = tl.load(tile_at + 1)
    queries = tl.load(tile_at + 2).to(tl.int32)
    lowest = (tl.load(contexts_at + sequence) - tl.load(tile_at + 3)).to(tl.int32)
    kv_head = tl.program_id(1)

    rows = tl.arange(0, ROWS)
    query = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIM_WIDTH)
    used = (query < queries)[:, None] & (dims < DIM)[None, :]
    q_rows = (token + query) * q_stride + heads * q_head_stride
    q = tl.load(q_at + q_rows[:, None] + dims[None, :], mask=used, other=0.0)
    own = lowest + query

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM_WIDTH], tl.float32)
    table_at = tables_at + sequence * table_stride
    keys_at += kv_head * (BLOCK_SIZE * DIM)
    values_at += kv_head * (BLOCK_SIZE * DIM)
    end = lowest + queries
    if WINDOWED:
        edge = tl.maximum(lowest - window + 1, 0) // TILE * TILE
    else:
        edge = (lowest + 1) // TILE * TILE
        best, total, mixed = _walk(
            best, total, mixed, q, own, keys_at, values_at, table_at, block_stride, 0, edge, end,
            window, inner, factor, DIM, DIM_WIDTH, BLOCK_SIZE, TILE, WINDOWED, CAPPED, False,
        )  # fmt: skip
    best, total, mixed = _walk(
        best, total, mixed, q, own, keys_at, values_at, table_at, block_stride, edge, end, end,
        window, inner, factor, DIM, DIM_WIDTH, BLOCK_SIZE, TILE, WINDOWED, CAPPED, True,
    )  # fmt: skip

    # Rows are laid out anew: kept through the loops, they would cost the registers that the sums need. The
    # second load, which says the same as the first, keeps the compiler from seeing that it could.
    rows += tl.load(tile_at + 2, volatile=True).to(tl.int32) - queries
    query = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    used = (query < queries)[:, None] & (dims < DIM)[None, :]
    target = out_at + ((token + query) * HEADS + heads)[:, None] * DIM + dims[None, :]
    tl.store(target, (mixed / total[:, None]).to(out_at.dtype.element_ty), mask=used)


def query_tiles(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    first: int,
    tile: int,
    device: torch.device | str,
) -> Tensor:
    """The tiles of up to `tile` queries of the sequences from `first` on, int64 `[count, 4]`.

    Each is (sequence, token row of its first query, queries, tokens from that query to the context's end).
    Those with the longest context come first. Sent without waiting for the device.
    """
    row = sum(query_lens[:first])
    tiles = []
    for sequence in range(first, len(query_lens)):
        length = query_lens[sequence]
        for start in range(0, length, tile):
            count = min(tile, length - start)
            reach = context_lens[sequence] - length + start + count
            tiles.append((reach, (sequence, row + start, count, length - start)))
        row += length
    tiles.sort(reverse=True)
    on_gpu = torch.device(device).type == "cuda"
    table = torch.tensor([entry for _, entry in tiles], dtype=torch.int64, pin_memory=on_gpu)
    return table.to(device, non_blocking=True)


def single_tiles(rows: int, device: torch.device | str) -> Tensor:
    """`query_tiles` of that many decodes in any order, made on the device: a capture may hold it."""
    numbers = torch.arange(rows, dtype=torch.int64, device=device)
    ones = torch.ones_like(numbers)
    return torch.stack((numbers, numbers, ones, ones), dim=1)


def queries_per_tile(heads: int, kv_heads: int, dim: int, element_bytes: int) -> int:
    """How many queries a program takes, which depends on nothing but the model."""
    return _rows(heads // kv_heads, dim, element_bytes) // (heads // kv_heads)


def prefill_attention(
    out: Tensor,
    q: Tensor,
    layer: KVLayer,
    tiles: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    options: AttentionOptions = PLAIN,
) -> None:
    """Attend with the queries of `tiles`, as made by `query_tiles` for `queries_per_tile`.

    `q` `[tokens, heads, head_dim]` may be strided but for its last dimension; `out` is contiguous and of
    the same shape, and only the rows of the tiles are written. `block_tables` and `context_lens` are
    int64, a row a sequence. Keys and values of the chunks must be in the cache already.
    """
    heads, dim = q.shape[1:]
    scoring = Scoring.of(options, dim)
    kv_heads, block_size = layer.k.shape[1:3]
    _prefill_kernel[len(tiles), kv_heads](
        out, q, layer.k, layer.v, tiles, block_tables, context_lens,
        q.stride(0), q.stride(1), layer.k.stride(0), block_tables.stride(0),
        scoring.window, scoring.inner, scoring.factor,
        **_shape(heads, kv_heads, dim, block_size, q.element_size()),
        WINDOWED=scoring.window > 0, CAPPED=scoring.capped, **_launch(dim, q.element_size()),
    )  # fmt: skip


def _rows(group: int, dim: int, element_bytes: int) -> int:
    """Rows of a program; in float32, whose products run without the matrix units, as few as may be."""
    least = 16 if element_bytes == 4 else 128 if dim <= 128 else 64
    return power_of_two(group, least)


def _shape(heads: int, kv_heads: int, dim: int, block_size: int, element_bytes: int) -> dict[str, int]:
    group, width = heads // kv_heads, power_of_two(dim)
    tile = max(16, min(64, 64 * 256 // (width * element_bytes)))
    return {
        "HEADS": heads, "GROUP": group, "ROWS": _rows(group, dim, element_bytes), "DIM": dim,
        "DIM_WIDTH": width, "BLOCK_SIZE": block_size, "TILE": tile,
    }  # fmt: skip


def _launch(dim: int, element_bytes: int) -> dict[str, int]:
    return {"num_warps": 8 if element_bytes == 2 else 4, "num_stages": 3 if dim <= 128 else 2}


def variants() -> list[Variant]:
    """The kernel for common shapes, with and without a window and a cap."""
    forms = []
    for form in common_shapes():
        shape = _shape(form.heads, form.kv_heads, form.dim, form.block_size, 2)
        constants = {**shape, "WINDOWED": form.special, "CAPPED": form.special}
        name = f"prefill_attention-{form.label}"
        forms.append(variant(name, _prefill_kernel, form.dtype, constants, **_launch(form.dim, 2)))
    return forms
