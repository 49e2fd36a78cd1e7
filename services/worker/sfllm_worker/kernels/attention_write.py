"""Storing new keys and values in the paged cache, for layers whose rotary kernel does not do it."""

from __future__ import annotations

from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.attention_tiles import power_of_two, variant
from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kv.cache import KVLayer


@triton.jit(do_not_specialize_on_alignment=["slots_at"])
def _write_kernel(
    keys_at: tl.tensor,
    values_at: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    slots_at: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    block_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_at + token)
    heads = tl.arange(0, HEADS_WIDTH)[:, None]
    dims = tl.arange(0, DIM_WIDTH)[None, :]
    used = (heads < KV_HEADS) & (dims < DIM)
    k = tl.load(k_at + token * k_stride + heads * k_head_stride + dims, mask=used)
    v = tl.load(v_at + token * v_stride + heads * v_head_stride + dims, mask=used)
    place = slot // BLOCK_SIZE * block_stride + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + dims
    tl.store(keys_at + place, k, mask=used)
    tl.store(values_at + place, v, mask=used)


def write_kv(layer: KVLayer, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Store `k` and `v`, each `[tokens, kv_heads, head_dim]`, at their tokens' slots (int64).

    Both may be strided but for the last dimension. Tokens with the same slot leave either's values.
    """
    tokens, kv_heads, dim = k.shape
    _write_kernel[tokens,](
        layer.k, layer.v, k, v, slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), layer.k.stride(0),
        **_shape(kv_heads, dim, layer.k.shape[2]), num_warps=4,
    )  # fmt: skip


def _shape(kv_heads: int, dim: int, block_size: int) -> dict[str, int]:
    return {
        "KV_HEADS": kv_heads, "HEADS_WIDTH": power_of_two(kv_heads, 1), "DIM": dim,
        "DIM_WIDTH": power_of_two(dim), "BLOCK_SIZE": block_size,
    }  # fmt: skip


def variants() -> list[Variant]:
    """The kernel for common shapes."""
    return [
        variant(f"write_kv-{dtype}-d{dim}-b{size}", _write_kernel, dtype, _shape(8, dim, size))
        for dtype, dim, size in product(("bf16", "fp16"), (64, 128, 256), (16, 64))
    ]
