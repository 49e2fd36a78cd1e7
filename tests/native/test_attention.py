"""Native attention over the paged cache against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.native import structures as s
from sfllm_worker.native.attention import batch_spec
from sfllm_worker.native.library import check

TYPES = {torch.float32: s.FLOAT32, torch.bfloat16: s.BFLOAT16}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
SPLIT = 1024


def native_keys(plain: Tensor) -> Tensor:
    """Blocks `[blocks, heads, slots, channels]` with a word of each slot after the other."""
    return plain.unflatten(3, (-1, 4 // plain.itemsize)).transpose(2, 3).contiguous()


def native_values(plain: Tensor) -> Tensor:
    """The same with neighbouring slots in a word."""
    return plain.unflatten(2, (-1, 4 // plain.itemsize)).transpose(3, 4).contiguous()


@dataclass
class Case:
    """Sequences with queries at their end, over a cache whose unused slots are NaN."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    lengths: Sequence[tuple[int, int]]
    """(queries, context) of each sequence."""
    window: int | None = None
    soft_cap: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = sum(queries for queries, _ in self.lengths)
        # Keys and values are laid out the same for any seed, which only scatters the blocks.
        self.q = torch.randn(rows, self.heads, self.head_dim, generator=generator).to(self.dtype)
        self.k = [self._random(context, generator) for _, context in self.lengths]
        self.v = [self._random(context, generator) for _, context in self.lengths]
        counts = [-(-context // self.block_size) for _, context in self.lengths]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed)) + 1).tolist()
        self.tables = [order[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
        shape = (sum(counts) + 1, self.kv_heads, self.block_size, self.head_dim)
        self.key_cache, self.value_cache = (torch.full(shape, float("nan"), dtype=self.dtype) for _ in "kv")
        for table, k, v in zip(self.tables, self.k, self.v, strict=True):
            for position in range(len(k)):
                block, slot = table[position // self.block_size], position % self.block_size
                self.key_cache[block, :, slot], self.value_cache[block, :, slot] = k[position], v[position]

    def _random(self, context: int, generator: torch.Generator) -> Tensor:
        return torch.randn(context, self.kv_heads, self.head_dim, generator=generator).to(self.dtype)

    def begin_alike(self, members: Sequence[int], blocks: int) -> None:
        """Let sequences have the first `blocks` blocks of the first of them."""
        first, tokens = members[0], blocks * self.block_size
        for member in members[1:]:
            self.tables[member][:blocks] = self.tables[first][:blocks]
            self.k[member][:tokens], self.v[member][:tokens] = self.k[first][:tokens], self.v[first][:tokens]

    def alone(self, member: int) -> Case:
        """One of the sequences, over the same cache."""
        one = replace(self, lengths=[self.lengths[member]])
        row = sum(queries for queries, _ in self.lengths[:member])
        one.q = self.q[row : row + self.lengths[member][0]].contiguous()
        one.tables, one.k, one.v = [self.tables[member]], [self.k[member]], [self.v[member]]
        one.key_cache, one.value_cache = self.key_cache, self.value_cache
        return one

    def run(self, library: ctypes.CDLL, threads: int = 2) -> Tensor:
        key_cache, value_cache = native_keys(self.key_cache), native_values(self.value_cache)
        queries, contexts = zip(*self.lengths, strict=True)
        batch = AttentionBatch.build(queries, contexts, self.tables, self.block_size)
        out = torch.full_like(self.q, float("nan"))
        step = s.StepSpec(
            num_tokens=batch.num_tokens,
            num_sequences=len(contexts),
            table_width=batch.block_tables.shape[1],
            context_lens=batch.context_lens_tensor.data_ptr(),
            last_rows=batch.last_rows.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            threads=threads,
        )
        spec = s.AttentionSpec(
            TYPES[self.dtype],
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.window or 0,
            self.head_dim**-0.5,
            self.soft_cap or 0.0,
            self.q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
        )
        check(library.sfllm_attend(byref(spec), byref(step)))
        return out

    def exact(self) -> Tensor:
        """In float64, row by row as the definition has it."""
        outs, row = [], 0
        for (queries, context), k, v in zip(self.lengths, self.k, self.v, strict=True):
            q = self.q[row : row + queries].double()
            keys, values = (x.double().repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            positions = torch.arange(context - queries, context)[:, None]
            seen = torch.arange(context) <= positions
            if self.window:
                seen &= torch.arange(context) > positions - self.window
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values))
            row += queries
        return torch.cat(outs)


RAGGED = [(1, 1), (1, 64), (1, 65), (1, 300), (1, 17), (5, 5), (1 + 48, 49), (70, 200), (3, 131)]
SHAPES = [(9, 3, 64, 32), (4, 4, 16, 4), (6, 2, 8, 16), (8, 1, 128, 16), (2, 2, 256, 8), (16, 2, 80, 2)]


def close(case: Case, library: ctypes.CDLL) -> None:
    tolerance = TOLERANCES[case.dtype]
    torch.testing.assert_close(case.run(library).double(), case.exact(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_ragged_batches_equal_float64(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    close(Case(heads, kv_heads, head_dim, block_size, dtype, RAGGED), library)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 7, 64, 100, 1000])
def test_windows_equal_float64(library: ctypes.CDLL, dtype: torch.dtype, window: int) -> None:
    close(Case(4, 2, 32, 16, dtype, RAGGED, window=window), library)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [None, 50])
def test_soft_caps_equal_float64(library: ctypes.CDLL, dtype: torch.dtype, window: int | None) -> None:
    close(Case(4, 2, 32, 16, dtype, RAGGED, window=window, soft_cap=1.5), library)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("context", [SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 70])
@pytest.mark.parametrize("window", [None, SPLIT + 100])
def test_long_contexts_equal_float64_however_they_are_cut(
    library: ctypes.CDLL, dtype: torch.dtype, context: int, window: int | None
) -> None:
    case = Case(2, 1, 16, 32, dtype, [(1, context)], window=window)
    close(case, library)
    # One thread is given enough heads and sequences to keep the keys of each together.
    assert torch.equal(case.run(library, threads=8), case.run(library, threads=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_query_has_the_same_result_to_the_last_bit_decoded_and_in_a_chunk(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    context = SPLIT + 90
    chunk = Case(4, 2, 32, 16, dtype, [(100, context)])
    together = chunk.run(library)
    for row in (0, 1, 33, 47, 48, 99):
        one = Case(4, 2, 32, 16, dtype, [(1, context - 99 + row)])
        one.q, one.tables = chunk.q[row : row + 1].contiguous(), chunk.tables
        one.key_cache, one.value_cache = chunk.key_cache, chunk.value_cache
        assert torch.equal(one.run(library), together[row : row + 1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_decodes_that_begin_alike_are_those_of_each_alone_to_the_last_bit(
    library: ctypes.CDLL, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    case = Case(heads, kv_heads, head_dim, block_size, dtype, [(1, 400 + 7 * i) for i in range(12)] + RAGGED)
    case.begin_alike([0, 2, 3, 5, 8], 384 // block_size)
    case.begin_alike([1, 4, 6, 7], 200 // block_size)
    case.begin_alike([9, 10], 64 // block_size)
    close(case, library)
    together = case.run(library, threads=1)
    assert torch.equal(case.run(library), together)
    for member in range(12):
        assert torch.equal(case.alone(member).run(library), together[member : member + 1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shared", [SPLIT - 64, SPLIT, SPLIT + 64, 2 * SPLIT + 128])
def test_decodes_may_share_any_number_of_keys(library: ctypes.CDLL, dtype: torch.dtype, shared: int) -> None:
    case = Case(6, 2, 16, 32, dtype, [(1, shared + extra) for extra in (1, 40, 64, 65, SPLIT, SPLIT + 70)])
    case.begin_alike(range(6), shared // 32)
    close(case, library)
    together = case.run(library, threads=1)
    for member in range(6):
        assert torch.equal(case.alone(member).run(library), together[member : member + 1])


@pytest.mark.parametrize("dtype", TYPES)
def test_more_decodes_than_a_tile_has_room_for_may_begin_alike(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    case = Case(4, 2, 16, 16, dtype, [(1, 300 + i) for i in range(60)])
    case.begin_alike(range(60), 16)
    close(case, library)
    assert torch.equal(case.run(library, threads=1)[59:], case.alone(59).run(library))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_window_is_kept_where_decodes_begin_alike(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = Case(4, 2, 16, 16, dtype, [(1, 300 + i) for i in range(8)], window=100)
    case.begin_alike(range(8), 16)
    close(case, library)


@pytest.mark.parametrize("dtype", TYPES)
def test_where_the_blocks_lie_changes_nothing(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    first, second = (Case(4, 2, 32, 16, dtype, RAGGED, seed=seed).run(library) for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_among_the_keys_reaches_the_result(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = Case(4, 2, 32, 16, dtype, [(1, 40), (1, 90)])
    case.key_cache[case.tables[1][0], 0, 3, 5] = float("nan")
    out = case.run(library)
    assert not out[0].isnan().any()
    assert bool(out[1, :2].isnan().all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 32), (10, 4), (80, 2)])
def test_keys_and_values_are_stored_where_attention_reads_them(
    library: ctypes.CDLL, dtype: torch.dtype, head_dim: int, block_size: int
) -> None:
    plain = torch.randn(5, 3, block_size, head_dim).to(dtype)
    stored = [torch.zeros_like(plain) for _ in "kv"]
    order = torch.randperm(5 * block_size)
    rows = plain.transpose(1, 2).flatten(0, 1)[order].contiguous()
    keys, values = (each.data_ptr() for each in stored)
    spec = s.AttentionSpec(TYPES[dtype], 3, 3, head_dim, block_size, keys=keys, values=values)
    step = s.StepSpec(num_tokens=len(order), slots=order.data_ptr())
    library.sfllm_store_kv(byref(spec), byref(step), rows.data_ptr(), rows.data_ptr())
    assert torch.equal(stored[0].flatten(), native_keys(plain).flatten())
    assert torch.equal(stored[1].flatten(), native_values(plain).flatten())


def test_blocks_of_an_odd_number_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        batch_spec(AttentionBatch.build([1], [1], [[1]], 3))
