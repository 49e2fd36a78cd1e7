"""The kernels between a layer's products and attention, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench.gpu_check.checks import Check, Setting, name_of
from layer_references import assert_rounded, wide_gated, wide_norm, wide_rotation
from torch import Tensor

from sfllm_worker.kernels.activation import KINDS, gated_product
from sfllm_worker.kernels.embedding import embed_norm
from sfllm_worker.kernels.norm import add_norm
from sfllm_worker.kernels.rotary import rotate_and_store, rotation_table
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.rope import Rotary, inverse_frequencies
from sfllm_worker.model.rope_config import Rope

EPS = 1e-6
HEADS = [(16, 8, 128, 128, True), (9, 3, 64, 64, False), (24, 8, 128, 96, False), (4, 1, 256, 256, True)]
"""Query heads, key heads, channels, rotated channels, whether queries and keys are normed."""


def checks(setting: Setting) -> list[Check]:
    """Each kernel in each format."""
    kernels: list[tuple[str, Callable[[Setting, torch.dtype], str]]] = [
        ("RMSNorm and residual", normed),
        ("embedding", embedded),
        ("gated products", gated),
        ("QK-norm, RoPE and KV write", rotated),
    ]
    return [
        Check(f"{title} {name_of(dtype)}", partial(check, setting, dtype))
        for title, check in kernels
        for dtype in setting.dtypes
    ]


def normed(setting: Setting, dtype: torch.dtype) -> str:
    """Rows of several sizes, what is added to them, and the norm of the sum."""
    for size in sizes(setting):
        residual, added = rows(7, size, dtype, 1), 5 * rows(7, size, dtype, 2)
        weight = 1 + rows(1, size, dtype, 3)[0] / 4
        ours = residual.to(setting.device, copy=True)
        result = add_norm(ours, weight.to(setting.device), EPS, added.to(setting.device))
        wide = added.double()
        assert_rounded(ours.cpu(), residual.double() + wide, roundings=1, scale=float(wide.abs().max()))
        assert_rounded(result.cpu(), wide_norm(ours.cpu(), weight, EPS), roundings=2)
    return f"rows of {', '.join(map(str, sizes(setting)))}"


def embedded(setting: Setting, dtype: torch.dtype) -> str:
    """Rows of a table and their norms."""
    for size in sizes(setting):
        table, weight = rows(90, size, dtype, 1), rows(1, size, torch.float32, 2)[0]
        ids = torch.tensor([89, 0, 7, 7])
        moved = [tensor.to(setting.device) for tensor in (ids, table, weight)]
        hidden, result = embed_norm(moved[0], moved[1], None, moved[2], EPS)
        assert torch.equal(hidden.cpu(), table[ids]), "rows differ from the table's"
        assert_rounded(result.cpu(), wide_norm(table[ids], weight, EPS), roundings=1)
    return f"rows of {', '.join(map(str, sizes(setting)))}"


def gated(setting: Setting, dtype: torch.dtype) -> str:
    """Every activation, by its definition."""
    size = sizes(setting)[-1]
    for kind in KINDS:
        gate_up = 3 * rows(5, 2 * size, dtype, 1)
        scale = float(gate_up.abs().max()) if dtype == torch.float32 else 0.0
        result = gated_product(gate_up.to(setting.device), kind)
        # The device's exponential is good to two units in the last place of float32, before the rounding.
        assert_rounded(result.cpu(), wide_gated(gate_up, kind), roundings=2, scale=scale)
    return ", ".join(KINDS)


def rotated(setting: Setting, dtype: torch.dtype) -> str:
    """Queries in place, keys and values in the cache."""
    for heads, kv_heads, dim, channels, with_norm in HEADS if setting.on_gpu else HEADS[1:2]:
        total, turning = heads + 2 * kv_heads, heads + kv_heads
        before = rows(4, total * dim, dtype, 1).view(4, total, dim)
        norm = 1 + rows(turning, dim, dtype, 2) / 4 if with_norm else None
        positions, slots = torch.tensor([0, 3, 4095, 17]), torch.tensor([13, 38, 63, 16])
        rope = Rope(10000.0, channels)
        table = rotation_table(Rotary(rope, setting.device), 4096, setting.device)
        cache = torch.zeros(2, 4, kv_heads, 16, dim, dtype=dtype, device=setting.device)
        layer = KVLayer(0, cache[0], cache[1])
        ours = before.to(setting.device, copy=True)
        moved_norm = norm if norm is None else norm.to(setting.device)
        on_device = slots.to(setting.device), positions.to(setting.device)
        rotate_and_store(ours.view(4, -1), layer, *on_device, heads, table, moved_norm, EPS)
        turned = before[:, :turning].double()
        if norm is not None:
            turned = wide_norm(turned, norm, EPS)
        turned = wide_rotation(turned, positions, inverse_frequencies(rope))
        keys, values = (cache.cpu()[slots // 16, :, slots % 16] for cache in (layer.k, layer.v))
        assert_rounded(ours.cpu()[:, :heads], turned[:, :heads], roundings=3, scale=1.0)
        assert_rounded(keys, turned[:, heads:], roundings=3, scale=1.0)
        assert torch.equal(values, before[:, turning:]), "values in the cache differ"
    return "queries, keys and values"


def sizes(setting: Setting) -> tuple[int, ...]:
    """Widths of rows: powers of two and others."""
    return (64, 576, 1024, 3072, 5120, 8192) if setting.on_gpu else (64, 80)


def rows(count: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows on the CPU."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
