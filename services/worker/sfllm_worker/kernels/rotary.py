"""What happens to queries, keys and values between their product and attention, in one launch.

Queries and keys are normed and rotated, as the model has it; keys and values go into the paged cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.rope import Rotary

_HEADS = 8
"""Heads of a program."""
_TABLE_ROWS_AT_ONCE = 8192


def rotation_table(rotary: Rotary, length: int, device: torch.device) -> Tensor:
    """float32 `[length, rotary.dim]`: the cosines of each position's pairs of channels, then their sines.

    Taken from `Rotary` itself, so that all its scalings hold, also those that depend on the position.
    """
    half = rotary.dim // 2
    table = torch.empty(length, rotary.dim, dtype=torch.float32, device=device)
    for start in range(0, length, _TABLE_ROWS_AT_ONCE):
        part = table[start : start + _TABLE_ROWS_AT_ONCE]
        positions = torch.arange(start, start + len(part), device=device)
        cosines, signed_sines = rotary.rotation(positions, torch.float32)
        part[:, :half], part[:, half:] = cosines[:, 0, :half], signed_sines[:, 0, half:]
    return table


@triton.jit
def _square_sum(x: tl.tensor) -> tl.tensor:
    return tl.sum(x * x, axis=1)


@triton.jit
def _weighted(
    x: tl.tensor, scale: tl.tensor, weight_at: tl.tensor, used: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Part of normed heads, rounded as `norm.scaled_row` does; values have no weight and scale one."""
    weight = tl.load(weight_at, mask=used, other=1.0)
    scaled = x * scale[:, None]
    if weight.dtype == DTYPE:
        scaled = scaled.to(DTYPE).to(tl.float32)
    return (scaled * weight.to(tl.float32)).to(DTYPE).to(tl.float32)


@triton.jit
def _put(
    x: tl.tensor,
    q_at: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    head: tl.tensor,
    used: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """Store part of the heads where each belongs."""
    if FIRST < HEADS:
        tl.store(q_at, x.to(q_at.dtype.element_ty), mask=used & (head < HEADS))
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    tl.store(k_at, x.to(k_at.dtype.element_ty), mask=used & is_key)
    tl.store(v_at, x.to(v_at.dtype.element_ty), mask=used & (head >= HEADS + KV_HEADS))


@triton.jit
def _rotate_and_store_kernel(
    qkv_at: tl.tensor,
    norm_at: tl.tensor,
    table_at: tl.tensor,
    positions_at: tl.tensor,
    slots_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = FIRST + tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    exists = head < HEADS + 2 * KV_HEADS
    turns = head < HEADS + KV_HEADS
    HALF: tl.constexpr = ROTATED // 2
    dtype = qkv_at.dtype.element_ty
    slot = tl.load(slots_at + token)
    # Heads in the cache count from each kind's first; those of another kind are masked where they store.
    at_block = (slot // BLOCK_SIZE) * KV_HEADS
    at_token = slot % BLOCK_SIZE
    q_at = qkv_at + token * qkv_stride + head * DIM
    k_at = keys_at + ((at_block + head - HEADS) * BLOCK_SIZE + at_token) * DIM
    v_at = values_at + ((at_block + head - HEADS - KV_HEADS) * BLOCK_SIZE + at_token) * DIM
    norm_at += head * DIM

    # A thread holds both channels of a pair, so that rotating in place needs no barrier.
    pair = tl.arange(0, HALF_WIDTH)[None, :]
    in_pair = exists & (pair < HALF)
    rest = ROTATED + tl.arange(0, REST_WIDTH)[None, :]
    in_rest = exists & (rest < DIM)
    if ROTATED > 0:
        low = tl.load(q_at + pair, mask=in_pair, other=0.0).to(tl.float32)
        high = tl.load(q_at + HALF + pair, mask=in_pair, other=0.0).to(tl.float32)
    if ROTATED < DIM:
        still = tl.load(q_at + rest, mask=in_rest, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.zeros((GROUP,), dtype=tl.float32)
        if ROTATED > 0:
            squares += _square_sum(low) + _square_sum(high)
        if ROTATED < DIM:
            squares += _square_sum(still)
        scale = tl.where(tl.reshape(turns, (GROUP,)), tl.rsqrt(squares / DIM + eps), 1.0)
        if ROTATED > 0:
            low = _weighted(low, scale, norm_at + pair, in_pair & turns, dtype)
            high = _weighted(high, scale, norm_at + HALF + pair, in_pair & turns, dtype)
        if ROTATED < DIM:
            still = _weighted(still, scale, norm_at + rest, in_rest & turns, dtype)
    if ROTATED > 0:
        angle_at = table_at + tl.load(positions_at + token) * ROTATED + pair
        cosine = tl.load(angle_at, mask=pair < HALF, other=1.0)
        sine = tl.load(angle_at + HALF, mask=pair < HALF, other=0.0)
        new_low = tl.where(turns, low * cosine - high * sine, low)
        new_high = tl.where(turns, high * cosine + low * sine, high)
        _put(new_low, q_at + pair, k_at + pair, v_at + pair, head, in_pair, HEADS, KV_HEADS, FIRST)
        pair += HALF
        _put(new_high, q_at + pair, k_at + pair, v_at + pair, head, in_pair, HEADS, KV_HEADS, FIRST)
    if ROTATED < DIM:
        _put(still, q_at + rest, k_at + rest, v_at + rest, head, in_rest, HEADS, KV_HEADS, FIRST)


def rotate_and_store(
    qkv: Tensor,
    layer: KVLayer,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
    table: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm and rotate queries in place, norm and rotate keys into the cache, copy values there.

    `qkv` is `[n, (num_heads + 2 * kv_heads) * head_dim]`, rows of any stride; `layer` a plain, contiguous
    cache. `slots` and `positions` are int64 `[n]`. `table` is `rotation_table`'s, longer than the largest
    position, or None where nothing rotates; `norm` is `LayerWeights.qk_norm`. Keys in `qkv` keep
    their values.
    """
    _, kv_heads, block_size, dim = layer.k.shape
    rotated = 0 if table is None else table.shape[1]
    constants = _constants(num_heads, kv_heads, dim, rotated, block_size, normed=norm is not None)
    heads = num_heads + 2 * kv_heads - constants["FIRST"]
    _rotate_and_store_kernel[(len(qkv), triton.cdiv(heads, constants["GROUP"]))](
        qkv,
        qkv if norm is None else norm,
        qkv if table is None else table,
        positions,
        slots,
        layer.k,
        layer.v,
        qkv.stride(0),
        eps,
        **constants,
        num_warps=_warps(constants),
    )


def _constants(
    heads: int, kv_heads: int, dim: int, rotated: int, block_size: int, *, normed: bool
) -> dict[str, Any]:
    untouched = not normed and not rotated
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "ROTATED": rotated,
        "NORMED": normed,
        "BLOCK_SIZE": block_size,
        "FIRST": heads if untouched else 0,
        "GROUP": _HEADS,
        "HALF_WIDTH": triton.next_power_of_2(max(rotated // 2, 1)),
        "REST_WIDTH": triton.next_power_of_2(max(dim - rotated, 1)),
    }


def _warps(constants: dict[str, Any]) -> int:
    """Enough that no thread holds more than eight elements of a part."""
    widest = max(constants["HALF_WIDTH"], constants["REST_WIDTH"])
    return int(max(1, constants["GROUP"] * widest // 256))


def variants() -> list[Variant]:
    """The forms that models launch: norms or none, all, some or no channels rotated."""
    shapes = [
        ("bf16", 16, 8, 128, 128, 16, True),  # Qwen3
        ("bf16", 32, 8, 128, 128, 256, False),  # Llama 3
        ("bf16", 9, 3, 64, 64, 16, False),  # SmolLM2
        ("bf16", 32, 32, 96, 96, 16, False),  # Phi-3
        ("bf16", 24, 8, 128, 96, 32, False),  # Phi-4-mini
        ("bf16", 4, 1, 256, 256, 16, True),  # Gemma 3
        ("bf16", 16, 4, 128, 0, 16, False),  # SmolLM3's layers without rotation
        ("fp16", 16, 8, 128, 128, 64, True),
        ("fp16", 8, 4, 256, 256, 16, False),  # Gemma 2
        ("fp32", 16, 8, 128, 128, 16, True),
    ]
    return [_variant(*shape) for shape in shapes]


def _variant(
    dtype: str, heads: int, kv_heads: int, dim: int, rotated: int, block_size: int, normed: bool
) -> Variant:
    pointers = {"qkv_at": f"*{dtype}", "norm_at": "*fp32" if dim == 256 and normed else f"*{dtype}"}
    pointers["table_at"] = "*fp32" if rotated else f"*{dtype}"
    pointers |= dict.fromkeys(("positions_at", "slots_at"), "*i64")
    pointers |= dict.fromkeys(("keys_at", "values_at"), f"*{dtype}")
    constants = _constants(heads, kv_heads, dim, rotated, block_size, normed=normed)
    norm = "normed_" if normed else ""
    return Variant(
        name=f"rotary_{norm}{dtype}_{heads}_{kv_heads}_{dim}_{rotated}_{block_size}",
        kernel=_rotate_and_store_kernel,
        signature={
            **pointers,
            "qkv_stride": "i32",
            "eps": "fp32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        aligned=(*pointers, "qkv_stride"),
        num_warps=_warps(constants),
    )
