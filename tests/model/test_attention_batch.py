from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_worker.model.attention import AttentionBatch, group_by_length


def test_a_step_of_decodes_and_chunks_is_laid_out_row_by_row() -> None:
    batch = AttentionBatch.build([1, 1, 3], [5, 1, 6], [[7, 2], [3], [9, 4, 8]], block_size=4)
    assert batch.num_decodes == 2
    assert batch.num_tokens == 5
    assert batch.positions.tolist() == [4, 0, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [2 * 4, 3 * 4, 9 * 4 + 3, 4 * 4, 4 * 4 + 1]
    assert batch.last_rows.tolist() == [0, 1, 4]
    assert batch.block_tables.tolist() == [[7, 2], [3, 0], [9, 4]]


@given(
    st.lists(
        st.integers(1, 40).flatmap(lambda query: st.tuples(st.just(query), st.integers(query, 60))),
        min_size=1,
    ),
    st.integers(1, 7),
)
def test_every_token_has_its_position_and_the_slot_of_its_block(
    lengths: list[tuple[int, int]], block_size: int
) -> None:
    lengths = [(1, context) for _, context in lengths] + lengths
    tables = [[100 * i + block for block in range(60, 0, -1)] for i in range(len(lengths))]
    batch = AttentionBatch.build(*map(list, zip(*lengths, strict=True)), tables, block_size=block_size)
    expected = [
        (position, table[position // block_size] * block_size + position % block_size)
        for (query, context), table in zip(lengths, tables, strict=True)
        for position in range(context - query, context)
    ]
    assert batch.num_tokens == len(expected)
    assert list(zip(batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)) == expected
    assert batch.context_lens_tensor.tolist() == [context for _, context in lengths]
    assert batch.positions[batch.last_rows].tolist() == [context - 1 for _, context in lengths]


@pytest.mark.parametrize(
    ("queries", "contexts", "tables", "message"),
    [
        ([], [], [], "a step needs"),
        ([1], [1, 2], [[1]], "a step needs"),
        ([0], [3], [[1]], "query length 0"),
        ([4], [3], [[1]], "query length 4"),
        ([1], [5], [[1]], "1 blocks cannot hold 5"),
    ],
)
def test_contradicting_lengths_are_refused(
    queries: list[int], contexts: list[int], tables: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionBatch.build(queries, contexts, tables, block_size=4)


@given(st.lists(st.integers(1, 600), max_size=60))
def test_grouping_keeps_every_row_once_and_bounds_the_padding(blocks: list[int]) -> None:
    groups = group_by_length(blocks)
    assert sorted(row for group in groups for row in group) == list(range(len(blocks)))
    for group in groups:
        lengths = [blocks[row] for row in group]
        assert max(lengths) <= 2 * min(lengths)
    assert len(groups) <= 10  # halving 600 ten times leaves less than one block


def test_rows_of_like_length_share_one_group() -> None:
    assert len(group_by_length([10, 12, 16, 20, 11])) == 1
