"""Arrays of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm.token_batch import Logprobs, TokenBatch, TokenRow, check_arrays, rows
from sfllm.wire import WireError, as_array

uint32 = st.integers(0, 2**32 - 1)


@st.composite
def logprobs(draw: st.DrawFn, tokens: int) -> Logprobs:
    width = draw(st.integers(0, 4))
    size = width * tokens
    ids = draw(st.lists(uint32, min_size=size, max_size=size))
    values = draw(st.lists(st.floats(-100, 0, width=32), min_size=size, max_size=size))
    return Logprobs(width, ids, values)


@st.composite
def row(draw: st.DrawFn) -> TokenRow:
    ids = draw(st.lists(uint32, max_size=5))
    handle = draw(st.integers(0, 2**64 - 1))
    return TokenRow(handle, draw(uint32), draw(uint32), draw(uint32), ids, draw(logprobs(len(ids))))


@given(st.lists(row(), max_size=10))
def test_rows_come_back_as_they_were_appended(expected: list[TokenRow]) -> None:
    batch = TokenBatch()
    for entry in expected:
        batch.append(*entry)
    assert len(batch) == len(expected)
    found = [
        entry._replace(
            ids=list(entry.ids),
            logprobs=Logprobs(entry.logprobs.width, list(entry.logprobs.ids), list(entry.logprobs.values)),
        )
        for entry in rows(batch.arrays())
    ]
    assert found == expected


def test_rows_without_their_numbers_are_refused() -> None:
    with pytest.raises(WireError, match="2 rows of tokens need more than 9 numbers"):
        check_arrays([as_array("Q", [1, 2]), as_array("I", [0] * 9), as_array("f", [])])


def test_counts_that_do_not_add_up_are_refused_before_the_first_row() -> None:
    arrays = [as_array("Q", [1]), as_array("I", [0, 0, 0, 2, 0, 5]), as_array("f", [])]
    with pytest.raises(WireError, match="2 tokens and 0 candidates were announced, but 1 ids"):
        next(rows(arrays))


def test_candidates_that_do_not_match_the_announced_width_are_refused() -> None:
    batch = TokenBatch()
    batch.append(1, 0, 0, 0, [5, 6], Logprobs(2, [5, 9, 6, 7], [-0.5, -0.25, -1.0, -2.0]))
    handles, integers, values = batch.arrays()
    with pytest.raises(WireError, match="4 candidates were announced"):
        check_arrays([handles, integers, values[:-1]])
    with pytest.raises(WireError, match="4 candidates were announced"):
        check_arrays([handles, integers[:-1], values])
