"""RMSNorm (Zhang and Sennrich, 2019) together with the addition to the residual stream before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant


@triton.jit
def scaled_row(
    x: tl.tensor,
    weight_at: tl.tensor,
    used: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The norm of a float32 row whose unused elements are zero, rounded to `DTYPE`.

    A weight of `DTYPE` multiplies what was rounded to it, any other what was not: see `layers.rms_norm`.
    """
    weight = tl.load(weight_at, mask=used, other=0.0)
    scaled = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    if weight.dtype == DTYPE:
        scaled = scaled.to(DTYPE).to(tl.float32)
    return (scaled * weight.to(tl.float32)).to(DTYPE)


@triton.jit
def _add_norm_kernel(
    residual_at: tl.tensor,
    added_at: tl.tensor,
    post_weight_at: tl.tensor,
    weight_at: tl.tensor,
    normed_at: tl.tensor,
    residual_stride: tl.tensor,
    added_stride: tl.tensor,
    normed_stride: tl.tensor,
    eps: tl.tensor,
    ADDED: tl.constexpr,
    POST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < SIZE
    dtype = residual_at.dtype.element_ty
    residual_at += row * residual_stride + column
    x = tl.load(residual_at, mask=used, other=0.0).to(tl.float32)
    if ADDED:
        added = tl.load(added_at + row * added_stride + column, mask=used, other=0.0).to(tl.float32)
        if POST:
            added = scaled_row(added, post_weight_at + column, used, eps, SIZE, dtype).to(tl.float32)
        total = (x + added).to(dtype)
        tl.store(residual_at, total, mask=used)
        x = total.to(tl.float32)
    normed = scaled_row(x, weight_at + column, used, eps, SIZE, dtype)
    tl.store(normed_at + row * normed_stride + column, normed, mask=used)


def add_norm(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    added: Tensor | None = None,
    post_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`rms_norm(residual, weight, eps)` of rows `[n, size]`, after `added` was added to them in place.

    With `post_weight`, what is added is normed by it first. All three are of one dtype and any row stride;
    weights are of that dtype or float32. Results are rounded where `Decoder` rounds them. `out` takes the
    result.
    """
    rows, size = residual.shape
    normed = torch.empty_like(residual) if out is None else out
    other = residual if added is None else added
    width = triton.next_power_of_2(size)
    _add_norm_kernel[(rows,)](
        residual,
        other,
        weight if post_weight is None else post_weight,
        weight,
        normed,
        residual.stride(0),
        other.stride(0),
        normed.stride(0),
        eps,
        ADDED=added is not None,
        POST=post_weight is not None,
        SIZE=size,
        WIDTH=width,
        num_warps=row_warps(width),
    )
    return normed


def row_warps(width: int) -> int:
    """Warps for one row of so many elements: one load of 16 bytes for each thread, where that is enough."""
    return min(max(width // 256, 1), 16)


def variants() -> list[Variant]:
    """The forms that models launch: plain, with an addition, and Gemma's with float32 weights."""
    forms = [(False, False), (True, False), (True, True)]
    sizes = {"bf16": (1024, 3072, 8192), "fp16": (4096,), "fp32": (2048,)}
    return [
        _variant(dtype, size, added=added, post=post)
        for dtype, of_dtype in sizes.items()
        for size in of_dtype
        for added, post in forms
    ]


def _variant(dtype: str, size: int, *, added: bool, post: bool) -> Variant:
    width = triton.next_power_of_2(size)
    rows, weight = f"*{dtype}", "*fp32" if post else f"*{dtype}"
    pointers = {"residual_at": rows, "added_at": rows, "post_weight_at": weight, "weight_at": weight}
    pointers["normed_at"] = rows
    strides = dict.fromkeys(("residual_stride", "added_stride", "normed_stride"), "i32")
    constants = {"ADDED": added, "POST": post, "SIZE": size, "WIDTH": width}
    kind = ("_added" if added else "") + ("_post" if post else "")
    return Variant(
        name=f"norm{kind}_{dtype}_{size}",
        kernel=_add_norm_kernel,
        signature={**pointers, **strides, "eps": "fp32", **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=(*pointers, *strides),
        num_warps=row_warps(width),
    )
