"""Columns of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm.token_batch import TokenBatch, check_columns, rows
from sfllm.wire import WireError, as_array

uint32 = st.integers(0, 2**32 - 1)
row = st.tuples(st.integers(0, 2**64 - 1), uint32, uint32, uint32, st.lists(uint32, max_size=5))


@given(st.lists(row, max_size=10))
def test_rows_come_back_as_they_were_appended(expected: list[tuple[int, int, int, int, list[int]]]) -> None:
    batch = TokenBatch()
    for entry in expected:
        batch.append(*entry)
    assert len(batch) == len(expected)
    found = [(*entry[:4], list(entry.ids)) for entry in rows(batch.arrays())]
    assert found == expected


def test_columns_of_different_length_are_refused() -> None:
    columns = [
        as_array("Q", [1]),
        *(as_array("I", [0]) for _ in range(3)),
        as_array("I", []),
        as_array("I", []),
    ]
    with pytest.raises(WireError, match="differ in length"):
        check_columns(columns)


def test_counts_that_do_not_add_up_are_refused_before_the_first_row() -> None:
    columns = [
        as_array("Q", [1]),
        *(as_array("I", [0]) for _ in range(3)),
        as_array("I", [2]),
        as_array("I", [5]),
    ]
    with pytest.raises(WireError, match="add up to 2, but 1 ids came"):
        next(rows(columns))
