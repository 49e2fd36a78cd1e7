"""Products of activations with weights in floats, int8 or fp8, which become floats of the activations' kind.

The sum over the inner dimension is cut into chunks at fixed places. Each chunk is summed from zero, and the
chunks' sums are added in order, either by one program or, where those would be too few to fill a GPU, by a
program for each chunk and a second kernel: by the same additions. So with the same `Tiles` a row's result has
the same bits in any batch.

Weights of fp8 need no instructions for it: an e4m3 byte, shifted, is a float16 of a 256th of its value,
subnormal numbers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant

FP8_SHIFT = 2.0**8
"""By so much larger are fp8 weights than what the kernel makes of their bytes."""


class Tiles(NamedTuple):
    """How a product is cut up; powers of two."""

    rows: int
    columns: int
    depth: int
    """Inner elements of one step."""
    chunk: int
    """Inner elements that are summed from zero."""
    warps: int
    stages: int


FIXED = Tiles(rows=64, columns=128, depth=64, chunk=256, warps=4, stages=3)
"""For results that do not depend on the batch. Few rows waste most of a tile, but wait for memory anyway."""

FIXED_BYTES = Tiles(rows=64, columns=64, depth=64, chunk=256, warps=4, stages=4)
"""The same for weights of eight bits."""

SMALL = {rows: Tiles(rows, 64, 128 if rows < 64 else 64, 512, 4, 4) for rows in (16, 32, 64)}
"""For so many rows and less, of weights of eight bits."""

_ENOUGH_PROGRAMS = 256
"""Two for each processor of a large GPU. Below, each chunk has programs of its own."""
_MERGE_COLUMNS = 1024


@triton.jit
def _weight_tile(
    weight_at: tl.tensor, used: tl.tensor, WHOLE: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Weights as floats of `DTYPE`: what fp8 and int8 hold is exact in all of them. Bytes are fp8."""
    weight = tl.load(weight_at) if WHOLE else tl.load(weight_at, mask=used, other=0)
    if weight.dtype == tl.uint8:
        byte = weight.to(tl.uint16)
        half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        weight = half.to(tl.float16, bitcast=True)
        if tl.bfloat16 == DTYPE:
            weight = weight.to(tl.float32)
    return weight.to(DTYPE)


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    out_at: tl.tensor,
    x_at: tl.tensor,
    weight_at: tl.tensor,
    scales_at: tl.tensor,
    bias_at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    # Rows and columns past the end read the last one: nothing of them is stored.
    x_rows_at = x_at + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
    weight_rows_at = weight_at + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * size
    dtype = x_at.dtype.element_ty
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Without parts there is one program along this axis, for all chunks.
    first = tl.program_id(2) * CHUNK
    last = first + CHUNK if PARTS else size
    while first < last:
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, CHUNK, DEPTH):
            at = first + start + inner
            used = at < size
            if WHOLE:
                x = tl.load(x_rows_at + at[None, :])
            else:
                x = tl.load(x_rows_at + at[None, :], mask=used[None, :], other=0.0)
            weight = _weight_tile(weight_rows_at + at[:, None], used[:, None], WHOLE, dtype)
            part = tl.dot(x, weight, part, input_precision="ieee")
        total += part
        first += CHUNK
    used = (row < rows)[:, None] & (column < columns)[None, :]
    if PARTS:
        place = tl.program_id(2).to(tl.int64) * rows * columns
        target = out_at + place + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, total, mask=used)
    else:
        target = out_at + row.to(tl.int64)[:, None] * columns + column[None, :]
        result = _finished(total, scales_at, bias_at, column, columns, SCALED, BIASED)
        tl.store(target, result.to(out_at.dtype.element_ty), mask=used)


@triton.jit
def _finished(
    total: tl.tensor,
    scales_at: tl.tensor,
    bias_at: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
) -> tl.tensor:
    """The sums `[rows, columns]` with scales and bias; a fused addition, so that it is one everywhere."""
    used = column < columns
    if SCALED:
        scales = tl.load(scales_at + column, mask=used, other=0.0)[None, :]
    if BIASED:
        bias = tl.load(bias_at + column, mask=used, other=0.0).to(tl.float32)[None, :]
    if SCALED and BIASED:
        total = tl.fma(total, tl.broadcast_to(scales, total.shape), tl.broadcast_to(bias, total.shape))
    elif SCALED:
        total *= scales
    elif BIASED:
        total += bias
    return total


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    out_at: tl.tensor,
    parts_at: tl.tensor,
    scales_at: tl.tensor,
    bias_at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used = (column < columns)[None, :]
    place = (row * columns + column)[None, :]
    total = tl.zeros([1, COLUMNS], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_at + part * rows.to(tl.int64) * columns + place, mask=used, other=0.0)
    result = _finished(total, scales_at, bias_at, column, columns, SCALED, BIASED)
    tl.store(out_at + place, result.to(out_at.dtype.element_ty), mask=used)


def weight_product(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, tiles: Tiles
) -> Tensor:
    """`x @ weight.T`, each column times its scale, plus `bias`: `[n, out_features]` in `x`'s dtype.

    `x` `[n, in_features]` has any row stride; `weight` `[out_features, in_features]` is contiguous, in `x`'s
    dtype, int8, or uint8 for the bytes of e4m3 numbers, whose scales must be `FP8_SHIFT` times as large.
    `scales` are float32 `[out_features]`.
    """
    rows, size = x.shape
    columns = weight.shape[0]
    out = x.new_empty(rows, columns)
    if not rows:
        return out
    grid = (triton.cdiv(columns, tiles.columns), triton.cdiv(rows, tiles.rows))
    parts = triton.cdiv(size, tiles.chunk)
    if parts > 1 and grid[0] * grid[1] < _ENOUGH_PROGRAMS:
        target = torch.empty(parts, rows, columns, dtype=torch.float32, device=x.device)
    else:
        target, parts = out, 1
    # What there is none of is not read; any pointer will do.
    ends = {"SCALED": scales is not None, "BIASED": bias is not None}
    own_ends = ends if parts == 1 else dict.fromkeys(ends, False)
    others = (out if scales is None else scales, out if bias is None else bias, rows, columns)
    _product_kernel[*grid, parts](
        target, x, weight, *others, size, x.stride(0),
        WHOLE=size % tiles.chunk == 0, **own_ends, PARTS=parts > 1,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, CHUNK=tiles.chunk,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if parts > 1:
        merge_grid = (triton.cdiv(columns, _MERGE_COLUMNS), rows)
        _merge_kernel[merge_grid](
            out, target, *others, PARTS=parts, **ends, COLUMNS=_MERGE_COLUMNS, num_warps=4
        )
    return out


_FORMS = ((True, False, False), (True, False, True), (True, True, False), (False, False, False))
"""Whether whole chunks, parts, with a bias."""


def product_variants(name: str, weight: str | None, tiles: Tiles) -> list[Variant]:
    """The forms of products over weights of that element type, None for that of the activations."""
    forms = []
    for dtype in ("bf16", "fp16"):
        kinds = {"x_at": f"*{dtype}", "weight_at": f"*{weight or dtype}", "scales_at": "*fp32"}
        for whole, parts, biased in _FORMS:
            form = f"{name}_{dtype}_r{tiles.rows}" + "_whole" * whole + "_parts" * parts + "_biased" * biased
            constants = {
                "WHOLE": whole, "SCALED": weight is not None and not parts, "BIASED": biased, "PARTS": parts,
                "ROWS": tiles.rows, "COLUMNS": tiles.columns,
                "DEPTH": tiles.depth, "CHUNK": tiles.chunk,
            }  # fmt: skip
            types = {**kinds, "out_at": "*fp32" if parts else f"*{dtype}", "bias_at": f"*{dtype}"}
            forms.append(_variant(form, _product_kernel, types, constants, tiles.warps, tiles.stages))
    return forms


def variants() -> list[Variant]:
    """The kernel that adds the chunks' sums; its companion's forms are listed where its weights are."""
    forms = []
    for dtype in ("bf16", "fp16"):
        for parts, scaled, biased in (
            (4, False, False),
            (12, True, False),
            (12, False, True),
            (4, True, True),
        ):
            types = {"out_at": f"*{dtype}", "parts_at": "*fp32", "scales_at": "*fp32", "bias_at": f"*{dtype}"}
            constants = {"PARTS": parts, "SCALED": scaled, "BIASED": biased, "COLUMNS": _MERGE_COLUMNS}
            name = f"product_merge_{dtype}_{parts}" + "_scaled" * scaled + "_biased" * biased
            forms.append(_variant(name, _merge_kernel, types, constants, 4, 3))
    return forms


def _variant(
    name: str,
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    warps: int,
    stages: int,
) -> Variant:
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    aligned = tuple(argument for argument in signature if argument not in {*constants, "rows"})
    return Variant(name, kernel, signature, constants, aligned, warps, stages)
