"""Paged attention written out densely in float64, and batches over caches that are full of traps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import AttentionBatch, AttentionOptions

TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3}


class Case:
    """A step over a cache whose unused slots hold NaN: queries, cache and layout."""

    def __init__(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in context_lens]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        self.batch = AttentionBatch.build(query_lens, context_lens, tables, block_size)
        shape = (sum(counts) + 1, kv_heads, block_size, dim)
        cache = torch.full((2, *shape), float("nan"), dtype=dtype)
        for table, length in zip(tables, context_lens, strict=True):
            for position in range(length):
                row = torch.randn(2, kv_heads, dim, generator=generator)
                cache[:, table[position // block_size], :, position % block_size] = row.to(dtype)
        self.layer = KVLayer(0, cache[0], cache[1])
        self.q = (2 * torch.randn(sum(query_lens), heads, dim, generator=generator)).to(dtype)

    def expected(self, options: AttentionOptions) -> Tensor:
        """What attention should give, float64 `[tokens, heads, dim]`."""
        batch, rows, at = self.batch, [], 0
        for sequence, (length, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            keys, values = (
                self._tokens(cache, sequence, context).double() for cache in (self.layer.k, self.layer.v)
            )
            for offset in range(length):
                position = context - length + offset
                rows.append(dense_row(self.q[at + offset].double(), keys, values, position, options))
            at += length
        return torch.stack(rows)

    def _tokens(self, cache: Tensor, sequence: int, context: int) -> Tensor:
        size = self.batch.block_size
        blocks = self.batch.block_tables[sequence].tolist()
        return torch.stack([cache[blocks[i // size], :, i % size] for i in range(context)], dim=1)


def dense_row(q: Tensor, keys: Tensor, values: Tensor, position: int, options: AttentionOptions) -> Tensor:
    """One query `[heads, dim]` at `position` over `[kv_heads, tokens, dim]`, in float64."""
    first = 0 if options.window is None else max(0, position + 1 - options.window)
    seen = slice(first, position + 1)
    group = q.shape[0] // keys.shape[0]
    keys = keys[:, seen].repeat_interleave(group, dim=0)
    values = values[:, seen].repeat_interleave(group, dim=0)
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = torch.einsum("hd,htd->ht", q, keys) * scale
    if options.soft_cap is not None:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    return torch.einsum("ht,htd->hd", torch.softmax(scores, dim=-1), values)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare kernel results with a float64 reference, within what their own type can hold."""
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def round_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round every element of a product on its own, as matrix units do.

    NumPy rounds the rows of a float32 product by their place among the rows.
    """

    def product(
        builder: object, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: object, limit: object
    ) -> TensorHandle:
        exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + c.data
        return TensorHandle(exact.astype(np.float32), c.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
