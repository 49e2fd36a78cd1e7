"""Products in eight bits: activations are quantized row by row, and tensor cores multiply bytes.

Twice the rate of 16 bits, which counts where arithmetic does and not memory: for many rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude that is used of each type."""

_ROWS, _COLUMNS, _DEPTH, _WARPS, _STAGES = 128, 128, 128, 8, 3


@triton.jit
def _quantize_kernel(
    values_at: tl.tensor,
    scales_at: tl.tensor,
    x_at: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < size
    x = tl.load(x_at + row * x_stride + column, mask=used, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=0) / LARGEST
    # A row with something that is not finite keeps to be seen by its results: zero times it is no number.
    tl.store(scales_at + row, scale + tl.sum(x * 0.0, axis=0))
    values = tl.clamp(x / tl.where(scale > 0, scale, 1.0), -LARGEST, LARGEST)
    kind = values_at.dtype.element_ty
    if kind == tl.int8:
        values = tl.floor(values + 0.5)
    tl.store(values_at + row * size + column, values.to(kind), mask=used)


@triton.jit(do_not_specialize=["rows"])
def _scaled_product_kernel(
    out_at: tl.tensor,
    x_at: tl.tensor,
    x_scales_at: tl.tensor,
    weight_at: tl.tensor,
    scales_at: tl.tensor,
    bias_at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    WHOLE: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    # Rows and columns past the end read the last one: nothing of them is stored.
    row_used, column_used = row < rows, column < columns
    x_at += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * size
    weight_at += tl.minimum(column, columns - 1).to(tl.int64)[None, :] * size
    INTEGER: tl.constexpr = x_at.dtype.element_ty == tl.int8
    total = tl.zeros([ROWS, COLUMNS], tl.int32 if INTEGER else tl.float32)
    for step in range(STEPS):
        at = step * DEPTH + inner
        if WHOLE:
            x = tl.load(x_at + at[None, :])
            weight = tl.load(weight_at + at[:, None])
        else:
            x = tl.load(x_at + at[None, :], mask=(at < size)[None, :], other=0.0)
            weight = tl.load(weight_at + at[:, None], mask=(at < size)[:, None], other=0.0)
        if INTEGER:
            total = tl.dot(x, weight, total, out_dtype=tl.int32)
        else:
            # Hopper keeps sums of fp8 to 14 bits; after each step they are added up in float32.
            total = tl.dot(x, weight, total, max_num_imprecise_acc=DEPTH)
    x_scales = tl.load(x_scales_at + row, mask=row_used, other=0.0)[:, None]
    scales = tl.load(scales_at + column, mask=column_used, other=0.0)[None, :]
    result = total.to(tl.float32) * x_scales * scales
    if BIASED:
        result += tl.load(bias_at + column, mask=column_used, other=0.0).to(tl.float32)[None, :]
    target = out_at + row.to(tl.int64)[:, None] * columns + column[None, :]
    used = row_used[:, None] & column_used[None, :]
    tl.store(target, result.to(out_at.dtype.element_ty), mask=used)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows `[n, size]` in `dtype`, int8 or float8_e4m3fn, and their scales, float32 `[n]`."""
    rows, size = x.shape
    values = torch.empty(rows, size, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(size)
    _quantize_kernel[(rows,)](
        values, scales, x, size, x.stride(0), LARGEST=LARGEST[dtype], WIDTH=width, num_warps=_warps(width)
    )
    return values, scales


def scaled_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T`, each column times its scale, plus `bias`, of `x` rounded to the weight's type.

    `x` `[n, in_features]`, n at least 1, has any row stride; `weight` `[out_features, in_features]`, int8 or
    float8_e4m3fn, is contiguous; `scales` are float32 `[out_features]`. The result has `x`'s dtype.
    """
    rows, size = x.shape
    columns = weight.shape[0]
    values, x_scales = quantize_rows(x, weight.dtype)
    out = x.new_empty(rows, columns)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _scaled_product_kernel[grid](
        out, values, x_scales, weight, scales, out if bias is None else bias, rows, columns, size,
        **_shape(size), BIASED=bias is not None, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out


def _shape(size: int) -> dict[str, int | bool]:
    return {
        "WHOLE": size % _DEPTH == 0, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH,
        "STEPS": triton.cdiv(size, _DEPTH),
    }  # fmt: skip


def _warps(width: int) -> int:
    return min(max(width // 512, 1), 16)


def scaled_variants(name: str, kind: str, largest: float, min_capability: int) -> list[Variant]:
    """The forms of both kernels for bytes of that kind."""
    forms = []
    for dtype in ("bf16", "fp16"):
        types = {"out_at": f"*{dtype}", "x_at": f"*{kind}", "weight_at": f"*{kind}", "bias_at": f"*{dtype}"}
        for size, biased in ((1024, False), (1024, True), (2880, False)):
            constants = {**_shape(size), "BIASED": biased}
            form = f"{name}_{dtype}_{size}" + "_biased" * biased
            kernel = _scaled_product_kernel
            forms.append(_variant(form, kernel, types, constants, (_WARPS, _STAGES), min_capability))
        types = {"values_at": f"*{kind}", "x_at": f"*{dtype}"}
        for size in (1024, 3072, 14336):
            width = triton.next_power_of_2(size)
            shape = {"LARGEST": largest, "WIDTH": width}
            form = f"{name}_rows_{dtype}_{size}"
            kernel = _quantize_kernel
            forms.append(_variant(form, kernel, types, shape, (_warps(width), 3), min_capability))
    return forms


def _variant(
    name: str,
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    launch: tuple[int, int],
    min_capability: int,
) -> Variant:
    types = {"scales_at": "*fp32", "x_scales_at": "*fp32", **types}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    aligned = tuple(argument for argument in signature if argument not in {*constants, "rows"})
    return Variant(name, kernel, signature, constants, aligned, *launch, min_capability)
