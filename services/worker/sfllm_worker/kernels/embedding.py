"""The rows of the tokens' embeddings and, in the same launch, the first layer's norm of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.norm import row_warps, scaled_row
from sfllm_worker.kernels.variant import Variant


@triton.jit
def _embed_norm_kernel(
    token_ids_at: tl.tensor,
    table_at: tl.tensor,
    weight_at: tl.tensor,
    hidden_at: tl.tensor,
    normed_at: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    SCALED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < SIZE
    dtype = table_at.dtype.element_ty
    token = tl.load(token_ids_at + row)
    hidden = tl.load(table_at + token * SIZE + column, mask=used, other=0.0)
    if SCALED:
        hidden = (hidden.to(tl.float32) * scale).to(dtype)
    tl.store(hidden_at + row * SIZE + column, hidden, mask=used)
    normed = scaled_row(hidden.to(tl.float32), weight_at + column, used, eps, SIZE, dtype)
    tl.store(normed_at + row * SIZE + column, normed, mask=used)


def embed_norm(
    token_ids: Tensor, table: Tensor, scale: float | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows `[n, size]` of `table` times `scale`, and their norm as by `norm.add_norm`.

    `token_ids` int64 `[n]` must be in the vocabulary: nothing checks them. `table` is contiguous.
    """
    rows, size = len(token_ids), table.shape[1]
    hidden, normed = table.new_empty(rows, size), table.new_empty(rows, size)
    width = triton.next_power_of_2(size)
    _embed_norm_kernel[(rows,)](
        token_ids,
        table,
        weight,
        hidden,
        normed,
        1.0 if scale is None else scale,
        eps,
        SCALED=scale is not None,
        SIZE=size,
        WIDTH=width,
        num_warps=row_warps(width),
    )
    return hidden, normed


def variants() -> list[Variant]:
    """The forms that models launch: plain, and Gemma's with a scale and float32 weights."""
    sizes = {"bf16": (1024, 3072, 8192), "fp16": (4096,), "fp32": (2048,)}
    return [
        _variant(dtype, size, scaled) for dtype in sizes for size in sizes[dtype] for scaled in (False, True)
    ]


def _variant(dtype: str, size: int, scaled: bool) -> Variant:
    width = triton.next_power_of_2(size)
    pointers = {"token_ids_at": "*i64", "table_at": f"*{dtype}"}
    pointers["weight_at"] = "*fp32" if scaled else f"*{dtype}"
    pointers |= dict.fromkeys(("hidden_at", "normed_at"), f"*{dtype}")
    constants = {"SCALED": scaled, "SIZE": size, "WIDTH": width}
    numbers = {"scale": "fp32", "eps": "fp32"}
    return Variant(
        name=f"embed{'_scaled' if scaled else ''}_{dtype}_{size}",
        kernel=_embed_norm_kernel,
        signature={**pointers, **numbers, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=tuple(pointers),
        num_warps=row_warps(width),
    )
