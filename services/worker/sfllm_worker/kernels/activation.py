"""The gated product of a feed-forward layer: an activation of the gate times the other half."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant

KINDS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What the kernel calls the activations of `model.layers.ACTIVATIONS`."""

_WIDTH, _WARPS = 1024, 4
"""Elements of a program: 16 bytes of each half for each thread."""


@triton.jit
def _gated_product_kernel(
    gate_up_at: tl.tensor,
    product_at: tl.tensor,
    gate_up_stride: tl.tensor,
    product_stride: tl.tensor,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    # Rows along the first axis: the others of a grid end at 65535, and a step may have more tokens.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    used = column < SIZE
    gate_at = gate_up_at + row * gate_up_stride + column
    gate = tl.load(gate_at, mask=used, other=0.0).to(tl.float32)
    up = tl.load(gate_at + SIZE, mask=used, other=0.0).to(tl.float32)
    if KIND == "gelu":
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the logistic function of 2z; the constant is twice the root of 2 / pi.
        share = 1 / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        share = 1 / (1 + tl.exp(-gate))
    product = gate * share * up
    tl.store(product_at + row * product_stride + column, product.to(product_at.dtype.element_ty), mask=used)


def gated_product(gate_up: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """`[n, size]` for rows `[n, 2 * size]`: the activation `KINDS[kind]` of the first half times the second.

    Computed in float32 and rounded once. Rows may have any stride. `out` takes the result.
    """
    rows, both = gate_up.shape
    size = both // 2
    product = gate_up.new_empty(rows, size) if out is None else out
    grid = (rows, triton.cdiv(size, _WIDTH))
    strides = gate_up.stride(0), product.stride(0)
    _gated_product_kernel[grid](
        gate_up, product, *strides, SIZE=size, KIND=KINDS[kind], WIDTH=_WIDTH, num_warps=_WARPS
    )
    return product


def variants() -> list[Variant]:
    """The forms that models launch."""
    sizes = {"bf16": (3072, 8960), "fp16": (14336,), "fp32": (5632,)}
    kinds = dict.fromkeys(KINDS.values())
    return [_variant(dtype, size, kind) for dtype in sizes for size in sizes[dtype] for kind in kinds]


def _variant(dtype: str, size: int, kind: str) -> Variant:
    pointers = dict.fromkeys(("gate_up_at", "product_at"), f"*{dtype}")
    strides = dict.fromkeys(("gate_up_stride", "product_stride"), "i32")
    constants = {"SIZE": size, "KIND": kind, "WIDTH": _WIDTH}
    return Variant(
        name=f"gated_{kind}_{dtype}_{size}",
        kernel=_gated_product_kernel,
        signature={**pointers, **strides, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=(*pointers, *strides),
        num_warps=_WARPS,
    )
