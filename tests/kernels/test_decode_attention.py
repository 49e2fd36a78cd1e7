from __future__ import annotations

import pytest
import torch
from attention_references import Case, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfllm_worker.kernels.attention_scratch import SPLIT_TOKENS, DecodeScratch
from sfllm_worker.kernels.attention_tiles import Scoring
from sfllm_worker.kernels.decode_attention import decode_attention, variants
from sfllm_worker.model.attention import PLAIN, AttentionOptions

SPLIT = 32


def run(
    case: Case,
    options: AttentionOptions = PLAIN,
    longest: int | None = None,
    q: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    split: int = SPLIT,
) -> Tensor:
    q = case.q if q is None else q
    rows, longest = len(q), longest or max(case.batch.context_lens)
    scratch = DecodeScratch(q.shape[1], q.shape[2], "cpu", split=split)
    scratch.reserve(rows, longest)
    scratch.mixed.fill_(float("nan"))
    scratch.stats.fill_(float("nan"))
    out = torch.full(q.shape, float("nan"), dtype=out_dtype or q.dtype)
    batch = case.batch
    decode_attention(
        out, q, case.layer, batch.block_tables, batch.context_lens_tensor, rows, longest, scratch, options
    )
    return out


def decodes(contexts: list[int], **shape: int | torch.dtype) -> Case:
    return Case([1] * len(contexts), contexts, **shape)  # type: ignore[arg-type]  # passes them on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 16, 16), (9, 3, 64, 16), (4, 1, 24, 32), (8, 1, 80, 64), (17, 1, 32, 16)],
)
def test_decodes_of_ragged_and_full_blocks_equal_dense_attention(
    heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> None:
    contexts = [1, SPLIT, 33, 3 * SPLIT]
    case = decodes(contexts, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype)
    assert_close(run(case), case.expected(PLAIN))


@settings(max_examples=10, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 140),
    soft_cap=st.none() | st.sampled_from([0.5, 5.0]),
    scale=st.none() | st.sampled_from([0.1, 1.0]),
)
def test_windows_caps_and_scales_hold_for_any_context(
    contexts: list[int], window: int | None, soft_cap: float | None, scale: float | None
) -> None:
    case, options = decodes(contexts), AttentionOptions(window, soft_cap, scale)
    assert_close(run(case, options), case.expected(options))


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(window=40)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch_and_band(options: AttentionOptions) -> None:
    case = decodes([SPLIT - 1, 2 * SPLIT + 5, 7, SPLIT], dtype=torch.float16)
    together = run(case, options, longest=6 * SPLIT, out_dtype=torch.float32)
    for row, context in enumerate(case.batch.context_lens):
        alone = decodes([context], dtype=torch.float16)
        alone.layer = case.layer
        alone.batch.block_tables.copy_(case.batch.block_tables[row : row + 1, : -(-context // 16)])
        by_itself = run(alone, options, q=case.q[row : row + 1], out_dtype=torch.float32)
        assert torch.equal(by_itself[0], together[row])


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(window=150, soft_cap=3.0)])
def test_a_split_of_several_tiles_equals_dense_attention(options: AttentionOptions) -> None:
    case = decodes([300, 203], heads=2, kv_heads=1, dim=80)
    assert_close(run(case, options, split=SPLIT_TOKENS), case.expected(options))


def test_merging_more_splits_than_fit_one_turn_equals_dense_attention() -> None:
    case = decodes([20 * SPLIT - 3], heads=2, kv_heads=1)
    assert_close(run(case), case.expected(PLAIN))


def test_padding_rows_leave_the_others_alone() -> None:
    case = decodes([70, 20])
    expected = run(case)
    padded = decodes([70, 20, 1])
    padded.layer = case.layer
    tables = padded.batch.block_tables
    tables[:2], tables[2] = case.batch.block_tables, 0  # the padding block, full of NaN
    assert torch.equal(run(padded, q=torch.cat([case.q, case.q[:1]]))[:2], expected)


def test_queries_may_be_part_of_wider_rows() -> None:
    case = decodes([40, 3])
    fused = torch.full((2, 4 + 2 + 2, 16), float("nan"))
    fused[:, :4] = case.q
    assert torch.equal(run(case, q=fused[:, :4]), run(case))


def test_weights_of_large_scores_do_not_overflow() -> None:
    case = decodes([50], dtype=torch.float16)
    case.q *= 100
    assert_close(run(case), case.expected(PLAIN))


@pytest.mark.parametrize(
    ("longest", "window", "splits"),
    [(1, 0, 1), (32, 0, 1), (33, 0, 2), (999, 1, 1), (999, 2, 2), (40, 99, 2)],
)
def test_a_window_bounds_the_splits_that_are_launched(longest: int, window: int, splits: int) -> None:
    assert DecodeScratch(1, 16, "cpu", split=32).splits(longest, window) == splits


def test_scratch_grows_with_its_reservations_and_keeps_what_graphs_may_point_to() -> None:
    scratch = DecodeScratch(2, 16, "cpu", split=32)
    scratch.reserve(3, 64)
    first = scratch.mixed
    assert first.nbytes + scratch.stats.nbytes == DecodeScratch.bytes_needed(3, 64, 2, 16, split=32)
    scratch.reserve(2, 96)
    assert scratch.mixed is first
    scratch.reserve(3, 65)
    assert scratch.mixed.shape == (12, 2, 16)
    assert any(old[0] is first for old in scratch.outgrown)


def test_scratch_that_grows_little_by_little_keeps_less_old_memory_than_new() -> None:
    scratch = DecodeScratch(2, 16, "cpu", split=32)
    for longest in range(1, 1000, 10):
        scratch.reserve(3, longest)
    assert sum(len(mixed) for mixed, _ in scratch.outgrown) < len(scratch.mixed) < 2 * 3 * 32


def test_a_scale_that_turns_scores_over_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        Scoring.of(AttentionOptions(scale=-1.0), 16)


def test_every_form_names_its_kernels_arguments() -> None:
    names = [form.name for form in variants()]
    assert len(set(names)) == len(names)
    for form in variants():
        assert list(form.signature) == form.kernel.arg_names
        constants = {name for name, kind in form.signature.items() if kind == "constexpr"}
        assert constants == set(form.constants)
