from __future__ import annotations

import pytest
import torch
from attention_references import Case, assert_close, round_products_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfllm_worker.kernels.prefill_attention import (
    prefill_attention,
    queries_per_tile,
    query_tiles,
    variants,
)
from sfllm_worker.model.attention import PLAIN, AttentionOptions


def run(
    case: Case, options: AttentionOptions = PLAIN, first: int = 0, out_dtype: torch.dtype | None = None
) -> Tensor:
    batch, q = case.batch, case.q
    per_tile = queries_per_tile(q.shape[1], case.layer.k.shape[1], q.shape[2], q.element_size())
    tiles = query_tiles(batch.query_lens, batch.context_lens, first, per_tile, "cpu")
    out = torch.full(q.shape, float("nan"), dtype=out_dtype or q.dtype)
    prefill_attention(out, q, case.layer, tiles, batch.block_tables, batch.context_lens_tensor, options)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 16, 16), (9, 3, 64, 16), (4, 1, 24, 32), (8, 1, 80, 64)],
)
def test_chunks_over_earlier_context_equal_dense_attention(
    heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> None:
    queries, contexts = [7, 1, 20], [7, 66, 84]
    case = Case(queries, contexts, heads, kv_heads, dim, block_size, dtype)
    assert_close(run(case), case.expected(PLAIN))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 140)), min_size=1, max_size=2),
    window=st.none() | st.integers(1, 150),
    soft_cap=st.none() | st.sampled_from([0.5, 5.0]),
    scale=st.none() | st.sampled_from([0.1, 1.0]),
)
def test_windows_caps_and_scales_hold_for_any_chunk(
    lengths: list[tuple[int, int]], window: int | None, soft_cap: float | None, scale: float | None
) -> None:
    case = Case([new for new, _ in lengths], [new + old for new, old in lengths])
    options = AttentionOptions(window, soft_cap, scale)
    assert_close(run(case, options), case.expected(options))


@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_queries_whose_windows_begin_in_different_tiles_of_keys_share_a_program(
    soft_cap: float | None,
) -> None:
    case, options = Case([16], [100]), AttentionOptions(window=30, soft_cap=soft_cap)
    assert_close(run(case, options), case.expected(options))


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(window=30, soft_cap=3.0)])
def test_a_query_has_the_same_bits_however_its_prompt_is_cut(
    options: AttentionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_products_once(monkeypatch)
    whole = Case([85, 3], [85, 9], dtype=torch.float16)
    expected = run(whole, options, out_dtype=torch.float32)
    for start, end in ((0, 13), (13, 85), (63, 70)):
        part = Case([end - start], [end], dtype=torch.float16)
        part.layer, part.q = whole.layer, whole.q[start:end]
        part.batch.block_tables.copy_(whole.batch.block_tables[:1, : part.batch.block_tables.shape[1]])
        assert torch.equal(run(part, options, out_dtype=torch.float32), expected[start:end])


def test_only_the_sequences_from_the_first_on_are_written() -> None:
    case = Case([1, 5], [20, 30])
    out = run(case, first=1)
    assert torch.isnan(out[0]).all()
    assert_close(out[1:], case.expected(PLAIN)[1:])


def test_tiles_cover_every_query_once_and_the_longest_reach_comes_first() -> None:
    tiles = query_tiles([1, 5, 9], [50, 5, 30], 1, 4, "cpu")
    assert tiles.tolist() == [
        [2, 14, 1, 1],
        [2, 10, 4, 5],
        [2, 6, 4, 9],
        [1, 5, 1, 1],
        [1, 1, 4, 5],
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "queries"),
    [(16, 8, 128, 64), (9, 3, 64, 42), (8, 8, 256, 64), (8, 1, 80, 16)],
)
def test_a_tile_holds_as_many_queries_as_its_rows_fit_groups(
    heads: int, kv_heads: int, dim: int, queries: int
) -> None:
    assert queries_per_tile(heads, kv_heads, dim, 2) == queries


def test_every_form_names_its_kernels_arguments() -> None:
    names = [form.name for form in variants()]
    assert len(set(names)) == len(names)
    for form in variants():
        assert list(form.signature) == form.kernel.arg_names
        constants = {name for name, kind in form.signature.items() if kind == "constexpr"}
        assert constants == set(form.constants)
